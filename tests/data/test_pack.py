import itertools

import numpy as np
import pytest

from llama_jax.data import pack

BOS, EOS, PAD = 901, 902, 903


def documents(lengths):
    """Ids all different, so that each token can be followed."""
    start = 0
    for length in lengths:
        yield np.array([BOS, *range(start, start + length), EOS], np.int32)
        start += length


def run(packing, lengths, length):
    generator, rows = pack.PACKINGS[packing](documents(lengths), length, BOS, PAD), []
    while True:
        try:
            rows.append(next(generator))
        except StopIteration as stop:
            return rows, stop.value


@pytest.mark.parametrize("lengths", [[3, 1, 50, 7, 20], [1] * 40, [200], [5, 5, 14]])
def test_concat_makes_every_token_a_target_exactly_once_in_order(lengths):
    rows, (dropped, padding) = run("concat", lengths, 8)
    stream = np.concatenate(list(documents(lengths)))
    targets = np.concatenate([row.tokens[1:] for row in rows])
    np.testing.assert_array_equal(targets, stream[1 : 1 + len(targets)])
    assert {len(row.tokens) for row in rows} == {9}
    assert all(row.segments is None for row in rows)
    for row, following in itertools.pairwise(rows):
        assert row.tokens[-1] == following.tokens[0]
    assert len(stream) - 1 - len(targets) == dropped < 8
    assert padding == 0


def test_concat_of_too_little_text_gives_no_row():
    assert run("concat", [3, 1], 8) == ([], (7, 0))
    rows, (dropped, _) = run("concat", [3, 2], 8)
    assert (len(rows), dropped) == (1, 0)


@pytest.mark.parametrize("lengths", [[3, 1, 50, 7, 20, 6, 6, 2], [1] * 40, [8, 7, 6, 5] * 9])
def test_best_fit_keeps_documents_whole_and_every_token_once(lengths):
    length = 8
    rows, (dropped, padding) = run("best_fit", lengths, length)
    found = {}
    for row in rows:
        assert len(row.tokens) == len(row.segments) == length + 1
        assert (row.tokens[row.segments == 0] == PAD).all()
        for segment in range(1, row.segments.max() + 1):
            piece = row.tokens[row.segments == segment].tolist()
            found.setdefault(tuple(piece), []).append(segment)
    expected = []
    for ids in (ids.tolist() for ids in documents(lengths)):
        expected += [tuple(ids[i : i + length + 1]) for i in range(0, len(ids) - 1, length)]
    assert sorted(found) == sorted(set(expected))
    assert sum(map(len, found.values())) == len(expected)
    assert dropped == 0
    assert padding == len(rows) * (length + 1) - sum(map(len, expected))
    assert padding < len(rows) * (length + 1) / 4
