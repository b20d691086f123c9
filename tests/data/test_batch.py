import itertools

import numpy as np

from llama_jax.data import batch

BOS, EOS = 91, 90


def slow(rows, stored, mode):
    """Token by token, in Python."""
    out = []
    for b, row in enumerate(rows):
        segment, position = 1, 0
        segments, positions = [], []
        for t, token in enumerate(row):
            here = stored[b][t] if stored is not None else None
            if mode == "none":
                position = position + 1 if t and segment == int(here != 0) else 0
                segment = int(here != 0)
            elif stored is not None:
                position = position + 1 if t and here == stored[b][t - 1] else 0
                segment = here
            elif token == BOS and t:
                segment, position = segment + 1, 0
            elif t:
                position += 1
            segments.append(segment)
            positions.append(position)
        weights = [float(b != 0 and a == b) for a, b in itertools.pairwise(segments)]
        out.append((row[:-1], row[1:], weights, positions[:-1], segments[:-1]))
    return [np.array([row[i] for row in out]) for i in range(5)]


def check(rows, stored, mode):
    got = batch.from_rows(rows, stored, mode, BOS, EOS)
    expected = slow(rows.tolist(), None if stored is None else stored.tolist(), mode)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == (np.float32 if name == "weights_BT" else np.int32)
    return got


def random_rows(dtype=np.uint16):
    rows = np.random.default_rng(0).integers(0, 90, (5, 18)).astype(dtype)
    rows[0, [3, 4, 11]] = BOS
    rows[1, 0] = BOS
    rows[2, [0, 17]] = BOS
    rows[3, [1]] = BOS
    return rows


def test_targets_are_the_next_tokens_and_all_count():
    got = check(random_rows(), None, "none")
    assert got.weights_BT.sum() == 5 * 17


def test_documents_are_told_apart_by_their_first_token():
    got = check(random_rows(np.uint32), None, "document")
    assert got.segments_BT[0].tolist() == [1] * 3 + [2] + [3] * 7 + [4] * 6
    assert got.positions_BT[0].tolist() == [0, 1, 2, 0, *range(7), *range(6)]
    assert np.flatnonzero(got.weights_BT[0] == 0).tolist() == [2, 3, 10]
    assert np.flatnonzero(got.weights_BT[2] == 0).tolist() == [16]


def test_stored_segments_are_used_and_padding_never_counts():
    rows = random_rows()
    stored = np.ones_like(rows)
    stored[0, 3:], stored[0, 9:], stored[0, 15:] = 2, 3, 0
    stored[4, 6:] = 0
    got = check(rows, stored, "document")
    assert np.flatnonzero(got.weights_BT[0] == 0).tolist() == [2, 8, 14, 15, 16]
    assert got.weights_BT[4].tolist() == [1.0] * 5 + [0.0] * 12
    got = check(rows, stored, "none")
    assert np.flatnonzero(got.weights_BT[0] == 0).tolist() == [14, 15, 16]
    assert got.segments_BT[0].tolist() == [1] * 15 + [0] * 2


def test_the_rows_given_are_not_changed():
    rows = random_rows()
    before = rows.copy()
    batch.from_rows(rows, None, "document", BOS, EOS)
    np.testing.assert_array_equal(rows, before)


def test_the_end_token_counts_where_it_is_the_begin_token_too():
    """As GPT-NeoX's <|endoftext|>, 9 here: of every document in a row its own begins and end."""
    rows = np.array(
        [
            [9, 1, 2, 9, 9, 3, 9, 9, 4],
            [2, 9, 9, 3, 4, 9, 9, 1, 9],  # from inside a document
            [9, 9, 3, 4, 9, 9, 1, 2, 3],  # from the end of one
        ]
    )
    got = batch.from_rows(rows, None, "document", 9, 9)
    assert got.segments_BT.tolist() == [
        [1, 1, 1, 1, 2, 2, 2, 3], [1, 1, 2, 2, 2, 2, 3, 3], [1, 2, 2, 2, 2, 3, 3, 3],
    ]  # fmt: skip
    assert got.positions_BT[1].tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert got.weights_BT.tolist() == [
        [1, 1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1],
    ]  # fmt: skip
    # Stored segments, of whole documents, say the same.
    stored = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3]])
    packed = batch.from_rows(rows[:1], stored, "document", 9, 9)
    for ours, theirs in zip(packed, got, strict=True):
        np.testing.assert_array_equal(ours, theirs[:1])
