"""The package's version, which all that it writes carries."""

__version__ = "0.1.0"
