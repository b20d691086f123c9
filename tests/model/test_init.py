import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding, tree
from llama_jax.model import transformer
from llama_jax.train import program, state

WIDE = config.Model(
    vocab_size=96, dim=64, layers=4, heads=8, kv_heads=8, head_dim=16, ffn_dim=160,
    compute_dtype="float32", init_std=0.1,
)  # fmt: skip


def initial(layout, **changed):
    module = transformer.build(dataclasses.replace(WIDE, **changed), layout)
    return tree.paths(jax.jit(lambda: transformer.init(module, jax.random.key(3)))())


def test_gpt2s_residual_projections_are_smaller(layout):
    """By sqrt(2 x 4 layers); the sample of 10,000 entries is within 3% of its deviation."""
    params = initial(layout, init="depth_scaled")
    for name, leaf in params.items():
        if leaf.ndim > 2 or name in ("embed", "output"):
            expected = 0.1 / np.sqrt(8) if name.endswith(("/o", "/down")) else 0.1
            assert np.std(leaf) == pytest.approx(expected, rel=0.03), name


def test_mups_inner_matrices_have_the_variance_of_the_base_width_over_the_ratio(layout):
    params = initial(layout, init="mup", mup_base_dim=16)
    for name, leaf in params.items():
        if leaf.ndim > 2 or name in ("embed", "output"):
            expected = 0.1 if name in ("embed", "output") else 0.1 / np.sqrt(4)
            assert np.std(leaf) == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize(
    "changed",
    [dict(ffn="relu"), dict(norm="plain"), dict(placement="peri"), dict(bias="all"), dict(position="t5"),
     dict(position="learned", max_positions=8), dict(qk_norm="rms")],
    ids=str,
)  # fmt: skip
def test_networks_that_differ_elsewhere_begin_with_the_same_numbers(changed, layout):
    """What an ablation compares: every matrix that both have, and of the same shape."""
    base, other = initial(layout), initial(layout, **changed)
    both = [name for name in base if name in other]
    assert len(both) >= 6
    assert set(base) != set(other)
    for name in both:
        np.testing.assert_array_equal(base[name], other[name], err_msg=name)


def test_two_matrices_of_a_layer_and_two_layers_differ(layout):
    params = initial(layout)
    q, k = params["groups/self_0/attention/q"], params["groups/self_0/attention/k"]
    assert np.abs(np.corrcoef(q.ravel(), k.ravel())[0, 1]) < 0.02
    assert np.abs(np.corrcoef(q[0].ravel(), q[1].ravel())[0, 1]) < 0.05


def spread(width, init, layout):
    """Standard deviation over tokens of the change of logits that four steps make (a coordinate check)."""
    model = config.Model(
        vocab_size=64, dim=width, layers=2, heads=width // 8, kv_heads=width // 8, head_dim=8,
        ffn_dim=2 * width, compute_dtype="float32", init=init,
        mup_base_dim=32 if init == "mup" else 0,
    )  # fmt: skip
    run = config.Run(
        model=model,
        data=config.Data(seq_len=16),
        optim=config.Optim(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0, schedule="linear"),
        train=config.Train(batch_size=8, steps=100),
    )
    built = program.build(run, layout)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, (8, 17)).astype(np.int32)
    ones, places = np.ones((8, 16)), np.broadcast_to(np.arange(16), (8, 16))
    arrays = (rows[:, :-1], rows[:, 1:], ones, places, ones)
    batch = jax.tree.map(
        lambda x, like: jnp.asarray(x, like.dtype), type(built.batch)(*arrays), built.batch
    )
    logits = jax.jit(
        lambda params: transformer.logits(
            built.module.apply({"params": params}, batch.tokens_BT, batch.positions_BT)
        )
    )
    now = state.init(built.objective, built.tx, layout, seed=0)
    before = logits(now.params)
    for _ in range(4):
        now, _ = built.step(now, {}, batch)
    return float(np.std(logits(now.params) - before))


@pytest.mark.slow  # a quarter of a minute
def test_coordinate_check(layout):
    """muP's promise (arXiv:2203.03466 appendix D.1): what steps change does not grow with the width.

    Eight times the width: under the usual parametrisation logits move several times as much.
    """
    narrow, wide = (spread(width, "mup", layout) for width in (32, 256))
    assert 0.5 < wide / narrow < 2
    narrow, wide = (spread(width, "normal", layout) for width in (32, 256))
    assert wide / narrow > 3


def test_sharded_initial_values_are_the_same(layout):
    eight = sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices())
    base, other = initial(layout, position="t5"), initial(eight, position="t5")
    for name, leaf in base.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)
