"""Loss as a function of parameters N and tokens D: L = E + A / N^alpha + B / D^beta.

The form, and how it is fitted, are Hoffmann et al.'s (arXiv:2203.15556 section 3.3 and appendix D.3): the
Huber loss of log L is minimised from a grid of starts. Training takes 6 N D FLOPs.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

HUBER = 1e-3
STARTS = {  # of log E, log A, log B, alpha, beta; a coarser grid than the paper's 4,500
    "e": (-1.0, 0.0, 1.0),
    "a": (0.0, 8.0, 16.0),
    "b": (0.0, 8.0, 16.0),
    "alpha": (0.2, 0.8),
    "beta": (0.2, 0.8),
}
FLOPS = 6  # a parameter and token
# Of log E, log A, log B, alpha, beta. Beyond them a term is nothing, or a constant over all sizes.
BOUNDS = ((-30, 30), (-30, 60), (-30, 60), (0.01, 3), (0.01, 3))


class Law(NamedTuple):
    """Nats a token; N counts parameters, D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: ArrayLike, D: ArrayLike) -> Any:
        return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)

    def best(self, flops: float) -> tuple[float, float]:
        """N and D of the lowest loss at 6 N D = flops (eq. 4).

        ValueError if the law has no such split: a term that is nothing, or does not fall.
        """
        ways = {"A": self.A, "B": self.B, "alpha": self.alpha, "beta": self.beta}
        if bad := [f"{name}={value:.3g}" for name, value in ways.items() if not value > 0]:
            raise ValueError(f"a law with {', '.join(bad)} has no best size at given FLOPs")
        both, log_ND = self.alpha + self.beta, math.log(flops / FLOPS)
        ratio = math.log(self.alpha / self.beta) + math.log(self.A) - math.log(self.B)
        log_N = (ratio + self.beta * log_ND) / both
        if not 0 <= log_N <= log_ND:
            raise ValueError(
                f"at {flops:.3g} FLOPs the law's best size is below one parameter or one token: one of its "
                "two terms is nothing beside the other"
            )
        return math.exp(log_N), math.exp(log_ND - log_N)

    def has_best(self, flops: float) -> bool:
        try:
            self.best(flops)
        except ValueError:
            return False
        return True


# What Hoffmann et al. fitted (eq. 10 of arXiv:2203.15556), and what their data give when fitted again
# (arXiv:2404.10102).
CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)
CHINCHILLA_AGAIN = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def fit(N: np.ndarray, D: np.ndarray, losses: np.ndarray) -> Law:
    """ValueError if there are too few runs, or if they do not spread over N and D."""
    check(N, D, losses)
    return _minimum(np.log(N), np.log(D), np.log(losses), _starts())


def bootstrap(
    N: np.ndarray, D: np.ndarray, losses: np.ndarray, law: Law, draws: int, seed: int = 0
) -> list[Law]:
    """Laws of runs drawn with replacement; for the percentiles of whatever follows from a law.

    None of five different runs: every sample that five coefficients can be fitted to is those five.
    """
    if len(set(zip(N, D, strict=True))) == 5:
        return []
    random, found = np.random.default_rng(seed), []
    own = np.array([*np.log(np.maximum(law[:3], 1e-30)), law.alpha, law.beta])
    starts = [own, *_starts()[:: len(_starts()) // 4]]  # a few more: else draws stay near the law
    while len(found) < draws:
        drawn = random.integers(0, len(N), len(N))
        with contextlib.suppress(ValueError):
            check(*(x[drawn] for x in (N, D, losses)))
            logs = (np.log(x[drawn]) for x in (N, D, losses))
            found.append(_minimum(*logs, starts=starts))
    return found


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95%, by percentiles."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def check(N: np.ndarray, D: np.ndarray, losses: np.ndarray) -> None:
    """ValueError unless five coefficients can be told apart: E from A and alpha needs three sizes."""
    distinct = len(set(zip(N, D, strict=True)))
    if distinct < 5:
        raise ValueError(
            f"{distinct} runs that differ in parameters or tokens are too few for five coefficients; "
            "5 are the fewest"
        )
    for name, values in (("parameters", N), ("tokens", D)):
        if len(np.unique(values)) < 3:
            raise ValueError(
                f"all runs have {' or '.join(f'{value:,.0f}' for value in np.unique(values))} {name}: it "
                "takes three different ones"
            )
    if not np.all(np.isfinite(losses) & (losses > 0)):
        raise ValueError(f"losses must be positive and finite: {losses.tolist()}")


def plan(law: Law, flops: float, points: int = 5, spread: float = 4.0) -> list[tuple[float, float]]:
    """(N, D) at equal FLOPs, N from 1/spread to spread times the best: an iso-FLOP curve to run."""
    N, _ = law.best(flops)
    sizes = N * np.geomspace(1 / spread, spread, points)
    return [(float(n), float(flops / FLOPS / n)) for n in sizes]


def _starts() -> list[np.ndarray]:
    return [np.array(start) for start in itertools.product(*STARTS.values())]


def _minimum(log_N, log_D, log_loss, starts) -> Law:
    def terms(x):
        e, a, b, alpha, beta = x
        return np.stack([np.full_like(log_N, e), a - alpha * log_N, b - beta * log_D])

    def objective(x):
        """Value and gradient of the sum of Huber losses of log-sum-exp less log L."""
        parts = terms(x)
        highest = parts.max(0)
        sums = np.exp(parts - highest)
        error = highest + np.log(sums.sum(0)) - log_loss
        value = np.where(abs(error) <= HUBER, error**2 / 2, HUBER * (abs(error) - HUBER / 2)).sum()
        slope = np.clip(error, -HUBER, HUBER) * (sums / sums.sum(0))
        return value, np.array(
            [slope[0].sum(), slope[1].sum(), slope[2].sum(), -slope[1] @ log_N, -slope[2] @ log_D]
        )

    # Huber losses are tiny: scaled, or the optimiser stops at once.
    scaled = lambda x: tuple(part * 1e6 for part in objective(x))  # noqa: E731
    options = dict(maxiter=2000, ftol=1e-14, gtol=1e-9)
    found = [
        optimize.minimize(scaled, x, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=options)
        for x in starts
    ]
    e, a, b, alpha, beta = min(found, key=lambda one: one.fun).x
    return Law(math.exp(e), math.exp(a), math.exp(b), float(alpha), float(beta))
