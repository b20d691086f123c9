"""Studies: a base run, axes of choices, seeds (llama_jax/study/schema.py)."""
