"""A token of a large network on a slice: what it reads by arithmetic, and TPU's compiler on a small one."""

import dataclasses

import jax
import pytest

from configs import sizes
from llama_jax import config, sharding, tree
from llama_jax.analysis import hardware
from llama_jax.decode import engine
from llama_jax.model import transformer
from llama_jax.plan import decoding, hlo, trace
from llama_jax.quant.network import quantise
from tests import parameters

MESH = config.Mesh(tensor=8, fsdp=2, hardware="v5e_16")
TEXTS = trace.Texts(rows=8, context=2048, bits=8)


def gib(part):
    return decoding._gib_a_device(part)


def test_bytes_of_a_chip_are_those_of_the_network():
    """Llama 3.1 70B: every matrix over all 16 chips, keys and values over 8 of their heads' 8 parts."""
    layout = sharding.abstract(MESH, 16)
    _, params, rows = trace.abstract(sizes.LLAMA31_70B, layout, TEXTS)
    matrices = 70_553_706_496 - (2 * 80 + 1) * 8192
    of_values = matrices / 16 / 2**30
    assert of_values < gib(params) < of_values * 1.002  # a scale a channel
    kept = 8 * 2304 * 80 * 2 * 8 * 128 * 2 / 8  # places for 2,048 tokens and a call
    assert gib(rows.cache) == pytest.approx(kept / 2**30)
    four = trace.abstract(sizes.LLAMA31_70B, layout, TEXTS._replace(bits=4))[1]
    layers = matrices - 2 * 128_256 * 8192
    wanted = (layers * (4 + 16 / 32) / 8 + 2 * 128_256 * 8192) / 16 / 2**30
    assert gib(four) == pytest.approx(wanted, rel=0.002)


@pytest.mark.slow  # 11 s of TPU's compiler
def test_the_compiler_says_no_less_than_the_bandwidth_allows():
    model = dataclasses.replace(sizes.LLAMA31_70B, layers=2)
    run = config.Run(model=model, mesh=MESH)
    plan = decoding.plan(run, "v5e_16", TEXTS)
    assert plan.fits
    assert (
        plan.weights_gib + plan.cache_gib < plan.hbm_gib < 1.5 * (plan.weights_gib + plan.cache_gib)
    )
    assert 0.95 * plan.read_seconds < plan.compute_seconds < 2 * plan.read_seconds
    assert plan.step_seconds_low < plan.step_seconds_high
    slow, fast = plan.tokens_per_second
    assert slow == 1 / plan.step_seconds_high < fast


def test_arrays_are_those_of_generating():
    """Shapes, dtypes and places of a small network's parameters and rows, as the engine has them."""
    model = dataclasses.replace(
        sizes.LLAMA32_1B,
        layers=2,
        dim=256,
        heads=8,
        kv_heads=4,
        head_dim=32,
        ffn_dim=512,
        vocab_size=512,
    )
    mesh = config.Mesh(data=2, fsdp=2, tensor=2)
    layout = sharding.make(mesh, jax.devices())
    for bits in (16, 8, 4):
        texts = trace.Texts(rows=3, context=300, bits=bits)
        _, params, rows = trace.abstract(model, sharding.abstract(mesh, 8), texts)
        module = transformer.build(model, layout)
        made = parameters.drawn(module)
        letters = transformer.letters(module)
        made = jax.tree.map(lambda w, of: jax.device_put(w, layout.param(of)), made, letters)
        if bits < 16:
            quant = config.Quant(bits=bits, **({"method": "nearest"} if bits == 4 else {}))
            made = quantise(module, made, quant)
        real = engine.Engine(module, config.Decode())
        made = transformer.unstack(module, made)
        for planned, there in ((params, made), (rows, real.rows(3, 300))):
            planned, there = tree.paths(planned), tree.paths(there)
            assert set(planned) == set(there)
            for name, leaf in there.items():
                assert leaf.shape == planned[name].shape
                own = [place.sharding.shard_shape(leaf.shape) for place in (leaf, planned[name])]
                assert own[0] == own[1], name


@pytest.mark.parametrize(
    ("kind", "parts", "hops"),
    [("all-reduce", 2, 2), ("all-gather", 4, 3), ("all-reduce", 16, 12), ("all-gather", 8, 4)],
)
def test_hops_go_along_the_sides_of_the_slice(kind, parts, hops):
    """v5e-16 is 4 x 4: 8 chips are 4 x 2."""
    one = hlo.Collective(kind, 1, 1, parts, False, 0.0, False, "")
    assert decoding.hops(one, hardware.SLICES["v5e_16"]) == hops
