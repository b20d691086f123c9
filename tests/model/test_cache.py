"""A text that goes through the network a few tokens at a time has the logits of the whole."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.decode import engine
from llama_jax.model import cache, transformer
from llama_jax.model.context import Cached
from llama_jax.quant.network import quantise
from tests import parameters
from tests.model.test_variants import BASE, VARIANTS
from tests.model.test_variants import network as strong

T = 40
SEQUENCE = np.random.default_rng(0).integers(0, BASE.vocab_size, (3, T))
# From, to, and the shape that they are filled up to: two programs.
PARTS = ((0, 7, 16), (7, 8, 1), (8, 9, 1), (9, 20, 16), (20, 21, 1), (21, 37, 16), (37, 40, 16))


def network(model, layout):
    """Weaker than where the formulas are tested: rounding errors of the two ways grow less."""
    module, params = strong(model, layout)
    weaker = lambda leaf: jnp.asarray(np.asarray(leaf) * 0.3) if leaf.ndim > 1 else leaf
    return module, jax.tree.map(weaker, params)


def whole(module, params, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return transformer.logits(module.apply({"params": params}, tokens, positions))


def in_parts(module, params, tokens, places, kind="float32", parts=PARTS, late=0):
    """Row r is r x `late` tokens behind, so that rows stand at different positions; at most 16."""
    loose = transformer.unstacked(module)
    params = transformer.unstack(module, params)
    rows, length = tokens.shape
    kept = cache.empty(loose, kind, B=rows, S=places)
    found = np.zeros((rows, length, module.config.vocab_size))

    @jax.jit
    def extend(kept, tokens_BT, positions_BT, real_BT):
        return loose.apply(
            {"params": params, cache.CACHE: kept}, tokens_BT, positions_BT, Cached(real_BT),
            mutable=[cache.CACHE],
        )  # fmt: skip

    behind = late * np.arange(rows)[:, None]
    for start, stop, shape in (*parts, (length, length + late * rows, 16)):
        positions = start - behind + np.arange(shape)
        real = (positions >= 0) & (positions < np.minimum(stop - behind, length))
        chosen = np.where(real, positions, 0)
        given = np.where(real, np.take_along_axis(tokens, chosen, axis=1), 7)
        hidden, changed = extend(kept, given, np.where(real, positions, -5), real)
        kept = changed[cache.CACHE]
        logits = np.asarray(transformer.logits(hidden))
        for row in range(rows):
            found[row, positions[row, real[row]]] = logits[row, real[row]]
    return found


# What a cache changes: where keys turn, which are seen, how many heads they have. The others are slow.
QUICK = (
    *("llama3", "yarn", "learned", "alibi", "t5", "window", "softcap", "qk rms", "multi-query"),
    *("bias all, gated", "post, plain", "parallel", "mup"),
)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]
)
def test_logits_are_those_of_the_whole_text(name, layout):
    changed = {**VARIANTS[name], "init_std": 0.1}
    module, params = network(dataclasses.replace(BASE, **changed), layout)
    expected = np.asarray(whole(module, params, SEQUENCE))
    ours = in_parts(module, params, SEQUENCE, places=48, late=2)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_window_needs_no_more_places_than_it_sees_and_the_longest_part(layout):
    module, params = network(dataclasses.replace(BASE, window=5, position="alibi"), layout)
    expected = np.asarray(whole(module, params, SEQUENCE))
    ours = in_parts(module, params, SEQUENCE, places=5 + 15)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(in_parts(module, params, SEQUENCE, 17), expected, rtol=1e-2)


def test_a_text_may_go_back_and_on_from_there(layout):
    """What was proposed and not taken leaves nothing behind."""
    module, params = network(BASE, layout)
    expected = np.asarray(whole(module, params, SEQUENCE))
    back = ((0, 16, 16), (10, 26, 16), (24, 40, 16))
    ours = in_parts(module, params, SEQUENCE, 48, parts=back)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 2e-2), ("int8", 3e-2)])
def test_a_smaller_cache_is_near(kind, bound, layout):
    """bfloat16 rounds by 2^-9, int8 by 1/254 of a head's largest entry; logits by a few of those."""
    module, params = network(BASE, layout)
    expected = np.asarray(whole(module, params, SEQUENCE))
    ours = in_parts(module, params, SEQUENCE, 48, kind)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < bound


def test_meshes_have_the_numbers_of_one_device(layout):
    found = []
    many = sharding.make(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    for where in (layout, many):
        module, params = network(BASE, where)
        found.append(in_parts(module, params, SEQUENCE[[0, 1, 2, 0]], 48))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "quant",
    [
        None,
        config.Quant(),
        pytest.param(config.Quant(activations="int16"), marks=pytest.mark.slow),
        pytest.param(config.Quant(bits=4, method="nearest"), marks=pytest.mark.slow),
    ],
    ids=["float32", "int8", "int8 x int16", "int4"],
)
def test_no_weight_is_gathered_for_a_token(quant):
    """On many devices what goes around is smaller than any matrix, and than its scales."""
    model = dataclasses.replace(
        BASE, dim=256, heads=8, kv_heads=4, head_dim=16, ffn_dim=512, vocab_size=512
    )
    module = transformer.build(model, sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices()))
    rows, params = 2, parameters.drawn(module)
    letters = transformer.letters(module)
    params = jax.tree.map(lambda w, of: jax.device_put(w, module.layout.param(of)), params, letters)
    if quant:
        params = quantise(module, params, quant)
    made = engine.Engine(module, config.Decode())
    params = transformer.unstack(module, params)
    lowered = engine.advance.lower(made.module, params, made.decode, made.rows(rows, 100), steps=2)
    text = lowered.compile().as_text()
    made = re.findall(r"= (\(?\w+\[.*?) (?:all-|collective-|reduce-scatter)[\w-]*\(", text)
    assert made
    moved = [
        math.prod(map(int, n.split(","))) for one in made for n in re.findall(r"\[([\d,]+)\]", one)
    ]
    smallest = model.dim * model.kv_heads * model.head_dim
    assert max(moved) < smallest / 4
