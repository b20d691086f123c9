"""Which row comes when: a pure function of (seed, global row number). No JAX.

Each source is shuffled anew every epoch; sources are interleaved so that every prefix of the order
holds them in the proportions of their weights, to within two rows.
"""

import fractions
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.data.prepare import Prepared

Pick = tuple[int, int]  # (source, row)

# Below so many rows a source's permutation of an epoch is made and kept. Above, grain computes single
# elements of one, which takes it longer the fewer rows there are: 18 ms of 7 rows, 0.14 ms of 1,000.
SMALL = 10_000


class Order:
    """Element n, without end, is the Pick of the n-th row of training."""

    def __init__(
        self, names: Sequence[str], lengths: Sequence[int], weights: Sequence[float], seed: int
    ):
        self._interleave = _Interleave(weights)
        self._rows = []
        for name, length in zip(names, lengths, strict=True):
            # By name, so that a source keeps its order when another one is added.
            own = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0]
            self._rows.append(_shuffled(length, int(own)))

    def __getitem__(self, n: int) -> Pick:
        source, number = self._interleave[n]
        return source, self._rows[source](number)


def _shuffled(length: int, seed: int) -> Callable[[int], int]:
    """The n-th row of a source of `length` rows, each epoch of it in an order of its own."""
    if length >= SMALL:
        import grain

        rows: Any = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
        return lambda n: int(rows[n])

    @functools.lru_cache(maxsize=8)
    def permutation(epoch: int) -> np.ndarray:
        # NumPy keeps the raw numbers of a generator from version to version, not its permutations.
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
        return np.argsort(bits.random_raw(length), kind="stable")

    def row(n: int) -> int:
        epoch, at = divmod(n, length)
        return int(permutation(epoch)[at])

    return row


class _Interleave:
    """Which source gives the n-th row, and its how-many-eth that is; in integers, so exact.

    The scheme of grain.MapDataset.mix, which however truncates weights to hundredths of the
    smallest: 7 to 3 becomes 233 to 100. Of n rows the first source takes what floor(n * (total -
    its weight) / total) leaves; the others share the rest in the same way.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [fractions.Fraction(repr(weight)) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * unit) for weight in exact]

    def __getitem__(self, n: int) -> Pick:
        before, after = n, n + 1
        total = sum(self._weights)
        for source, weight in enumerate(self._weights):
            left_before = before * (total - weight) // total
            left_after = after * (total - weight) // total
            if before - left_before != after - left_after:
                return source, before - left_before
            before, after, total = left_before, left_after, total - weight
        raise AssertionError("the last source takes what is left")


def order_of(data: config.Data, prepared: Prepared) -> Order:
    """The order of a run's training rows."""
    corpora = prepared.sources
    lengths = [len(corpus.store.train) for corpus in corpora]
    return Order([c.name for c in corpora], lengths, [c.weight for c in corpora], data.seed)


def fingerprint(data: config.Data, prepared: Prepared) -> str:
    """Of the order, by samples of it: it changes when this file or grain shuffles in another way."""
    order = order_of(data, prepared)
    picks = [order[n] for n in (*range(256), 10**6, 10**9)]
    return hashlib.sha256(repr(picks).encode()).hexdigest()


def epochs(prepared: Prepared, rows: int) -> dict[str, float]:
    """How often each source has been read after so many rows of training."""
    total = sum(corpus.weight for corpus in prepared.sources)
    return {
        corpus.name: rows * corpus.weight / total / len(corpus.store.train)
        for corpus in prepared.sources
    }


def validation_picks(prepared: Prepared, rows: int, block: int = 1) -> list[Pick]:
    """The held-out rows that losses are measured on, source after source.

    An equal number of each source, spread evenly over all that it has, in blocks of neighbours: the
    first rows alone would be those of the first file or two. What a short source leaves goes to the
    others; so many rows in all, or as many as there are.
    """
    blocks = [len(corpus.store.validation) // block for corpus in prepared.sources]
    takes = _shares(blocks, rows // block)
    return [
        (source, first * blocks[source] // take * block + i)
        for source, take in enumerate(takes)
        for first in range(take)
        for i in range(block)
    ]


def validation_blocks(prepared: Prepared, rows: int, block: int) -> list[np.ndarray]:
    """Tokens [T+1] of `validation_picks`, strictly as many of each source.

    The mean over them is the mean over sources. ValueError if a source has too few.
    """
    share = rows // len(prepared.sources) // block * block
    for corpus in prepared.sources:
        there = len(corpus.store.validation) // block * block
        if there < share:
            raise ValueError(
                f"{share} held-out rows of each source are needed, in blocks of {block}, and "
                f"data.sources.{corpus.name} has {there}; nearest: {there * len(prepared.sources)}, "
                "or raise data.validation_fraction"
            )
    return _tokens(prepared, "validation", validation_picks(prepared, rows, block))


def _shares(left: list[int], wanted: int) -> list[int]:
    """So many of each source, equal as far as they go."""
    left = list(left)
    takes = [0] * len(left)
    wanted = min(wanted, sum(left))
    while wanted:
        unread = [source for source, n in enumerate(left) if n]
        share = max(wanted // len(unread), 1)
        for source in unread[:wanted]:
            take = min(share, left[source])
            takes[source] += take
            left[source] -= take
            wanted -= take
    return takes


def _tokens(prepared: Prepared, split: str, picks: list[Pick]) -> list[np.ndarray]:
    tokens = [np.empty(0)] * len(picks)
    for source, corpus in enumerate(prepared.sources):
        where = [at for at, pick in enumerate(picks) if pick[0] == source]
        if where:
            read, _ = getattr(corpus.store, split).read([picks[at][1] for at in where])
            for at, row in zip(where, read.astype(np.int32), strict=True):
                tokens[at] = row
    return tokens
