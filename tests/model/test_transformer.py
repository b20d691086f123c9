import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.model import transformer
from llama_jax.model.context import Segments
from llama_jax.model.position import frequencies
from tests import oracle, parameters

B, T = 2, 7
LLAMA3 = config.Rope(theta=5e5, factor=32.0, original_length=64)


def network(model, layout, scale=8.0):
    """A network whose random weights are large enough for every part to matter."""
    module = transformer.build(model, layout)

    def stronger(leaf):
        wave = 0.1 * np.sin(np.arange(leaf.size)).reshape(leaf.shape)
        return leaf * scale if leaf.ndim > 2 else leaf + wave

    return module, parameters.drawn(module, stronger)


def tokens_and_places(model, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (B, T))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [90, 91, 92, 93, 94, 95, 96]])
    return tokens, positions, segments


def expected_logits(model, params, tokens, positions, segments):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    turns = frequencies(model.head_dim, model.rope)
    rows = zip(tokens, positions, segments, strict=True)
    return np.stack([oracle.forward(params, *row, model.norm_eps, turns) for row in rows])


VARIANTS = {
    "llama1": {},
    "multi-query": dict(kv_heads=1),
    "multi-head": dict(kv_heads=6),
    "llama3": dict(rope=LLAMA3, norm_eps=1e-5),
    "tied": dict(output="tied"),
    "reference kernel": dict(kernel="reference"),
    "two layers a group": dict(pattern=("self", "self"), layers=4),
}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "two layers a group"])
def test_logits_are_the_papers(variant, model, layout):
    model = dataclasses.replace(model, **VARIANTS[variant])
    module, params = network(model, layout)
    tokens, positions, segments = tokens_and_places(model)
    ours = transformer.logits(
        module.apply({"params": params}, tokens, positions, Segments(segments))
    )
    expected = expected_logits(model, params, tokens, positions, segments)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def test_a_pattern_of_two_is_the_same_network_as_twice_one(model, layout):
    twice = dataclasses.replace(model, pattern=("self", "self"))
    module, params = network(model, layout)
    pair = transformer.build(twice, layout)
    stacked = params["groups"]["self_0"]
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i : i + 1], stacked)
    renamed = {**params, "groups": {"self_0": pick(0), "self_1": pick(1)}}
    tokens, positions, _ = tokens_and_places(model)
    one = transformer.logits(module.apply({"params": params}, tokens, positions))
    two = transformer.logits(pair.apply({"params": renamed}, tokens, positions))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_gradient_is_the_slope_of_the_float64_oracle(model, layout):
    """By central differences of the NumPy network, in random directions uphill."""
    module, params = network(model, layout)
    tokens, positions, segments = tokens_and_places(model)
    weight = np.random.default_rng(5).normal(size=(B, T, model.vocab_size))

    def ours(params):
        hidden = module.apply({"params": params}, tokens, positions, Segments(segments))
        return jnp.sum(transformer.logits(hidden) * weight)

    gradient = jax.grad(ours)(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        # Along the gradient, each entry at a length of its own: nothing cancels that float32 has rounded.
        direction = jax.tree.map(
            lambda leaf: leaf.astype(np.float64) / leaf.std() * rng.uniform(size=leaf.shape),  # noqa: B023
            jax.tree.map(np.asarray, gradient),
        )
        step = 1e-6

        def at(sign):
            moved = jax.tree.map(
                lambda p, d: np.asarray(p, np.float64) + sign * step * d,  # noqa: B023
                params,
                direction,  # noqa: B023
            )
            return np.sum(expected_logits(model, moved, tokens, positions, segments) * weight)

        slope = (at(1) - at(-1)) / (2 * step)
        ours_slope = sum(
            np.vdot(np.asarray(g, np.float64), d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        assert ours_slope == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    "change", [dict(remat=r) for r in transformer.REMAT if r != "none"] + [dict(unroll=2)]
)
def test_how_it_is_computed_does_not_change_the_gradient(change, model, layout):
    _, params = network(model, layout)
    tokens, positions, _ = tokens_and_places(model)

    def gradient(model):
        module = transformer.build(model, layout)
        loss = lambda p: jnp.sum(
            jnp.sin(transformer.logits(module.apply({"params": p}, tokens, positions)))
        )
        return jax.jit(jax.grad(loss))(params)

    expected, ours = gradient(model), gradient(dataclasses.replace(model, **change))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_bfloat16_stays_near_float32(model, layout):
    """Tolerance 5% of the largest logit: 8 bits of mantissa through 2 layers of large weights."""
    module, params = network(model, layout)
    half = transformer.build(dataclasses.replace(model, compute_dtype="bfloat16"), layout)
    tokens, positions, _ = tokens_and_places(model)
    exact = transformer.logits(module.apply({"params": params}, tokens, positions))
    ours = transformer.logits(half.apply({"params": params}, tokens, positions))
    assert ours.dtype == jnp.float32
    difference = np.abs(ours - exact).max() / np.abs(exact).max()
    assert 1e-4 < difference < 0.05


@pytest.mark.parametrize("field", ["norm", "position", "ffn", "kernel", "remat"])
def test_an_unknown_choice_names_the_nearest(field, model, layout):
    wrong = dataclasses.replace(model, **{field: getattr(model, field) + "s"})
    with pytest.raises(
        ValueError,
        match=rf"model\.{field}='.*s' is not one of .*; nearest: '{getattr(model, field)}'",
    ):
        transformer.build(wrong, layout)


def test_initial_values_have_the_configured_spread(model, layout):
    module = transformer.build(dataclasses.replace(model, dim=240, init_std=0.07), layout)
    params = jax.jit(transformer.init, static_argnums=0)(module, jax.random.key(3))
    assert float(jnp.std(params["embed"])) == pytest.approx(0.07, rel=0.05)
    assert float(jnp.std(params["groups"]["self_0"]["ffn"]["up"])) == pytest.approx(0.07, rel=0.05)
    first, second = params["groups"]["self_0"]["ffn"]["up"]
    assert not np.allclose(first, second), "layers must start different"
    np.testing.assert_array_equal(params["norm"]["scale"], 1)


@pytest.mark.parametrize("how", ["borrowed", "deleted"])
def test_unstacked_parameters_are_those_of_each_layer(model, layout, how):
    """In the compute dtype; what they were made from is deleted where the function's name says so."""
    model = dataclasses.replace(model, compute_dtype="bfloat16")
    module, params = network(model, layout)
    wanted = jax.tree.map(lambda w: np.asarray(w.astype("bfloat16")), params)
    if how == "borrowed":
        made = transformer.unstack(module, params)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    else:
        made = transformer.unstack_and_delete(module, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["groups"]))
    groups = wanted.pop("groups")
    of_layer = lambda i: jax.tree.map(lambda w: w[i], groups)
    wanted |= {f"group_{i}": of_layer(i) for i in range(2)}
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
