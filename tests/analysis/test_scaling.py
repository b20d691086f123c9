import numpy as np
import pytest

from llama_jax.analysis import scaling
from llama_jax.analysis.scaling import CHINCHILLA, CHINCHILLA_AGAIN, Law


def runs(law, noise=0.0, seed=0):
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(4e7, 1e10, 7), np.geomspace(1e9, 3e11, 7)))
    return N, D, law.loss(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=N.size))


@pytest.mark.parametrize("law", [CHINCHILLA, CHINCHILLA_AGAIN, Law(0.8, 60.0, 900.0, 0.25, 0.41)])
def test_known_coefficients_come_back(law):
    found = scaling.fit(*runs(law))
    np.testing.assert_allclose(found, law, rtol=0.02)


@pytest.mark.slow
def test_intervals_of_noisy_runs_hold_the_truth():
    """Of eight sets of runs with 0.3% of noise, at least seven; of a loss within what was run, and beta."""
    held = {"loss": 0, "beta": 0}
    for seed in range(8):
        N, D, losses = runs(CHINCHILLA, noise=0.003, seed=seed)
        laws = scaling.bootstrap(N, D, losses, scaling.fit(N, D, losses), draws=60)
        low, high = scaling.interval([law.loss(5e9, 1e11) for law in laws])
        assert high - low < 0.02
        held["loss"] += low < CHINCHILLA.loss(5e9, 1e11) < high
        low, high = scaling.interval([law.beta for law in laws])
        held["beta"] += low < CHINCHILLA.beta < high
    assert min(held.values()) >= 7, held


def test_chinchillas_published_fit():
    """arXiv:2203.15556 section 3.4: at Gopher's 5.76e23 FLOPs the third approach says 40 billion parameters;
    arXiv:2404.10102 section 4: fitted again, about 20 tokens a parameter, as the other two approaches."""
    N, D = CHINCHILLA.best(5.76e23)
    assert pytest.approx(40e9, rel=0.2) == N
    assert pytest.approx(5.76e23) == 6 * N * D
    N, D = CHINCHILLA_AGAIN.best(5.76e23)
    assert 15 < D / N < 25


def test_the_best_split_is_the_lowest_of_an_iso_flop_curve():
    N, D = CHINCHILLA.best(1e21)
    sizes = N * np.geomspace(0.2, 5, 801)
    losses = CHINCHILLA.loss(sizes, 1e21 / 6 / sizes)
    assert sizes[np.argmin(losses)] == pytest.approx(N, rel=0.01)
    planned = scaling.plan(CHINCHILLA, 1e21)
    assert len(planned) == 5
    assert planned[2] == pytest.approx((N, D))
    for n, d in planned:
        assert 6 * n * d == pytest.approx(1e21)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (Law(1.8, 0.0, 400.0, 0.3, 0.3), "A=0 has no best size"),
        (Law(1.8, 400.0, 400.0, 0.3, -0.1), "beta=-0.1 has no best size"),
        (Law(1.8, 1e300, 400.0, 1e-3, 0.3), "below one parameter or one token"),
        (Law(1.8, 1e-300, 400.0, 1e-3, 0.3), "below one parameter or one token"),
    ],
)
def test_a_law_without_a_best_size_says_so(law, message):
    with pytest.raises(ValueError, match=message):
        law.best(1e21)
    assert not law.has_best(1e21)


def test_exponents_of_flat_losses_stay_within_bounds():
    """Losses that do not depend on N drive A or alpha to nothing."""
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e8, 3), np.geomspace(1e8, 1e10, 3)))
    found = scaling.fit(N, D, 2 + 300 / D**0.3)
    assert min(found.alpha, found.beta) >= 0.01
    assert found.A > 0
    assert found.loss(N, D) == pytest.approx(2 + 300 / D**0.3, rel=1e-3)


def test_five_runs_have_no_intervals():
    N, D = np.array([1e6, 2e6, 4e6, 8e6, 16e6]), np.array([1e8, 3e8, 9e8, 1e8, 3e8])
    losses = CHINCHILLA.loss(N, D)
    assert scaling.bootstrap(N, D, losses, CHINCHILLA, draws=20) == []


@pytest.mark.parametrize(
    ("N", "D", "losses", "message"),
    [
        ([1e6] * 4, [1e8] * 4, [3.0] * 4, "1 runs that differ .* are too few"),
        ([1e6] * 5, [1e8, 2e8, 3e8, 4e8, 5e8], [3.0] * 5, "all runs have 1,000,000 parameters"),
        ([1e6, 2e6, 3e6, 4e6, 5e6], [1e8] * 5, [3.0] * 5, "all runs have 100,000,000 tokens"),
        ([1e6, 2e6, 3e6, 4e6, 5e6], [1e8, 2e8] * 2 + [1e8], [3.0] * 5, "100,000,000 or 200,000,000 tokens: it takes three"),
        ([1e6, 2e6, 3e6, 4e6, 5e6], [1e8, 2e8] * 2 + [3e8], [3.0] * 4 + [np.nan], "must be positive"),
    ],
)  # fmt: skip
def test_runs_that_give_no_law_are_refused(N, D, losses, message):
    with pytest.raises(ValueError, match=message):
        scaling.fit(*(np.array(x) for x in (N, D, losses)))
