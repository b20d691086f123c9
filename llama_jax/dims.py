"""The alphabet: one letter a dimension, the same in einsums, names, parameter labels and sharding.

A letter has a role. The roles of a parameter's letters decide whether it is a matrix and decays, how it is
sharded and gathered, and which side its gradient begins with. A new part of the network adds rows here.
"""

from collections.abc import Iterable
from typing import NamedTuple

DISTANCE_BUCKETS = 32  # of T5 (arXiv:1910.10683 section 2.1)


class Letter(NamedTuple):
    """size: the attribute of a part of the config, or a number; "" where the batch fixes it."""

    words: str
    role: str
    size: str | int = ""
    setting: str = ""  # what a user changes to change the size, for messages


# Roles: "rows" and "positions" of a batch; "narrow", the width that layers read from and add to; "wide", what
# tensor parallelism splits in a layer (heads, hidden units); "inner", within a head, never split; "rank", of
# an adapter; "vocabulary"; "entries" of another table that is looked up; "stack" of layers.
LETTERS = {
    "B": Letter("batch", "rows", "", "train.batch_size / train.microbatches"),
    "T": Letter("query positions", "positions", "", "data.seq_len"),
    "S": Letter("key positions", "positions"),
    "M": Letter("states of a memory", "positions"),
    "D": Letter("model width", "narrow", "dim", "model.dim"),
    "N": Letter("query heads", "wide", "heads", "model.heads"),
    "K": Letter("key and value heads", "wide", "kv_heads", "model.kv_heads"),
    "G": Letter("query heads a key head", "inner"),
    "H": Letter("head width", "inner", "head_dim", "model.head_dim"),
    "F": Letter("ffn width", "wide", "ffn_dim", "model.ffn_dim"),
    "E": Letter("adapter rank", "rank", "rank"),
    "V": Letter("vocabulary", "vocabulary", "vocab_size", "model.vocab_size"),
    "R": Letter("rows of a table of positions", "entries", "max_positions", "model.max_positions"),
    "U": Letter("buckets of distances", "entries", DISTANCE_BUCKETS),
    "L": Letter("stacked layer groups", "stack", "groups", "model.layers / len(model.pattern)"),
}


def sizes(part: object) -> dict[str, int]:
    """The size of each letter that a part of the config fixes (`config.Model`): it has its attribute."""
    found = {}
    for letter, of in LETTERS.items():
        if isinstance(of.size, int):
            found[letter] = of.size
        elif of.size and hasattr(part, of.size):
            found[letter] = getattr(part, of.size)
    return found


def shape(letters: str, part: object) -> tuple[int, ...]:
    """The shape of an array of these letters."""
    size = sizes(part)
    return tuple(size[letter] for letter in letters)


def roles(letters: Iterable[str]) -> set[str]:
    return {LETTERS[letter].role for letter in letters}


def of_roles(table: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """{letter: value} from {role: value}, for the letters whose role the table has."""
    return {letter: table[of.role] for letter, of in LETTERS.items() if of.role in table}


def unstacked(letters: str) -> str:
    """The letters of one layer's part of a stacked parameter."""
    return "".join(letter for letter in letters if LETTERS[letter].role != "stack")


def width(letters: str) -> str:
    """The letter of a matrix's narrow side: the first model width, else the rank of an adapter, else ""."""
    for role in ("narrow", "rank"):
        for letter in letters:
            if LETTERS[letter].role == role:
                return letter
    return ""


def is_matrix(letters: str) -> bool:
    """Whether a parameter maps from or to a model width or an adapter's rank: no norm scale, no bias."""
    return bool(width(letters)) and len(unstacked(letters)) > 1


def is_table(letters: str) -> bool:
    """Whether rows of it are looked up: its entries come first. (An output matrix ends with them.)"""
    return bool({"vocabulary", "entries"} & roles(unstacked(letters)[:1]))


def is_inner(letters: str) -> bool:
    """Whether it is a matrix inside a layer: neither a table that is looked up nor the output."""
    return is_matrix(letters) and not {"vocabulary", "entries"} & roles(letters)
