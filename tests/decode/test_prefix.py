import itertools

import numpy as np
import pytest

from llama_jax.decode import prefix


@pytest.mark.parametrize(
    ("sequences", "least", "wanted"),
    [
        ([[1, 2, 3, 4], [1, 2, 5], [7]], 2, [[2], [2], []]),
        ([[1, 2, 3, 4], [1, 2, 5], [7]], 3, [[], [], []]),
        # Equal ones, and one that another begins with: their last token is computed for each.
        ([[1, 2, 3], [1, 2, 3]], 1, [[2], [2]]),
        ([[1, 2, 3, 9, 9], [1, 2, 3], [1, 2, 3, 9, 8]], 1, [[2, 4], [2], [2, 4]]),
        ([[1, 2, 3, 9, 9], [1, 2, 3], [1, 2, 3, 9, 8]], 3, [[4], [], [4]]),
        ([[5]], 1, [[]]),
        ([], 1, []),
    ],
)
def test_cuts_are_where_others_part(sequences, least, wanted):
    assert prefix.cuts(sequences, least) == wanted


def test_cuts_of_equal_beginnings_are_equal():
    """60 random sequences over two letters: of every pair, up to where they part."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(60)]
    cuts = prefix.cuts(sequences, 2)
    shuffled = rng.permutation(60)
    again = prefix.cuts([sequences[i] for i in shuffled], 2)
    assert [again[list(shuffled).index(i)] for i in range(60)] == cuts
    assert max(map(len, cuts)) >= 3
    for (a, cuts_a), (b, cuts_b) in itertools.combinations(zip(sequences, cuts, strict=True), 2):
        same = prefix.common(a, b)
        assert [n for n in cuts_a if n <= same] == [n for n in cuts_b if n <= same]
        assert all(0 < n < len(a) for n in cuts_a)
        assert (np.diff([0, *cuts_a]) >= 2).all()
