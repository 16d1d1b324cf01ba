"""Values and mathematics that every part shares: numpy alone."""
