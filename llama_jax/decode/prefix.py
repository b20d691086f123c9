"""Prefixes that token sequences share, so that each goes through the network once."""

import itertools
from collections.abc import Sequence

import numpy as np


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """The number of tokens with which both begin."""
    size = min(len(a), len(b))
    differ_X = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ_X[0]) if len(differ_X) else size


def in_order(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The order in which each shares most with the one before, and how many tokens that is, first 0."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    arrays = [np.asarray(sequences[i], np.int64) for i in order]
    shared = [common(a, b) for a, b in itertools.pairwise(arrays)]
    return order, [0, *shared][: len(order)]


def cuts(sequences: Sequence[Sequence[int]], least: int) -> list[list[int]]:
    """Of each sequence the lengths at which others part from it, ascending: nodes of their prefix tree.

    A cut is at least `least` tokens after the one before it, and before the last token of a sequence that
    ends there. Sequences that are equal up to a cut of one are cut alike up to there, so that one may go on
    from what was computed for the other, in whatever order they come.
    """
    order, shared = in_order(sequences)
    found: list[list[int]] = [[] for _ in sequences]
    # Of sequences in order: first, stop, how many tokens they share with others beside them, their last cut.
    ranges = [(0, len(order), 0, 0)]
    while ranges:
        first, stop, above, last = ranges.pop()
        if stop - first < 2:
            continue
        part = shared[first + 1 : stop]
        equal = min(part)
        cut = equal - (len(sequences[order[first]]) == equal)  # the shortest one is the first
        # Those beside them, if not cut there, must not be taken for cut.
        if cut >= last + least and cut > above:
            for i in order[first:stop]:
                found[i].append(cut)
            last = cut
        edges = [first, *(first + 1 + j for j, n in enumerate(part) if n == equal), stop]
        ranges += [(a, b, equal, last) for a, b in itertools.pairwise(edges)]
    return found
