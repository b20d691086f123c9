"""LLaMA in JAX, for research: the whole family, one readable code. Start with docs/architecture.md."""

__version__ = "0.1.0"
