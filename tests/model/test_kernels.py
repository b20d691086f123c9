import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from llama_jax import config, sharding
from llama_jax.model import kernels, mask, transformer
from llama_jax.model.context import OneSegment, Segments
from tests import oracle

B, T, N, K, H = 2, 7, 6, 3, 4


def inputs(length=T, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, heads, length, H)).astype(np.float32) for heads in (N, K, K)]


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3, 3]])


ON_CPU = ("reference", "blockwise")


@pytest.mark.parametrize("segments", [OneSegment(), Segments(SEGMENTS)])
@pytest.mark.parametrize("kernel", ON_CPU)
def test_kernels_are_the_formula(kernel, segments, layout):
    q, k, v = inputs()
    ours = kernels.KERNELS[kernel](q, k, v, segments, layout)
    for b in range(B):
        own = segments.segments_BT[b] if isinstance(segments, Segments) else np.ones(T)
        in_order = (x[b].astype(np.float64).transpose(1, 0, 2) for x in (q, k, v))
        expected = oracle.attention(*in_order, own)
        np.testing.assert_allclose(ours[b].transpose(1, 0, 2), expected, rtol=2e-5, atol=2e-6)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash as Pallas interprets it; on a TPU it is compiled."""
    made = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", made)


def same_numbers(kernel, expected, qkv, weight) -> float:
    """Forward and gradient of a weighted sum, which is returned."""

    def weighted(attend):
        total = lambda *qkv: jnp.sum(attend(*qkv) * weight)
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*qkv)

    (ours, our_gradient), (value, gradient) = weighted(kernel), weighted(expected)
    assert float(ours) == pytest.approx(float(value), rel=1e-4)
    for a, b in zip(our_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    return float(value)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.usefixtures("interpreted")
def test_splash_has_the_numbers_of_the_reference(devices, count, layout):
    length, heads = 256, 4
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        rng.normal(size=(2, n, length, 128)).astype(np.float32) for n in (heads, 2, 2, heads)
    )
    segments = OneSegment()
    if count == 2:
        segments_BT = np.repeat([[1], [1]], length, 1).astype(np.int32)
        segments_BT[0, 100:], segments_BT[1, 200:] = 2, 0
        segments = Segments(segments_BT)
    many = sharding.make(config.Mesh(fsdp=2, tensor=2), jax.devices()[:4])
    wide = layout if devices == 1 else many

    same_numbers(
        lambda *qkv: kernels.splash(*qkv, segments, wide),
        lambda *qkv: kernels.reference(*qkv, segments, layout),
        (q, k, v),
        weight,
    )


@pytest.mark.usefixtures("interpreted")
def test_splash_caps_scores_as_the_reference(layout):
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(1, 2, 128, 128)).astype(np.float32) for _ in range(4))
    q, capped = 4 * q, kernels.ScoreRule(softcap=0.5)

    value = same_numbers(
        lambda *qkv: kernels.splash(*qkv, OneSegment(), layout, capped),
        lambda *qkv: kernels.reference(*qkv, OneSegment(), layout, capped),
        (q, k, v),
        weight,
    )
    uncapped = float(jnp.sum(kernels.reference(q, k, v, OneSegment(), layout) * weight))
    assert abs(uncapped - value) > 1e-2 * abs(value)


@pytest.mark.parametrize(
    ("kernel", "changed", "what"),
    [
        ("splash", dict(position="alibi"), "model.position='alibi'"),
        ("splash", dict(position="t5"), "model.position='t5'"),
        ("splash", dict(window=4), "model.window=4"),
        ("cudnn", dict(softcap=30.0), "model.softcap=30.0"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_when_the_network_is_built(
    kernel, changed, what, layout
):
    model = config.Model(kernel=kernel, **changed)
    with pytest.raises(ValueError, match=f"model.kernel='{kernel}' cannot do {re.escape(what)}"):
        transformer.build(model, layout)
    transformer.build(dataclasses.replace(model, kernel="blockwise"), layout)


def test_long_rows_have_the_numbers_of_short_ones(layout, monkeypatch):
    """Blocks that wait for each other compute what they do when they need not."""
    q, k, v = inputs(length=300)

    def gradient():
        loss = lambda *qkv: jnp.sum(kernels.blockwise(*qkv, OneSegment(), layout) ** 2)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    free = gradient()
    monkeypatch.setattr(kernels, "IN_ORDER_FROM", 128)
    for a, b in zip(free, gradient(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# bfloat16 has 8 bits: a result is off by half of 2^-8 of itself; sums of products of rounded weights, and what
# is summed again for a gradient, by a few of those. The reference's gradient is autodiff's, which rounds the
# cotangents of the square, too.
BFLOAT16 = {"reference": 2**-4, "blockwise": 2**-6, "splash": 2**-6}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", BFLOAT16)
def test_bfloat16_is_near_float32(kernel, layout):
    length, width = 256, 128
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(2, n, length, width)) for n in (4, 2, 2, 4))
    q = q / np.sqrt(width) * 4  # logits of a spread of 4: attention that has something to attend to

    def of(name, dtype):
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        attend = lambda *qkv: kernels.KERNELS[name](*qkv, OneSegment(), layout)
        objective = lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) * weight)
        out, gradient = jax.jit(attend)(*arrays), jax.jit(jax.grad(objective, (0, 1, 2)))(*arrays)
        return [np.asarray(x, np.float64) for x in (out, *gradient)]

    exact = of("reference", jnp.float32)
    rounded = of(kernel, jnp.bfloat16)
    for i, (ours, expected) in enumerate(zip(rounded, exact, strict=True)):
        bound = (BFLOAT16[kernel] if i else 2**-7) * np.abs(expected).max()
        assert np.abs(ours - expected).max() < bound
        assert np.abs(ours - expected).max() > 0, "it is bfloat16"


def test_splash_refuses_a_length_that_its_blocks_do_not_divide(layout):
    with pytest.raises(ValueError, match=r"data.seq_len=200 to be a multiple of 128; nearest: 256"):
        kernels.splash(*inputs(200), OneSegment(), layout)


@pytest.mark.parametrize("length", [kernels.BLOCK, kernels.BLOCK + 1, 2 * kernels.BLOCK + 37])
def test_blocks_of_any_length_agree_with_the_square_forward_and_backward(length, layout):
    q, k, v = inputs(length)
    segments = np.repeat([[1], [2]], length, 1)
    segments[0, length // 2 :] = 2
    weight = np.random.default_rng(1).normal(size=(B, N, length, H)).astype(np.float32)

    def loss(kernel):
        return lambda *qkv: jnp.sum(kernel(*qkv, Segments(segments), layout) * weight)

    expected = jax.grad(loss(kernels.reference), (0, 1, 2))(q, k, v)
    ours = jax.grad(loss(kernels.blockwise), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_future_tokens_get_no_gradient(kernel, layout):
    q, k, v = (jnp.asarray(x) for x in inputs())
    for t in range(T):
        seen = jax.grad(
            lambda k, t=t: jnp.sum(kernels.KERNELS[kernel](q, k, v, OneSegment(), layout)[:, :, t])
        )(k)
        assert np.abs(seen[:, :, t + 1 :]).max(initial=0) == 0
        if t:
            assert np.abs(seen[:, :, :t]).max() > 0


def test_blockwise_never_makes_the_square(layout):
    length = 4 * kernels.BLOCK
    shapes = [jax.ShapeDtypeStruct((1, heads, length, H), jnp.float32) for heads in (N, K, K)]
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: kernels.blockwise(*x, OneSegment(), layout).sum()))(
        *shapes
    )
    largest = max(
        variable.aval.size
        for equation in _equations(jaxpr.jaxpr)
        for variable in equation.outvars
        if variable.aval.shape
    )
    assert largest <= N * kernels.BLOCK * length < N * length * length


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_attention_agrees_with_a_recorded_torch_result(shared):
    """Not causal: its mask is handed over."""
    z = np.load(shared("numerics/cs336_inputs.npz"))
    expected = np.load(shared("numerics/cs336/test_scaled_dot_product_attention.npz"))["array"]
    q, k, v = (jnp.asarray(z[name])[:, None] for name in "qkv")
    ours = kernels.attend(q, k, v, jnp.asarray(z["mask"]))[:, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite():
    visible = jnp.zeros((1, 2, 3), bool)
    out = kernels.attend(
        jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4)), jnp.ones((1, 1, 3, 4)), visible
    )
    assert np.isfinite(out).all()


def test_mask_is_causal_within_segments():
    visible = mask.causal(2, 5, Segments(jnp.asarray([[1, 1, 2, 2, 1]])))[0]
    expected = [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(visible, np.array(expected, bool))
