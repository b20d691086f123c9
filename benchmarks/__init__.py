"""Measured comparisons: `make bench`. Both sides of a row run in turns, each in a process of its own."""
