import collections
import dataclasses
import time

import numpy as np
import pytest

from llama_jax.data import mixture

NAMES, LENGTHS, WEIGHTS = ("a", "b", "c"), (50, 70, 2000), (67.0, 15.0, 18.0)


def test_tokens_come_in_exact_proportion_and_so_does_every_prefix():
    order = mixture.Order(NAMES, LENGTHS, WEIGHTS, seed=3)
    counts = collections.Counter()
    for n in range(1000):
        counts[order[n][0]] += 1
        for source, weight in enumerate(WEIGHTS):
            assert abs(counts[source] - (n + 1) * weight / 100) < 2
    assert [counts[source] for source in range(3)] == [670, 150, 180]


def test_proportions_that_are_no_hundredths_are_exact_too():
    """grain's own mix gives 6997 to 3003: it truncates 7/3 to 2.33."""
    order = mixture.Order(("a", "b"), (9000, 9000), (0.7, 0.3), seed=1)
    assert sum(order[n][0] == 0 for n in range(10_000)) == 7000
    llama = (67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0)
    order = mixture.Order("abcdefg", (9000,) * 7, llama, seed=1)
    counts = collections.Counter(order[n][0] for n in range(200))
    assert [counts[source] for source in range(7)] == [134, 30, 9, 9, 9, 5, 4]


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    order = mixture.Order(NAMES, LENGTHS, WEIGHTS, seed=3)
    rows = collections.defaultdict(list)
    for n in range(1000):
        source, row = order[n]
        rows[source].append(row)
    first, second = rows[0][:50], rows[0][50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))
    assert len(set(rows[2])) == 180


def test_small_and_large_sources_alike_come_whole_every_epoch():
    """Both ways of shuffling, at the border between them."""
    for length in (1, 2, mixture.SMALL - 1, mixture.SMALL):
        order = mixture.Order(("x",), (length,), (1.0,), seed=3)
        first, second = ([order[e * length + i][1] for i in range(length)] for e in (0, 1))
        assert sorted(first) == sorted(second) == list(range(length))
        assert length < 3 or first != second


def test_the_order_is_the_same_for_ever():
    """Runs resume by it: if this changes, a run that is under way reads other rows when it resumes."""
    order = mixture.Order(("small", "large"), (9, 10_000), (1.0, 2.0), seed=3)
    expected = [(0, 7), (1, 8372), (1, 8158), (0, 1), (1, 8058), (1, 154)]
    assert [order[n] for n in range(6)] == expected


def test_a_small_source_is_quick_to_shuffle():
    """grain takes 18 ms a row where there are seven: 16 times as long as this test may, at least."""
    order = mixture.Order(("x",), (7,), (1.0,), seed=3)
    start = time.process_time()
    for n in range(1000):
        order[n]
    assert time.process_time() - start < 1


def test_the_fingerprint_is_of_the_order(two_sources, monkeypatch):
    data, prepared = two_sources
    before = mixture.fingerprint(data, prepared)
    assert mixture.fingerprint(data, prepared) == before
    assert mixture.fingerprint(dataclasses.replace(data, seed=9), prepared) != before
    monkeypatch.setattr(mixture, "SMALL", 0)
    assert mixture.fingerprint(data, prepared) != before, "shuffled in another way"


def test_the_order_depends_on_seed_and_position_alone():
    order = mixture.Order(NAMES, LENGTHS, WEIGHTS, seed=3)
    forward = [order[n] for n in range(60)]
    again = mixture.Order(NAMES, LENGTHS, WEIGHTS, seed=3)
    assert [again[n] for n in reversed(range(60))] == forward[::-1]
    other = mixture.Order(NAMES, LENGTHS, WEIGHTS, seed=4)
    assert [other[n] for n in range(60)] != forward
    assert order[10**12][0] in (0, 1, 2)


def test_sources_have_orders_of_their_own_and_keep_them_beside_others():
    def rows_of(order, source, count):
        picks = (order[n] for n in range(400))
        return [row for s, row in picks if s == source][:count]

    both = mixture.Order(("x", "y"), (40, 40), (1.0, 1.0), seed=7)
    assert rows_of(both, 0, 40) != rows_of(both, 1, 40)
    three = mixture.Order(("w", "x", "y"), (9, 40, 40), (1.0, 2.0, 1.0), seed=7)
    assert rows_of(three, 1, 80) == rows_of(both, 0, 80)


def test_epochs_are_rows_read_over_rows_there_are(two_sources):
    data, prepared = two_sources
    order = mixture.order_of(data, prepared)
    for rows in (1, 7, 40, 333):
        seen = collections.Counter(order[n][0] for n in range(rows))
        for source, corpus in enumerate(prepared.sources):
            share = seen[source] / len(corpus.store.train)
            got = mixture.epochs(prepared, rows)[corpus.name]
            assert got == pytest.approx(share, abs=1 / len(corpus.store.train))


def test_validation_takes_equally_and_gives_what_is_left_to_others(two_sources):
    _, prepared = two_sources
    long, short = (len(corpus.store.validation) for corpus in prepared.sources)
    assert long > 2 * short > 4

    def taken(rows):
        picks = mixture.validation_picks(prepared, rows)
        assert picks == sorted(set(picks))
        return [sum(source == s for s, _ in picks) for source in (0, 1)]

    assert taken(1) == [1, 0]
    assert taken(4) == [2, 2]
    assert taken(5) == [3, 2]
    assert taken(2 * short + 3) == [short + 3, short]
    assert taken(10**9) == [long, short]


def test_validation_is_spread_evenly_over_each_source(two_sources):
    """Not its first rows: they would be those of the first file."""
    _, prepared = two_sources
    for corpus_rows, number in (
        (len(c.store.validation), n) for n, c in enumerate(prepared.sources)
    ):
        own = [row for source, row in mixture.validation_picks(prepared, 8) if source == number]
        assert own == [i * corpus_rows // 4 for i in range(4)]
    long = len(prepared.sources[0].store.validation)
    own = [row for source, row in mixture.validation_picks(prepared, 12, 3) if source == 0]
    assert own == [0, 1, 2, *(long // 3 // 2 * 3 + i for i in range(3))]


def test_blocks_are_as_many_of_each_source_or_the_source_is_named(two_sources):
    _, prepared = two_sources
    short = len(prepared.sources[1].store.validation)
    block, fit = 2, short // 2 * 2
    tokens = mixture.validation_blocks(prepared, 2 * fit, block)
    expected = [
        prepared.sources[source].store.validation.read([row])[0][0]
        for source, row in mixture.validation_picks(prepared, 2 * fit, block)
    ]
    np.testing.assert_array_equal(tokens, expected)
    message = (
        rf"{fit + 2} held-out rows of each source are needed, in blocks of 2, and data.sources.short "
        rf"has {fit}; nearest: {2 * fit}, or raise data.validation_fraction"
    )
    with pytest.raises(ValueError, match=message):
        mixture.validation_blocks(prepared, 2 * fit + 4, block)
