"""The alphabet: one letter a dimension, the same in einsums, names, parameter labels and sharding."""

from llama_jax import config

WORDS = {
    "B": "batch",
    "T": "query positions",
    "S": "key positions",
    "D": "model width",
    "N": "query heads",
    "K": "key and value heads",
    "G": "query heads a key head",
    "H": "head width",
    "F": "ffn width",
    "V": "vocabulary",
    "L": "stacked layer groups",
}


def sizes(model: config.Model) -> dict[str, int]:
    """The size of each letter that the model fixes; B, T and S belong to the batch."""
    return {
        "D": model.dim,
        "N": model.heads,
        "K": model.kv_heads,
        "G": model.heads // model.kv_heads,
        "H": model.head_dim,
        "F": model.ffn_dim,
        "V": model.vocab_size,
        "L": model.groups,
    }


# The config field that sets a letter, for messages.
FIELDS = {
    "B": "train.batch_size / train.microbatches",
    "T": "data.seq_len",
    "D": "model.dim",
    "N": "model.heads",
    "K": "model.kv_heads",
    "H": "model.head_dim",
    "F": "model.ffn_dim",
    "V": "model.vocab_size",
    "L": "model.layers / len(model.pattern)",
}
