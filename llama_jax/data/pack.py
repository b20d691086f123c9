"""Documents of ids to rows of one length: "concat" and "best_fit". No JAX.

A document begins with bos; a long one comes in several arrays, of which only the first does.

A row holds length+1 tokens, of which the last `length` are targets. Where text is cut the next row
repeats one token, so that every token but a document's first is a target exactly once.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

OPEN_BINS = 64  # rows that best_fit fills at a time


class PackedRow(NamedTuple):
    tokens: np.ndarray  # length+1
    segments: np.ndarray | None  # documents from 1, padding 0; None: tell them by bos


def concat(
    documents: Iterator[np.ndarray], length: int, bos: int, pad: int
) -> Generator[PackedRow, None, tuple[int, int]]:
    """One stream of tokens, split every `length` (LLaMA's packing).

    Returns the tokens that are in no row's targets: the last partial row, and no padding.
    """
    held, size = [], 0
    for ids in documents:
        held.append(ids)
        size += len(ids)
        if size <= length:
            continue
        stream = np.concatenate(held)
        rows = (size - 1) // length
        for start in range(0, rows * length, length):
            yield PackedRow(stream[start : start + length + 1], None)
        held, size = [stream[rows * length :]], size - rows * length
    return max(size - 1, 0) if size else 0, 0


def best_fit(
    documents: Iterator[np.ndarray], length: int, bos: int, pad: int
) -> Generator[PackedRow, None, tuple[int, int]]:
    """Documents whole, each in the open row that it fills best (arXiv:2404.10830), then padding.

    Documents longer than a row are cut first. Returns no dropped tokens, and how many are padding.
    """
    import grain

    key = "tokens"
    packed = grain.experimental.BestFitPackIterDataset(
        _stream(_cut(documents, length, bos)),
        length_struct={key: length + 1},
        num_packing_bins=OPEN_BINS,
        shuffle_bins=False,
        padding_struct={key: pad},
    )
    padding = 0
    for row in packed:
        segments = row[f"{key}_segment_ids"]
        padding += int(np.sum(segments == 0))
        yield PackedRow(row[key], segments)
    return 0, padding


def _cut(documents: Iterator[np.ndarray], length: int, bos: int) -> Iterator[np.ndarray]:
    held = np.empty(0, np.int32)
    for ids in documents:
        if ids[0] == bos and len(held):
            yield held
            held = held[:0]
        held = np.concatenate([held, ids])
        while len(held) > length + 1:
            yield held[: length + 1]
            held = held[length:]
    if len(held):
        yield held


def _stream(documents: Iterator[np.ndarray]):
    """A grain dataset that is read once, in order, and never resumed."""
    import grain

    class Reader(grain.DatasetIterator):
        def __next__(self):
            return {"tokens": next(documents)}

        def get_state(self):
            return {}  # the packer asks for it, to resume from; we pack once

        def set_state(self, state):
            raise NotImplementedError

    class PackedRows(grain.IterDataset):
        def __iter__(self):
            return Reader()

    return PackedRows()


PACKINGS = {"concat": concat, "best_fit": best_fit}
