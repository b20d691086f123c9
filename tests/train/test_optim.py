import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import config
from llama_jax.train import optim

SETTINGS = config.Optim(
    learning_rate=0.03, warmup_steps=3, final_fraction=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
    weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip
LETTERS = {"matrix": "LDF", "scale": "LD"}


def learning_rate(step, peak=0.03, warmup=3, steps=10, floor=0.1):
    """LLaMA section 2.3: linear from 0, then a cosine to a tenth."""
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / (steps - warmup), 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * progress)))


def adamw(params, gradients, steps=10):
    """Loshchilov and Hutter, algorithm 2, after clipping by the global norm; float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        for name in params:
            g = gradient[name] * min(1, 1 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.1 * params[name] if name == "matrix" else 0
            params[name] -= learning_rate(t - 1, steps=steps) * (direction + decay)
    return params


def test_adamw_is_the_papers_with_clipping_schedule_and_decay_on_matrices_only():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (2, 5, 3), "scale": (2, 5)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: rng.normal(size=shape).astype(np.float32) * size for name, shape in shapes.items()}
        for size in (0.01, 3, 1, 0.2, 1, 1, 2, 5, 1, 1)
    ]
    tx, _ = optim.build(SETTINGS, 10, LETTERS)
    ours, state = params, tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, value in adamw(params, gradients).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)


def test_schedule_at_every_step():
    ours = optim.schedule(SETTINGS, 10)
    for step in range(13):
        assert float(ours(step)) == pytest.approx(learning_rate(step), rel=1e-5, abs=1e-9)


def test_linear_schedule_ends_at_the_fraction():
    ours = optim.schedule(dataclasses.replace(SETTINGS, schedule="linear"), 10)
    assert float(ours(3)) == pytest.approx(0.03)
    assert float(ours(10)) == pytest.approx(0.003)
    assert float(ours(3 + 3.5)) == pytest.approx((0.03 + 0.003) / 2)


def test_wsd_holds_the_peak_and_falls_at_the_end():
    """arXiv:2404.06395: of 100 steps after warm-up the last 20."""
    settings = dataclasses.replace(SETTINGS, schedule="wsd", decay_fraction=0.2)
    ours = optim.schedule(settings, 103)
    assert [float(ours(step)) for step in (3, 50, 83)] == pytest.approx([0.03] * 3)
    assert float(ours(93)) == pytest.approx((0.03 + 0.003) / 2)
    assert float(ours(103)) == pytest.approx(0.003)


def test_inverse_square_root_falls_from_the_end_of_warm_up():
    """arXiv:1706.03762 eq. 3: step^-0.5 against step x warm-up^-1.5, which meet at the end of warm-up."""
    ours = optim.schedule(dataclasses.replace(SETTINGS, schedule="inverse_sqrt"), 100)
    for step in range(1, 100):
        expected = 0.03 * 3**0.5 * min(step**-0.5, step * 3**-1.5)
        assert float(ours(step)) == pytest.approx(expected, rel=1e-6)


def newton_schulz(matrix):
    """Five steps of Jordan's quintic towards the nearest orthogonal matrix."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_each_layers_matrices_and_leaves_the_rest_to_adamw():
    """arXiv:2502.16982 eq. 4, at the first step: momentum is the gradient."""
    letters = {"q": "LDNH", "o": "LNHD", "embed": "VD", "scale": "LD"}
    shapes = {"q": (2, 6, 2, 4), "o": (2, 2, 4, 6), "embed": (5, 6), "scale": (2, 6)}
    rng = np.random.default_rng(0)
    params, gradient = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    tx, _ = optim.build(dataclasses.replace(SETTINGS, name="muon", warmup_steps=0), 10, letters)
    updates, _ = tx.update(gradient, tx.init(params), params)
    for name, sides in (("q", (6, 8)), ("o", (8, 6))):
        for layer in range(2):
            turned = newton_schulz(gradient[name][layer].reshape(sides).astype(np.float64))
            expected = -0.03 * (0.2 * 8**0.5 * turned + 0.1 * params[name][layer].reshape(sides))
            np.testing.assert_allclose(updates[name][layer].reshape(sides), expected, atol=2e-4)
    for name, decay in (("embed", 0.1), ("scale", 0)):
        expected = -0.03 * (np.sign(gradient[name]) + decay * params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


def test_adafactor_moves_by_a_share_of_the_parameters_size():
    """arXiv:1804.04235 algorithm 4 at the first step, not factored: sign(g) x rate x rms(w); and the decay."""
    params = {"matrix": jnp.full((1, 2, 2), 3.0), "scale": jnp.full((1, 2), 0.5)}
    gradient = jax.tree.map(lambda p: -0.1 * p, params)
    tx, _ = optim.build(dataclasses.replace(SETTINGS, **ADAFACTOR), 10, LETTERS)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["scale"], 0.03 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["matrix"], 0.03 * 3 - 0.03 * 0.1 * 3, rtol=1e-5)


