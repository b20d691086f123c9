"""Each choice of each slot against its paper's formula in float64, on meshes, and in training."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.data.batch import Batch
from llama_jax.model import transformer
from llama_jax.model.context import Segments
from llama_jax.train import loss
from tests import parameters, variants

BASE = config.Model(
    vocab_size=44, dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=20, norm_eps=1e-3,
    compute_dtype="float32",
)  # fmt: skip
ROPE = dict(factor=4.0, original_length=16)
VARIANTS = {
    "linear": dict(rope=config.Rope(factor=4.0, scaling="linear")),
    "ntk": dict(rope=config.Rope(factor=4.0, scaling="ntk")),
    "llama3": dict(rope=config.Rope(**ROPE)),
    "yarn": dict(rope=config.Rope(**ROPE, scaling="yarn", high_freq_factor=32.0)),
    "partial rope": dict(rope=config.Rope(rotary_dim=4)),
    "learned": dict(position="learned", max_positions=100),
    "sinusoidal": dict(position="sinusoidal", init_std=0.5),
    "alibi": dict(position="alibi"),
    "t5": dict(position="t5"),
    "none": dict(position="none"),
    **{name: dict(ffn=name) for name in ("swiglu", "geglu", "reglu", "gelu", "relu", "relu2")},
    "layer": dict(norm="layer"),
    "plain": dict(norm="plain"),
    **{name: dict(placement=name) for name in ("post", "sandwich", "peri", "parallel")},
    "post, plain": dict(placement="post", norm="plain"),
    # At init_std=0.02, rounding the parameters to float32 alone moves logits by 0.8 of the tolerance.
    "qk rms": dict(qk_norm="rms", init_std=0.016),
    "qk layer": dict(qk_norm="layer", init_std=0.016),
    "window": dict(window=3),
    "softcap": dict(softcap=1.5),
    "all of attention's": dict(window=5, softcap=2.0, position="t5", qk_norm="plain"),
    "bias qkv": dict(bias="qkv"),
    "bias all": dict(bias="all", ffn="relu"),
    "bias all, gated": dict(bias="all"),
    "tied": dict(output="tied"),
    "multi-query": dict(kv_heads=1),
    "depth scaled": dict(init="depth_scaled"),
    "mup": dict(init="mup", mup_base_dim=8),
}
B, T = 2, 40
SEGMENTS = np.array([[1] * 15 + [2] * 25, [1] * 40])
POSITIONS = np.array([[*range(15), *range(25)], range(40)])


def network(model, layout):
    """Parameters large enough for every part to matter, biases and scales included."""
    module = transformer.build(model, layout)

    def stronger(leaf):
        places = np.arange(leaf.size).reshape(leaf.shape)
        return (
            leaf * 5 + 0.05 * np.sin(7 * places) if leaf.ndim > 1 else leaf + 0.1 * np.cos(places)
        )

    return module, parameters.drawn(module, stronger)


def batch(model):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, model.vocab_size, (2, B, T))
    return Batch(tokens, targets, np.ones((B, T), np.float32), POSITIONS, SEGMENTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_papers(name, layout, monkeypatch):
    """Within 2e-5 of the largest; what attention does, in blocks, of which the second has keys before it."""
    monkeypatch.setattr("llama_jax.model.kernels.BLOCK", 24)
    in_blocks = name in ("alibi", "t5", "window", "softcap", "all of attention's", "multi-query")
    kernel = "blockwise" if in_blocks else "reference"
    model = dataclasses.replace(BASE, kernel=kernel, **VARIANTS[name])
    module, params = network(model, layout)
    tokens = batch(model).tokens_BT
    segments = Segments(SEGMENTS)
    apply = jax.jit(lambda params: module.apply({"params": params}, tokens, POSITIONS, segments))
    hidden = apply(params)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for b in range(B):
        expected = variants.logits(model, params, tokens[b], POSITIONS[b], SEGMENTS[b])
        ours = transformer.logits(hidden)[b]
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def loss_and_gradient(model, layout, remat="none"):
    module, params = network(dataclasses.replace(model, remat=remat), layout)
    objective = loss.next_token(module).sums

    @jax.jit
    def compute(params, batch):
        sums, gradient = jax.value_and_grad(lambda p: objective(p, {}, batch).total)(params)
        return sums, gradient

    rows = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch(model))
    total, gradient = compute(params, rows)
    return float(total), jax.tree.map(np.asarray, gradient)


# Several choices at once: each has parameters, arrays over heads or places of its own.
TOGETHER = {
    "t5, sandwich, layer, biases": dict(
        position="t5", placement="sandwich", norm="layer", bias="all", ffn="relu2", softcap=2.0
    ),
    "alibi, post, window, qk-norm": dict(
        position="alibi", placement="post", window=5, qk_norm="rms", ffn="geglu", bias="qkv"
    ),
    "learned, peri, plain, mup": dict(
        position="learned", max_positions=100, placement="peri", norm="plain", init="mup",
        mup_base_dim=8, ffn="gelu",
    ),
    "sinusoidal, parallel": dict(position="sinusoidal", placement="parallel", ffn="reglu"),
}  # fmt: skip
MESHES = {
    "fsdp 4 x tensor 2": dict(fsdp=4, tensor=2),
    "all": dict(data=2, fsdp=1, context=2, tensor=2),
}


# One of them on one mesh; the others in make test-slow.
PLACED = [(name, mesh) for name in TOGETHER for mesh in MESHES]
FIRST = ("t5, sandwich, layer, biases", "all")


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param(*one, marks=[] if one == FIRST else pytest.mark.slow) for one in PLACED],
)
def test_meshes_have_the_numbers_of_one_device(name, mesh, layout):
    model = dataclasses.replace(BASE, **TOGETHER[name])
    one, gradient = loss_and_gradient(model, layout)
    wide = sharding.make(config.Mesh(**MESHES[mesh]), jax.devices())
    many, other = loss_and_gradient(model, wide, remat="full")
    assert many == pytest.approx(one, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "name", [pytest.param("alibi", marks=pytest.mark.slow), "all of attention's"]
)
def test_blockwise_has_the_gradient_of_autodiff(name, layout, monkeypatch):
    """Every parameter's; of the table of T5, too, through the blocks."""
    monkeypatch.setattr("llama_jax.model.kernels.BLOCK", 16)
    model = dataclasses.replace(BASE, **VARIANTS[name])
    total, gradient = loss_and_gradient(dataclasses.replace(model, kernel="reference"), layout)
    ours, our_gradient = loss_and_gradient(model, layout)
    assert ours == pytest.approx(total, rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(our_gradient), strict=True):
        assert np.abs(a).max() > 0, "every parameter matters"
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
