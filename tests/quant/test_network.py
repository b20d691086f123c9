"""A whole network in smaller weights: computes what it stands for, decodes, on one device and on many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, dims, sharding, tree
from llama_jax.model import transformer
from llama_jax.model.quantised import Quantised
from llama_jax.quant import network
from tests.model.test_cache import in_parts, whole
from tests.model.test_cache import network as make
from tests.model.test_variants import BASE, VARIANTS

TOKENS = np.random.default_rng(0).integers(0, BASE.vocab_size, (4, 40))
QUANTS = {
    "int8": config.Quant(),
    "int8 x int16": config.Quant(activations="int16"),
    "int4": config.Quant(bits=4, group=8, method="nearest"),
}
IS_ONE = dict(is_leaf=lambda leaf: isinstance(leaf, Quantised))


def dense(params):
    return jax.tree.map(
        lambda w: w.dense(jnp.float32) if isinstance(w, Quantised) else w, params, **IS_ONE
    )


def close(found, wanted, tolerance):
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_those_of_the_matrices_it_stands_for(layout, quant):
    module, params = make(BASE, layout)
    made = network.quantise(module, params, QUANTS[quant])
    exact = 1e-3 if "int16" in quant else 2e-5
    close(whole(module, made, TOKENS), whole(module, dense(made), TOKENS), exact)


@pytest.mark.parametrize("quant", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_in_bfloat16_it_is_as_near_as_the_matrices_are(layout, quant):
    module, params = make(dataclasses.replace(BASE, compute_dtype="bfloat16"), layout)
    made = network.quantise(module, params, QUANTS[quant])
    exact, _ = make(BASE, layout)
    wanted = whole(exact, dense(made), TOKENS)
    for found in (whole(module, made, TOKENS), in_parts(module, made, TOKENS, 64)):
        close(found, wanted, 0.03)


def test_what_is_not_finite_is_named(layout):
    module, params = make(BASE, layout)
    params["groups"]["self_0"]["ffn"]["up"] = (
        params["groups"]["self_0"]["ffn"]["up"].at[1, 2, 3].set(jnp.nan)
    )
    for quant in QUANTS.values():
        with pytest.raises(ValueError, match=r"ffn/up of group 1 holds a value that is not finite"):
            network.quantise(module, params, quant)


def test_a_text_is_given_to_what_reads_one_alone(layout):
    module, params = make(BASE, layout)
    with pytest.raises(ValueError, match="reads a text"):
        network.quantise(module, params, config.Quant(bits=4))
    with pytest.raises(ValueError, match="reads no text"):
        network.quantise(module, params, QUANTS["int4"], [TOKENS])


@pytest.mark.parametrize(
    "name", ["learned", "tied", "bias all, gated", "multi-query", "relu2", "post, plain", "mup"]
)
def test_every_network_decodes_in_smaller_weights(layout, name):
    module, params = make(dataclasses.replace(BASE, **VARIANTS[name]), layout)
    made = network.quantise(module, params, QUANTS["int8"])
    wanted = whole(module, dense(made), TOKENS)
    close(in_parts(module, made, TOKENS, 64), wanted, 2e-5)
    plain = whole(module, params, TOKENS)
    assert np.corrcoef(wanted.ravel(), plain.ravel())[0, 1] > 0.98


def test_matrices_alone_are_quantised_and_tables_have_eight_bits(layout):
    module, params = make(BASE, layout)
    made = network.quantise(module, params, QUANTS["int4"])
    letters = tree.paths(transformer.letters(module))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(made, **IS_ONE):
        name = tree.path(keys)
        if not dims.is_matrix(letters[name]):
            assert leaf.dtype == jnp.float32
        else:
            assert leaf.values.dtype == (jnp.int8 if "V" in letters[name] else jnp.int4)
            assert leaf.shape == tree.paths(params)[name].shape


def test_calibration_reads_what_quantised_layers_before_it_make(layout):
    """The Hessians of the second layer, from the whole network with the first one quantised."""
    model = dataclasses.replace(BASE, layers=2)
    module, params = make(model, layout)
    seen = []
    gptq = network.gptq
    network.gptq = lambda w, hessian, cut, bits: seen.append(hessian) or gptq(w, hessian, cut, bits)
    try:
        made = network.quantise(
            module, params, config.Quant(bits=4, group=8), [TOKENS[:2], TOKENS[2:]]
        )
    finally:
        network.gptq = gptq
    half = dense(made)
    half["groups"] = jax.tree.map(
        lambda new, old: jnp.stack([new[0], old[1]]), half["groups"], params["groups"]
    )
    single = transformer.unstacked(module)
    positions = np.broadcast_to(np.arange(40), TOKENS.shape)
    loose = transformer.unstack(module, half)
    _, given = single.apply({"params": loose}, TOKENS, positions, mutable=["inputs"])
    names = list(tree.paths(given["inputs"]["group_1"]))
    for name, found in zip(names, seen[len(names) :], strict=True):
        x = np.asarray(tree.paths(given["inputs"]["group_1"])[name], np.float64)
        x = x.reshape(160, -1)
        close(np.asarray(found), x.T @ x, 1e-4)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_what_was_trained_elsewhere_is_calibrated_here(layout, kernel):
    module, params = make(BASE, layout)
    trained, _ = make(dataclasses.replace(BASE, kernel=kernel), layout)
    quant = config.Quant(bits=4, group=8)
    wanted, made = (network.quantise(one, params, quant, [TOKENS]) for one in (module, trained))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow  # 20 s
def test_many_devices_have_the_numbers_of_one(layout):
    model = dataclasses.replace(BASE, dim=32, heads=4, kv_heads=2, ffn_dim=48)
    module, params = make(model, layout)
    mesh = sharding.make(config.Mesh(fsdp=2, tensor=2, data=2), jax.devices())
    spread = transformer.build(model, mesh)
    letters = transformer.letters(spread)
    placed = jax.tree.map(lambda w, of: jax.device_put(w, mesh.param(of)), params, letters)
    one, many = (
        network.quantise(*of, QUANTS["int8"]) for of in ((module, params), (spread, placed))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
    wanted = np.asarray(whole(module, one, TOKENS))
    close(np.asarray(whole(spread, many, TOKENS)), wanted, 2e-5)
    four = network.quantise(spread, placed, config.Quant(bits=4, group=8), [TOKENS])
    assert np.corrcoef(np.ravel(whole(spread, four, TOKENS)), wanted.ravel())[0, 1] > 0.9
