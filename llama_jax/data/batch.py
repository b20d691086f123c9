"""The batch that the loss reads, and the one place where inputs and targets are shifted apart."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """B rows of T predictions. Weight 0: the target does not count. Segment 0: padding."""

    tokens_BT: np.ndarray | jax.Array  # int32
    targets_BT: np.ndarray | jax.Array  # int32, the token that follows
    weights_BT: np.ndarray | jax.Array  # float32
    positions_BT: np.ndarray | jax.Array  # int32, within the segment
    segments_BT: np.ndarray | jax.Array  # int32, which document of the row, from 1


# With U = T+1: the tokens of a row, one more than its predictions.
def from_rows(
    rows_BU: np.ndarray, segments_BU: np.ndarray | None, segments: str, bos: int, eos: int
) -> Batch:
    """A batch of numpy arrays from stored rows.

    segments "document": a row's documents are told apart by its stored segments, else by bos, and
    a target in another document than its token has weight 0. "none": one segment, positions count
    through the row. Padding, stored as segment 0, has weight 0 and segment 0 in both.

    Where one token is both bos and eos (GPT-NeoX, arXiv:2204.06745), it stands twice between documents: the
    first closes one, and is a target that counts; the second opens the next.
    """
    stored_BU = np.ones_like(rows_BU) if segments_BU is None else segments_BU
    if segments == "none":
        segments_BU = (stored_BU > 0).astype(np.int32)
    elif segments_BU is None:
        opens_BU = rows_BU == bos
        if bos == eos:
            opens_BU[:, 1:] &= rows_BU[:, :-1] == eos
        opens_BU[:, 0] = True
        segments_BU = np.cumsum(opens_BU, axis=1, dtype=np.int32)
    token_segments_BT, target_segments_BT = segments_BU[:, :-1], segments_BU[:, 1:]
    counts_BT = (target_segments_BT > 0) & (target_segments_BT == token_segments_BT)
    return Batch(
        tokens_BT=rows_BU[:, :-1].astype(np.int32),
        targets_BT=rows_BU[:, 1:].astype(np.int32),
        weights_BT=counts_BT.astype(np.float32),
        positions_BT=_positions(token_segments_BT),
        segments_BT=token_segments_BT.astype(np.int32),
    )


def _positions(segments_BT: np.ndarray) -> np.ndarray:
    """Distance to the first token of the same segment."""
    index_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    opens_BT = np.zeros(segments_BT.shape, bool)
    opens_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return index_T - np.maximum.accumulate(np.where(opens_BT, index_T, 0), axis=1, dtype=np.int32)
