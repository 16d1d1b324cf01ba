"""How good samples are, and pictures of what a bundle does. numpy alone; matplotlib inside the plotting functions."""
