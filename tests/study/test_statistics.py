import math

import numpy as np
import pytest

from llama_jax.study import statistics


def simulated(rng, seeds, rows, of_seed, of_row, of_both, mean=0.0):
    """Effects of seeds, of rows, and of each pair, independent."""
    return (
        mean
        + of_seed * rng.normal(size=(seeds, 1))
        + of_row * rng.normal(size=(1, rows))
        + of_both * rng.normal(size=(seeds, rows))
    )


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_row", "of_both"),
    [
        (3, 0.02, 0.0, 0.1),
        (3, 0.005, 0.3, 0.1),
        pytest.param(3, 0.0, 0.1, 0.5, marks=pytest.mark.slow),
        pytest.param(8, 0.05, 0.1, 0.1, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_truth_nineteen_times_of_twenty(
    seeds, of_seed, of_row, of_both, monkeypatch
):
    """300 studies whose truth is known: 95% of intervals hold it, at least 92% (two errors of sampling)."""
    monkeypatch.setattr(statistics, "DRAWS", 300)
    rng = np.random.default_rng(1)
    held, alarms = 0, 0
    for _ in range(300):
        found = statistics.estimate(simulated(rng, seeds, 150, of_seed, of_row, of_both, mean=0.7))
        held += found.low < 0.7 < found.high
        null = statistics.estimate(simulated(rng, seeds, 150, of_seed, of_row, of_both))
        alarms += null.p < 0.05
    assert held >= 0.92 * 300
    assert alarms <= 0.08 * 300


def test_the_error_is_that_of_seeds_and_of_rows():
    """With effects of seeds alone: their deviation over sqrt(n), and n - 1 degrees of freedom; of rows alone
    as of any sample."""
    rng = np.random.default_rng(0)
    seeds = np.broadcast_to(rng.normal(size=(5, 1)), (5, 300))
    error = statistics.standard_error(seeds)
    assert error == pytest.approx(np.std(seeds[:, 0], ddof=1) / math.sqrt(5), rel=0.05)
    assert statistics.degrees_of_freedom(seeds, error) == pytest.approx(4, rel=0.1)
    rows = np.broadcast_to(rng.normal(size=(1, 300)), (5, 300))
    error = statistics.standard_error(rows)
    assert error == pytest.approx(np.std(rows[0], ddof=1) / math.sqrt(300), rel=0.05)
    assert statistics.degrees_of_freedom(rows, error) > 200


def test_a_difference_is_found_where_pairs_agree_and_not_where_they_do_not():
    rng = np.random.default_rng(0)
    clear = statistics.estimate(simulated(rng, 3, 200, 0.002, 0.02, 0.02, mean=-0.05))
    assert clear.low < -0.05 < clear.high < 0
    assert clear.p < 0.01
    vague = statistics.estimate(simulated(rng, 3, 200, 0.1, 0.02, 0.02, mean=-0.05))
    assert vague.p > 0.05


def test_one_seed_says_nothing_of_others():
    found = statistics.estimate(np.array([[1.0, 2.0, 3.0]]))
    assert found.mean == 2
    assert all(math.isnan(value) for value in found[1:])


def test_holm_by_hand():
    """Holm 1979: the smallest of three by 3, the next by 2, never below the one before."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    with_unknown = statistics.holm([math.nan, 0.02])
    assert math.isnan(with_unknown[0])
    assert with_unknown[1] == 0.04, "the comparison that is yet to come counts"
