"""Text to rows of tokens, and rows to batches. Only batch.py and iterator.py may import JAX."""
