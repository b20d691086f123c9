"""Change each setting of the model: what is computed must change, or for the others must not.

A setting that changes nothing is a defect: someone will publish an ablation of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.model import transformer
from tests import parameters

BASE = config.Model(
    vocab_size=41, dim=24, layers=2, heads=6, kv_heads=3, head_dim=4, ffn_dim=20,
    compute_dtype="float32", rope=config.Rope(factor=4.0, original_length=16),
)  # fmt: skip
WHAT = {
    "vocab_size": 43, "dim": 30, "layers": 4, "heads": 3, "kv_heads": 6, "head_dim": 6,
    "ffn_dim": 22, "pattern": ("self", "self"), "norm": "layer", "norm_eps": 1e-3, "placement": "post",
    "qk_norm": "rms", "position": "none", "window": 3, "softcap": 1.0, "bias": "qkv", "ffn": "gelu",
    "output": "tied", "init": "depth_scaled", "init_std": 0.03, "compute_dtype": "bfloat16",
    "rope.theta": 100.0, "rope.factor": 2.0, "rope.low_freq_factor": 2.0,
    "rope.high_freq_factor": 5.0, "rope.original_length": 32, "rope.scaling": "yarn",
    "rope.rotary_dim": 2,
}  # fmt: skip
# Those of one choice, and the choice.
OF = {
    "max_positions": (dict(position="learned", max_positions=40), 50),
    "mup_base_dim": (dict(init="mup", mup_base_dim=8), 16),
}
HOW = {"kernel": "reference", "remat": "full", "unroll": 2}


def change(field, value):
    if field.startswith("rope."):
        rope = dataclasses.replace(BASE.rope, **{field.removeprefix("rope."): value})
        return dataclasses.replace(BASE, rope=rope)
    return dataclasses.replace(BASE, **{field: value})


@functools.cache
def shapes(model, layout):
    """Of the parameters; nothing is compiled for them."""
    return jax.tree.map(jnp.shape, transformer.abstract(transformer.build(model, layout)))


def changed(before, after, layout):
    """Whether two models compute different things from the same seed."""
    if shapes(before, layout) != shapes(after, layout):
        return True
    initial = any(
        getattr(before, f) != getattr(after, f) for f in ("init", "init_std", "mup_base_dim")
    )
    old, new = outcome(before, layout, initial), outcome(after, layout, initial)
    return np.abs(old - new).max() > 1e-4 * np.abs(old).max()


@functools.cache
def outcome(model, layout, initial=False):
    """Logits of fixed tokens, with drawn parameters or with the initial ones."""
    module = transformer.build(model, layout)
    tokens = jnp.asarray([[3, 1, 40, 1, 5, 9, 2, 6, 5, 3, 5]])
    positions = jnp.arange(11)[None] * 3
    params = (
        jax.jit(lambda: transformer.init(module, jax.random.key(0)))()
        if initial
        else parameters.drawn(module)
    )
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * (8 if leaf.ndim > 2 else 1), params)
    compute = jax.jit(
        lambda params: transformer.logits(module.apply({"params": params}, tokens, positions))
    )
    return np.asarray(compute(params))


@pytest.mark.parametrize("field", WHAT)
def test_what_is_computed_changes(field, layout):
    assert changed(BASE, change(field, WHAT[field]), layout)


@pytest.mark.parametrize("field", OF)
def test_what_belongs_to_a_choice_changes_it(field, layout):
    chosen, value = OF[field]
    before = dataclasses.replace(BASE, **chosen)
    assert changed(before, dataclasses.replace(before, **{field: value}), layout)
    with pytest.raises(ValueError, match=f"model.{field}.*has no effect"):
        dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize("field", HOW)
def test_how_it_is_computed_changes_the_program_but_not_the_numbers(field, layout):
    other = change(field, HOW[field])
    assert shapes(BASE, layout) == shapes(other, layout)
    found = outcome(other, layout)
    np.testing.assert_allclose(outcome(BASE, layout), found, rtol=1e-4, atol=1e-5)
    assert program(BASE, layout) != program(other, layout)


def program(model, layout):
    module = transformer.build(model, layout)
    tokens = jnp.zeros((1, 11), jnp.int32)
    loss = lambda p: transformer.logits(module.apply({"params": p}, tokens, tokens)).sum()
    return str(jax.make_jaxpr(jax.grad(loss))(transformer.abstract(module)))


def test_every_field_is_tried():
    fields = {f.name for f in dataclasses.fields(config.Model)} - {"rope"}
    fields |= {f"rope.{f.name}" for f in dataclasses.fields(config.Rope)}
    assert fields == {*WHAT, *OF, *HOW}
