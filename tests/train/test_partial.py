"""Training a part of the parameters."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config, tree
from llama_jax.model import transformer
from llama_jax.train import loss, partial, program
from llama_jax.train import state as train_state
from tests import parameters
from tests.conftest import MODEL

BLOCK = "groups/self_0"


def letters(layout):
    return transformer.letters(transformer.build(MODEL, layout))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("VD",), {"embed"}),
        (("D",), {"norm/scale", f"{BLOCK}/attention_norm/scale", f"{BLOCK}/ffn_norm/scale"}),
        (
            ("*/attention/[qv]", "output"),
            {f"{BLOCK}/attention/q", f"{BLOCK}/attention/v", "output"},
        ),
        (("DKH",), {f"{BLOCK}/attention/k", f"{BLOCK}/attention/v"}),
    ],
)
def test_patterns_are_paths_or_letters(patterns, expected, layout):
    assert partial.chosen(letters(layout), patterns) == expected


def test_all_is_all_and_nothing_names_the_nearest(layout):
    assert partial.chosen(letters(layout), ("*",)) == tree.flat(letters(layout)).keys()
    with pytest.raises(
        ValueError, match=r"optim.train='outputs' picks no parameter.*nearest: 'output'"
    ):
        partial.chosen(letters(layout), ("output", "outputs"))
    with pytest.raises(
        ValueError, match=r"optim.train=\('embed',\) freezes .* give train.init_from"
    ):
        config.Run(optim=config.Optim(train=("embed",)))


def test_a_step_is_that_of_all_parameters_and_the_frozen_ones_stay(layout):
    """In SGD's place AdamW without decay and clipping: its first step depends on each entry's own gradient."""
    run = config.Run(
        model=MODEL,
        data=config.Data(seq_len=7),
        optim=config.Optim(warmup_steps=0, weight_decay=0.0, clip_norm=1e9),
        train=config.Train(steps=3, batch_size=2, init_from="base"),
    )
    some = dataclasses.replace(run, optim=dataclasses.replace(run.optim, train=("*/ffn/*", "VD")))
    whole, part = (program.build(one, layout) for one in (run, some))
    params = jax.tree.map(np.asarray, parameters.drawn(whole.module))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 8)).astype(np.int32)
    ones = np.ones((2, 7), np.int32)
    batch = whole.batch._replace(
        tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=ones.astype(np.float32),
        positions_BT=np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7)), segments_BT=ones,
    )  # fmt: skip
    after = {}
    for name, one in (("whole", whole), ("part", part)):
        mine = tree.flat(one.objective.letters).keys()
        trained, frozen = tree.split(params, mine.__contains__)
        state = train_state.begin(one.objective, one.tx, layout, jax.device_put(trained))
        state, found = one.step(state, frozen, batch)
        after[name] = tree.flat(jax.tree.map(np.asarray, state.params)), float(found.loss)
    assert after["part"][1] == after["whole"][1]
    assert after["part"][0].keys() == {
        "embed",
        *(f"{BLOCK}/ffn/{n}" for n in ("gate", "up", "down")),
    }
    for path, leaf in after["part"][0].items():
        np.testing.assert_allclose(leaf, after["whole"][0][path], rtol=1e-6, atol=1e-8)
        assert np.abs(leaf - tree.flat(params)[path]).max() > 1e-4
    moments = [leaf for leaf in jax.tree.leaves(part.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * tree.count(part.state.params)


def test_frozen_parameters_are_kept_in_the_compute_dtype(layout):
    run = config.Run(
        model=dataclasses.replace(MODEL, compute_dtype="bfloat16"),
        data=config.Data(seq_len=7),
        optim=config.Optim(train=("D",)),
        train=config.Train(batch_size=2, init_from="base"),
    )
    built = program.build(run, layout)
    assert {leaf.dtype for leaf in jax.tree.leaves(built.frozen)} == {np.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(built.state.params)} == {np.dtype("float32")}
    whole = loss.next_token(built.module)
    assert (
        tree.flat(built.objective.params(built.state.params, built.frozen)).keys()
        == tree.flat(whole.letters).keys()
    )
