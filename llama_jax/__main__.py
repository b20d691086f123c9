"""Says where the commands are."""

if __name__ == "__main__":
    raise SystemExit("llama_jax is the library; python -m experiments lists the commands")
