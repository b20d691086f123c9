"""Smaller weights: whole numbers of 8 or 4 bits in the places of a trained network's matrices."""
