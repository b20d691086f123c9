"""What a difference between two cells is worth, from a few seeds and many rows of evaluation.

Losses come as [seeds, rows], a row here being a block of text: blocks must be independent, which neighbouring
lines of one file are not. Of two cells, run with the same seeds and scored on the same rows, the
differences of each (seed, row) are paired. Seeds and rows are drawn anew, each by itself (a crossed
bootstrap, Owen 2007, arXiv:0708.1070), and the interval uses Student's t: three seeds say little about how
seeds vary. Its degrees of freedom are Satterthwaite's (1946, doi:10.2307/3002019): seeds - 1 where seeds make
the error, many where rows do.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

DRAWS = 4000


class Estimate(NamedTuple):
    """low to high: the 95% interval, NaN with one seed, which says nothing about others."""

    mean: float
    low: float
    high: float
    p: float  # of a mean of 0 or farther from it, two-sided


def estimate(values_SR: np.ndarray) -> Estimate:
    """Of the mean over seeds and rows, each drawn from many."""
    seeds = values_SR.shape[0]
    mean = float(values_SR.mean())
    if seeds == 1:
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = standard_error(values_SR)
    if not error:
        return Estimate(mean, mean, mean, float(mean == 0))
    freedom = degrees_of_freedom(values_SR, error)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Estimate(mean, mean - reach, mean + reach, float(p))


def degrees_of_freedom(values_SR: np.ndarray, error: float) -> float:
    """Of the standard error `error`, whose square is that of the seeds and, the rest of it, of the rows."""
    seeds, rows = values_SR.shape
    of_seeds = min(float(np.var(values_SR.mean(1), ddof=1)) / seeds, error**2)
    of_rows = error**2 - of_seeds
    return error**4 / (of_seeds**2 / (seeds - 1) + of_rows**2 / max(rows - 1, 1))


def standard_error(values_SR: np.ndarray) -> float:
    """Of the mean, by DRAWS of seeds and rows with replacement; the same at every call.

    Drawing from n seeds shows (n - 1) / n of their variance: their weights are spread by sqrt(n / (n - 1))
    (Rao and Wu 1988, doi:10.1080/01621459.1988.10478591).
    """
    seeds, rows = values_SR.shape
    draws = np.random.default_rng(0)
    of_seeds = draws.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    of_seeds = 1 + (of_seeds - 1) * math.sqrt(seeds / (seeds - 1))
    centred = values_SR - values_SR.mean()
    sums = of_seeds @ centred / seeds
    means = [draws.multinomial(rows, np.full(rows, 1 / rows)) @ row / rows for row in sums]
    return float(np.std(means))


def holm(p: list[float]) -> list[float]:
    """p values adjusted so that among all of them one false alarm is as rare as p says (Holm 1979).

    NaN is a comparison that is yet to come: it counts.
    """
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(p) - rank)))
        adjusted[i] = highest
    return adjusted
