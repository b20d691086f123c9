"""The interface of training methods, with two that are none: a weighted regression and a low-rank update."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import config, sharding, tree
from llama_jax.data import iterator
from llama_jax.data.batch import Batch
from llama_jax.interrupt import Interrupt
from llama_jax.model import transformer
from llama_jax.model.transformer import Hidden
from llama_jax.train import loop, loss, metrics, program, state, step
from llama_jax.train.objective import Objective, Sums

B, D, RATE = 12, 5, 0.05
OFFSET = 0.7  # of the regression, frozen


class Points(NamedTuple):
    """The batch of the regression."""

    x_BD: np.ndarray
    y_B: np.ndarray
    weights_B: np.ndarray


def regression() -> Objective:
    """Weighted squares; aux are the error by its own weight, and how many points lie above."""

    def sums(trained, frozen, batch):
        error_B = batch.x_BD @ trained["w_D"] + frozen["offset"] - batch.y_B
        above_B = (error_B < 0).astype(jnp.float32)
        ones = jnp.asarray(batch.y_B.size, jnp.float32)
        weight_B = batch.weights_B**2
        aux = {
            "error": (jnp.sum(weight_B * error_B), jnp.sum(weight_B)),
            "above": (jnp.sum(above_B), ones),
        }
        return Sums(jnp.sum(batch.weights_B * error_B**2), jnp.sum(batch.weights_B), aux)

    return Objective(
        sums=sums,
        tokens=lambda batch: jnp.asarray(batch.y_B.size, jnp.float32),
        init=lambda key: {"w_D": jnp.zeros(D)},
        letters={"w_D": "D"},
        frozen={"offset": jax.ShapeDtypeStruct((), jnp.float32)},
        params=lambda trained, frozen: trained,
        batch=lambda run, layout: Points(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (B, D))),
    )


def points(weights_B, seed=0) -> Points:
    rng = np.random.default_rng(seed)
    return Points(
        *(
            np.asarray(a, np.float32)
            for a in (rng.normal(size=(B, D)), rng.normal(size=B), weights_B)
        )
    )


def weights(total, seed=0):
    """Of any size and sign, with this sum; those of microbatches have sums of both signs."""
    drawn_B = np.random.default_rng(seed).normal(size=B)
    return drawn_B + (total - drawn_B.sum()) / B


def expected(w_D, batch):
    """(loss, gradient, {"error": (mean, weight), ...}) in float64, over the whole batch."""
    x_BD, y_B, weights_B = (np.asarray(a, np.float64) for a in batch)
    error_B, divisor = x_BD @ w_D + OFFSET - y_B, weights_B.sum() or 1.0
    squares_B = weights_B**2
    error = (np.sum(squares_B * error_B) / (squares_B.sum() or 1.0), squares_B.sum())
    return (
        np.sum(weights_B * error_B**2) / divisor,
        2 * (weights_B * error_B) @ x_BD / divisor,
        {"error": error, "above": (np.mean(error_B < 0), B)},
    )


def regress(layout, parts=1):
    """A fresh state, and (state, batch) -> (state, metrics)."""
    objective, tx = regression(), optax.sgd(RATE)
    train = config.Train(batch_size=B, microbatches=parts, on_anomaly="skip")
    advance = jax.jit(step.make_step(objective, tx, lambda _: RATE, train))
    frozen = {"offset": jnp.float32(OFFSET)}
    return state.init(objective, tx, layout, 0), lambda now, batch: advance(now, frozen, batch)


@pytest.mark.parametrize(("total", "parts"), [(0.5, 1), (0.5, 3), (-0.25, 3), (3.0, 4)])
def test_weights_of_any_size_and_sign_are_divided_by_their_sum(layout, total, parts):
    start, advance = regress(layout, parts)
    batch = points(weights(total))
    sums = [batch.weights_B[part::parts].sum() for part in range(parts)]
    assert parts == 1 or min(sums) < 0 < max(sums)
    after, found = advance(start, batch)
    mean, gradient_D, aux = expected(np.zeros(D), batch)
    assert float(found.loss) == pytest.approx(mean, rel=1e-5)
    assert float(found.weight) == pytest.approx(total, rel=1e-5)
    assert (float(found.tokens), float(found.skipped)) == (B, 0)
    assert float(found.grad_norm) == pytest.approx(np.linalg.norm(gradient_D), rel=1e-5)
    np.testing.assert_allclose(after.params["w_D"], -RATE * gradient_D, rtol=2e-5)
    for name, pair in aux.items():
        np.testing.assert_allclose(found.aux[name], pair, rtol=1e-5, err_msg=name)


def test_a_weight_of_zero_divides_nothing(layout):
    start, advance = regress(layout)
    after, found = advance(start, points(np.zeros(B)))
    assert (float(found.loss), float(found.grad_norm), float(found.skipped)) == (0, 0, 0)
    assert not np.any(after.params["w_D"])


def test_sums_that_are_no_float32_scalars_are_refused(layout):
    objective = regression()
    halves = lambda *args: objective.sums(*args)._replace(aux={"half": (jnp.bfloat16(1), 1.0)})
    make = step.make_step(
        objective._replace(sums=halves), optax.sgd(RATE), lambda _: RATE, config.Train(batch_size=B)
    )
    with pytest.raises(AssertionError, match=r"Sums.aux/half/0 of an objective must be a float32"):
        make(
            state.init(objective, optax.sgd(RATE), layout, 0),
            {"offset": OFFSET},
            points(np.ones(B)),
        )


def test_aux_are_in_the_rows_of_the_metrics_file(layout, tmp_path):
    """Means by their own weights over the steps since the last row, as the loss is by its own."""
    run = config.Run(
        data=config.Data(seq_len=8),
        optim=config.Optim(warmup_steps=0),
        train=config.Train(steps=5, batch_size=B),
        log=config.Log(every=2),
    )
    start, advance = regress(layout, parts=2)
    batches = [points(weights(total, seed), seed) for seed, total in enumerate((4, 9, 3, 1, 2))]
    loaded = iter([iterator.LoadedBatch(batch, np.zeros(0), np.zeros(0)) for batch in batches])
    file = tmp_path / "metrics.jsonl"
    console = metrics.Console(0, 5, quiet=True)
    recorder = loop.Recorder(
        run, loop.FlopRates(1, 0), [metrics.jsonl(file, 0)], console, loop.Progress()
    )
    asked = []
    loop.run(
        run, start, advance, lambda n, now: asked.append((n, int(now.step))) or next(loaded),
        evaluate=lambda params: {}, save=lambda *_: None, recorder=recorder, interrupt=Interrupt(),
    )  # fmt: skip
    assert asked == [(n, n) for n in range(5)]
    w_D, values = np.zeros(D), []
    for batch in batches:
        mean, gradient_D, aux = expected(w_D, batch)
        values.append({"loss": (mean, batch.weights_B.sum()), **aux})
        w_D = w_D - RATE * gradient_D
    rows = metrics.read(file)
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row, steps in zip(rows, (values[:2], values[2:4], values[4:]), strict=True):
        for name in ("loss", "error", "above"):
            pairs = np.array([of[name] for of in steps], np.float64)
            mean = pairs[:, 0] @ pairs[:, 1] / pairs[:, 1].sum()
            assert row[name] == pytest.approx(mean, rel=1e-4), (row["step"], name)


# A low-rank update of the output matrix (LoRA, arXiv:2106.09685 section 4.1).
RANK, ROWS, T = 2, 8, 6


def low_rank(run: config.Run, module) -> Objective:
    layout = module.layout

    def sums(trained, frozen, batch):
        hidden = module.apply({"params": frozen}, batch.tokens_BT, batch.positions_BT)
        w_DV = hidden.w_DV + trained["a_DE"] @ trained["b_EV"]
        total, _ = loss.cross_entropy(
            Hidden(hidden.x_BTD, w_DV), batch.targets_BT, batch.weights_BT, layout
        )
        return Sums(total, jnp.sum(batch.weights_BT), {})

    def init(key):
        a_DE = jax.random.normal(key, (run.model.dim, RANK)) / RANK
        return {"a_DE": a_DE, "b_EV": jnp.zeros((RANK, run.model.vocab_size))}

    frozen = jax.tree.map(
        lambda leaf, letters: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=layout.param(letters)
        ),
        transformer.abstract(module),
        transformer.letters(module),
    )
    pretraining = loss.pretraining(run, module)
    return pretraining._replace(
        sums=sums, init=init, letters={"a_DE": "DE", "b_EV": "EV"}, frozen=frozen
    )


@functools.cache  # compiling is what takes the time
def adapt(model):
    """A run, the program of its low-rank update on two devices, base weights and a batch."""
    layout = sharding.make(config.Mesh(fsdp=2), jax.devices()[:2])
    run = config.Run(
        model=model,
        data=config.Data(seq_len=T),
        optim=config.Optim(warmup_steps=0, learning_rate=0.1),
        train=config.Train(batch_size=ROWS, microbatches=2),
    )
    built = program.build(run, layout, low_rank)
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) * 0.3
    base = jax.tree.map(lambda leaf: jax.device_put(draw(leaf), leaf.sharding), built.frozen)
    rows_BU = rng.integers(0, run.model.vocab_size, (ROWS, T + 1)).astype(np.int32)
    ones = np.ones((ROWS, T), np.int32)
    weights_BT = rng.integers(0, 2, (ROWS, T)).astype(np.float32)
    arrays = (rows_BU[:, :-1], rows_BU[:, 1:], weights_BT, np.cumsum(ones, 1, np.int32) - 1, ones)
    batch = Batch(*(layout.put(np.ascontiguousarray(a), "BT", ROWS) for a in arrays))
    return run, built, base, batch


def test_frozen_weights_stay_bit_for_bit_and_the_loss_falls(model):
    run, built, base, batch = adapt(model)
    before = jax.tree.map(np.array, base)
    now = state.init(built.objective, built.tx, built.module.layout, 0)
    sums = jax.jit(loss.pretraining(run, built.module).sums)(base, {}, batch)
    now, found = built.step(now, base, batch)
    losses = [float(found.loss)]
    assert losses[0] == pytest.approx(float(sums.total / sums.weight), rel=1e-6), "b is 0"
    with jax.transfer_guard("disallow"):
        for _ in range(20):
            now, found = built.step(now, base, batch)
    assert built.step._cache_size() == 1
    assert float(found.loss) < losses[0] - 1.0
    for name, leaf in tree.paths(base).items():
        assert not leaf.is_deleted(), name
        np.testing.assert_array_equal(leaf, tree.paths(before)[name], err_msg=name)


def test_optimiser_state_and_donation_are_of_trained_parameters_alone(model):
    _, built, *_ = adapt(model)
    V, dim = model.vocab_size, model.dim
    shapes = [leaf.shape for leaf in jax.tree.leaves(built.state.opt_state) if leaf.ndim]
    assert sorted(shapes) == sorted(2 * [(dim, RANK), (RANK, V)]), "Adam's two moments of each"
    assert {**built.state.params}.keys() == {"a_DE", "b_EV"}
    compiled = built.step.lower(built.state, built.frozen, built.batch).compile()
    own = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(built.state)
    )
    assert compiled.memory_analysis().alias_size_in_bytes == pytest.approx(own, abs=64)
