"""How good samples are, and plots of what a bundle does.

It needs numpy alone; matplotlib is imported inside the plotting functions.
"""
