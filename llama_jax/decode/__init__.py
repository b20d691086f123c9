"""Text out of a network."""
