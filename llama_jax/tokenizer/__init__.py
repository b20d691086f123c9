"""Text to token ids and back. No JAX here."""