ADAFACTOR = dict(name="adafactor", warmup_steps=0, beta1=0.9, beta2=0.95, eps=1e-8)


def test_mup_slows_inner_matrices_alone():
    letters = {"q": "LDNH", "down": "LFD", "embed": "VD", "output": "DV", "scale": "LD"}
    shapes = {
        "q": (1, 2, 1, 2),
        "down": (1, 2, 2),
        "embed": (3, 2),
        "output": (2, 3),
        "scale": (1, 2),
    }
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    settings = dataclasses.replace(SETTINGS, warmup_steps=0, weight_decay=0.0)
    updates = {}
    for ratio in (1.0, 4.0):
        tx, _ = optim.build(settings, 10, letters, ratio)
        updates[ratio], _ = tx.update(params, tx.init(params), params)
    slower = {name: float(updates[1.0][name].mean() / updates[4.0][name].mean()) for name in params}
    assert slower == pytest.approx({"q": 4, "down": 4, "embed": 1, "output": 1, "scale": 1})


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (dict(name="lion", eps=1e-7), "optim.eps=1e-07 has no effect"),
        (dict(name="adafactor", beta1=0.8), "optim.beta1=0.8 has no effect"),
        (dict(decay_fraction=0.3), "optim.decay_fraction=0.3 has no effect"),
        (
            dict(schedule="inverse_sqrt", final_fraction=0.0),
            "optim.final_fraction=0.0 has no effect",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(settings, place):
    with pytest.raises(ValueError, match=re.escape(place)):
        config.Optim(**settings)


def test_lion_moves_by_the_sign():
    """arXiv:2302.06675 algorithm 2: update = sign(b1 m + (1 - b1) g)."""
    tx, _ = optim.build(dataclasses.replace(SETTINGS, name="lion", warmup_steps=0), 10, LETTERS)
    params = {"matrix": jnp.ones((1, 2, 2)), "scale": jnp.ones((1, 2))}
    gradient = jax.tree.map(lambda p: -0.1 * p, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["scale"], 0.03, rtol=1e-6)
    np.testing.assert_allclose(updates["matrix"], 0.03 * (1 - 0.1), rtol=1e-6)


@pytest.mark.parametrize(("field", "wrong"), [("name", "adam"), ("schedule", "cosin")])
def test_an_unknown_choice_names_the_nearest(field, wrong):
    nearest = {"name": "adamw", "schedule": "cosine"}[field]
    with pytest.raises(ValueError, match=rf"optim\.{field}='{wrong}'.*nearest: '{nearest}'"):
        optim.build(dataclasses.replace(SETTINGS, **{field: wrong}), 10, LETTERS)


def test_adamw_agrees_with_a_recorded_torch_run(shared):
    """The course's problem: linear regression from recorded inputs, torch's final weights."""
    z = np.load(shared("numerics/adamw_inputs.npz"))
    rate, betas, eps, decay = 1e-3, (0.9, 0.999), 1e-8, 0.01
    settings = config.Optim(
        learning_rate=rate, warmup_steps=0, final_fraction=1.0, beta1=betas[0], beta2=betas[1],
        eps=eps, weight_decay=decay, clip_norm=1e9,
    )  # fmt: skip
    tx, _ = optim.build(settings, 1000, "VD")
    target = lambda x: jnp.asarray([x[0] + x[1], -x[2]])

    def one(carry, x):
        w, state = carry
        gradient = jax.grad(lambda w: jnp.sum((w @ x - target(x)) ** 2))(w)
        updates, state = tx.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.asarray(z["w0"])
    (w, _), _ = jax.lax.scan(one, (w, tx.init(w)), jnp.asarray(z["x"]))
    np.testing.assert_allclose(w, z["torch_final"], atol=1e-4)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_rates_are_those_of_one_step_after_another(name):
    options = config.Optim(learning_rate=0.5, schedule=name, warmup_steps=3)
    each = optim.schedule(options, 20)
    rates = optim.rates(options, 20, 15)
    np.testing.assert_array_equal(rates, np.array([each(jnp.int32(n)) for n in range(15)]))
