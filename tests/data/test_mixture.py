import collections

import numpy as np
import pytest

from llama_jax.data import mixture

NAMES, LENGTHS, WEIGHTS = ("a", "b", "c"), (50, 70, 2000), (67.0, 15.0, 18.0)


def test_tokens_come_in_exact_proportion_and_so_does_every_prefix():
    order = mixture.order(NAMES, LENGTHS, WEIGHTS, seed=3)
    counts = collections.Counter()
    for n in range(1000):
        counts[order[n][0]] += 1
        for source, weight in enumerate(WEIGHTS):
            assert abs(counts[source] - (n + 1) * weight / 100) < 2
    assert [counts[source] for source in range(3)] == [670, 150, 180]


def test_proportions_that_are_no_hundredths_are_exact_too():
    """grain's own mix gives 6997 to 3003: it truncates 7/3 to 2.33."""
    order = mixture.order(("a", "b"), (9000, 9000), (0.7, 0.3), seed=1)
    assert sum(order[n][0] == 0 for n in range(10_000)) == 7000
    llama = (67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0)
    order = mixture.order("abcdefg", (9000,) * 7, llama, seed=1)
    counts = collections.Counter(order[n][0] for n in range(200))
    assert [counts[source] for source in range(7)] == [134, 30, 9, 9, 9, 5, 4]


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    order = mixture.order(NAMES, LENGTHS, WEIGHTS, seed=3)
    rows = collections.defaultdict(list)
    for n in range(1000):
        source, row = order[n]
        rows[source].append(row)
    first, second = rows[0][:50], rows[0][50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))
    assert len(set(rows[2])) == 180


def test_the_order_depends_on_seed_and_position_alone():
    order = mixture.order(NAMES, LENGTHS, WEIGHTS, seed=3)
    forward = [order[n] for n in range(60)]
    again = mixture.order(NAMES, LENGTHS, WEIGHTS, seed=3)
    assert [again[n] for n in reversed(range(60))] == forward[::-1]
    other = mixture.order(NAMES, LENGTHS, WEIGHTS, seed=4)
    assert [other[n] for n in range(60)] != forward
    assert order[10**12][0] in (0, 1, 2)


def test_sources_have_orders_of_their_own_and_keep_them_beside_others():
    def rows_of(order, source, count):
        picks = (order[n] for n in range(400))
        return [row for s, row in picks if s == source][:count]

    both = mixture.order(("x", "y"), (40, 40), (1.0, 1.0), seed=7)
    assert rows_of(both, 0, 40) != rows_of(both, 1, 40)
    three = mixture.order(("w", "x", "y"), (9, 40, 40), (1.0, 2.0, 1.0), seed=7)
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
