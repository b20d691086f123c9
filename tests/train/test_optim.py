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
    tx = optim.build(SETTINGS, 10, LETTERS)
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
    import dataclasses

    ours = optim.schedule(dataclasses.replace(SETTINGS, schedule="linear"), 10)
    assert float(ours(3)) == pytest.approx(0.03)
    assert float(ours(10)) == pytest.approx(0.003)
    assert float(ours(3 + 3.5)) == pytest.approx((0.03 + 0.003) / 2)


def test_lion_moves_by_the_sign():
    """arXiv:2302.06675 algorithm 2: update = sign(b1 m + (1 - b1) g)."""
    import dataclasses

    tx = optim.build(dataclasses.replace(SETTINGS, name="lion", warmup_steps=0), 10, LETTERS)
    params = {"matrix": jnp.ones((1, 2, 2)), "scale": jnp.ones((1, 2))}
    gradient = jax.tree.map(lambda p: -0.1 * p, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["scale"], 0.03, rtol=1e-6)
    np.testing.assert_allclose(updates["matrix"], 0.03 * (1 - 0.1), rtol=1e-6)


@pytest.mark.parametrize(("field", "wrong"), [("name", "adam"), ("schedule", "cosin")])
def test_an_unknown_choice_names_the_nearest(field, wrong):
    import dataclasses

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
    tx = optim.build(settings, 1000, "VD")
    target = lambda x: jnp.asarray([x[0] + x[1], -x[2]])

    def one(carry, x):
        w, state = carry
        gradient = jax.grad(lambda w: jnp.sum((w @ x - target(x)) ** 2))(w)
        updates, state = tx.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.asarray(z["w0"])
    (w, _), _ = jax.lax.scan(one, (w, tx.init(w)), jnp.asarray(z["x"]))
    np.testing.assert_allclose(w, z["torch_final"], atol=1e-4)
