import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.decode import sample

LOGITS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
DRAWN = config.Decode(temperature=0.7)


def kept(**settings):
    return np.isfinite(sample.narrowed(LOGITS, dataclasses.replace(DRAWN, **settings)))


def test_top_k_by_sorting():
    for row, is_kept in zip(LOGITS, kept(top_k=7), strict=True):
        assert set(np.flatnonzero(is_kept)) == set(np.argsort(row)[-7:])
    assert kept(top_k=1000).all()


def test_top_p_is_the_smallest_set_of_that_probability():
    """arXiv:1904.09751 section 3.1, in float64, one token at a time."""
    for row, is_kept in zip(LOGITS, kept(top_p=0.6), strict=True):
        p = np.exp(row.astype(float) / 0.7)
        p /= p.sum()
        expected, total = set(), 0.0
        for token in np.argsort(-p):
            if total >= 0.6:
                break
            expected.add(token)
            total += p[token]
        assert set(np.flatnonzero(is_kept)) == expected
    assert (kept(top_p=1e-6).sum(1) == 1).all()


def test_min_p_is_a_share_of_the_likeliest():
    for row, is_kept in zip(LOGITS, kept(min_p=0.1), strict=True):
        p = np.exp((row - row.max()) / 0.7)
        np.testing.assert_array_equal(is_kept, p >= 0.1)


def test_filters_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    theirs = torch.from_numpy(LOGITS)
    for warp in (
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.8),
        processors.MinPLogitsWarper(0.05),
    ):
        theirs = warp(None, theirs)
    settings = dataclasses.replace(DRAWN, top_k=20, top_p=0.8, min_p=0.05)
    np.testing.assert_allclose(sample.narrowed(LOGITS, settings), theirs.numpy(), rtol=1e-6)
    seen = np.random.default_rng(1).integers(0, 40, (5, 9))
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.3)
    expected = penalty(torch.from_numpy(seen), torch.from_numpy(LOGITS.copy()))
    has = np.zeros((5, 40), bool)
    np.put_along_axis(has, seen, True, axis=1)
    np.testing.assert_allclose(sample.penalised(LOGITS, has, 1.3), expected.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 20,000 draws, 12 tokens: below the 99.9th percentile of 11 degrees."""
    logits = jnp.asarray(LOGITS[:1, :12])
    settings = dataclasses.replace(DRAWN, temperature=1.5)
    draws = sample.choose(
        jnp.broadcast_to(logits, (20_000, 12)),
        jax.random.split(jax.random.key(0), 20_000),
        settings,
    )
    p = np.exp(LOGITS[0, :12].astype(float) / 1.5)
    expected = 20_000 * p / p.sum()
    counts = np.bincount(np.asarray(draws), minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3
    assert (sample.choose(logits, None, config.Decode()) == LOGITS[0, :12].argmax()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=1.0, top_p=0.0), "decode.top_p=0.0 must be above 0 and at most 1"),
        (dict(temperature=1.0, min_p=1.0), "decode.min_p=1.0 must be at least 0 and below 1"),
        (dict(temperature=-1.0), "decode.temperature=-1.0 must not be negative"),
        (dict(temperature=1e-39), "decode.temperature=1e-39 must be 0, .* or at least 1e-06"),
        (dict(repetition_penalty=float("inf")), "decode.repetition_penalty=inf must be finite"),
        (
            dict(temperature=1.0, seed=2**64 + 5),
            "decode.seed=18446744073709551621 must be from 0 .* try 5",
        ),
        (dict(top_k=5), "decode.top_k=5 has no effect while decode.temperature=0.0"),
        (dict(samples=2), "decode.samples=2 has no effect while"),
        (dict(stop=("",)), "decode.stop has an empty text"),
        (dict(cache="int4"), "decode.cache='int4' is not one of compute, bfloat16, int8"),
        (dict(repetition_penalty=0.0), "decode.repetition_penalty=0.0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config.Decode(**settings)
