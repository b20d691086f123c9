"""The table of names, and the layouts between which it carries."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.convert import names
from llama_jax.model import transformer
from tests import parameters
from tests.convert.small import MODEL


@pytest.fixture(scope="module")
def module(layout):
    return transformer.build(MODEL, layout)


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_names_and_shapes_are_those_of_transformers(output):
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(MODEL, output=output)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.ffn_dim,
            tie_word_embeddings=model.output == "tied",
        )
    )
    wanted = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    ours = {u.hf: names.torch_shape(u.row, model) for u in names.units(model)}
    assert ours == wanted


def drawn(module):
    """No two entries alike, scales included."""
    rng = np.random.default_rng(0)
    return parameters.drawn(module, lambda leaf: leaf + rng.normal(size=leaf.shape))


def test_every_parameter_has_a_row_with_its_letters(module):
    letters = tree.paths(transformer.letters(module))
    rows = {u.path: ("L" if u.group >= 0 else "") + u.row.letters for u in names.units(MODEL)}
    assert rows == letters


def test_state_dict_and_back_is_the_identity(module):
    params = drawn(module)
    back = names.from_state_dict(names.state_dict(params, MODEL), MODEL)
    assert not tree.diff(params, back)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_of_a_longer_pattern_go_to_their_block(layout):
    model = dataclasses.replace(MODEL, layers=4, pattern=("self", "self"))
    module = transformer.build(model, layout)
    params = drawn(module)
    state = names.state_dict(params, model)
    third = np.asarray(params["groups"]["self_0"]["ffn"]["gate"])[1]  # group 1, first of two
    np.testing.assert_array_equal(state["model.layers.2.mlp.gate_proj.weight"], third.T)


def test_rows_become_letters_one_element_at_a_time():
    size = {"N": 6, "K": 2, "H": 4, "D": 24}
    unit = next(u for u in names.units(MODEL) if u.row.path.endswith("attention/k"))
    rows = np.arange(size["K"] * size["H"] * size["D"]).reshape(-1, size["D"]).astype(np.float32)
    ours = names.to_ours(rows, unit.row, MODEL)
    for k in range(size["K"]):
        for h in range(size["H"]):
            for d in range(size["D"]):
                assert ours[d, k, h] == rows[k * size["H"] + h, d]
    np.testing.assert_array_equal(names.to_torch(ours, unit.row, MODEL), rows)


def test_half_split_takes_the_even_rows_of_a_head_then_the_odd_ones():
    rows = np.arange(12).repeat(3).reshape(12, 3).astype(np.float16)
    np.testing.assert_array_equal(
        names.half_split(rows, 6)[:, 0], [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    )
    np.testing.assert_array_equal(names.interleave(names.half_split(rows, 6), 6), rows)


@pytest.mark.parametrize("shape", [(1, 1), (65, 513), (200, 3), (64, 512)])
def test_transpose_equals_numpys(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(names.transpose(matrix), matrix.T)
