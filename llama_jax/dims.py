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
    "R": "rows of a table of positions",
    "U": "buckets of distances",
    "L": "stacked layer groups",
}
DISTANCE_BUCKETS = 32  # of T5 (arXiv:1910.10683 section 2.1)


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
        "R": model.max_positions,
        "U": DISTANCE_BUCKETS,
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


def is_matrix(letters: str) -> bool:
    """Whether a parameter maps from or to the model's width: no norm scale, no bias."""
    return "D" in letters and len(letters.replace("L", "")) > 1


def is_inner(letters: str) -> bool:
    """Whether it is a matrix inside a layer: neither a table that is looked up nor the output."""
    return is_matrix(letters) and not {"V", "R"} & set(letters)
