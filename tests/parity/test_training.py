"""Gradients against torch's autograd, and fifty steps of AdamW against torch's, in float32."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.model import transformer
from llama_jax.train import loss, optim, state, step
from tests.parity import twin
from tests.parity.twin import torch

VARIED = ("7b", "llama2_70b", "llama31_8b", "llama31_405b", "llama32_1b", "llama32_3b")


@pytest.mark.parametrize(
    ("stem", "kernel"),
    [(stem, "blockwise") for stem in VARIED]
    + [(stem, "reference") for stem in ("llama2_70b", "llama32_1b")],
)
def test_gradient_of_every_parameter_is_that_of_autograd(stem, kernel, layout):
    model = twin.tiny(stem, kernel=kernel)
    rows = twin.packed(model)
    counted = rows.weights_BT[rows.segments_BT > 0]
    assert {0, 0.25, 1} == set(counted.tolist())
    ours, theirs = twin.gradients(model, layout, rows)
    assert len(ours) == 9 * model.layers + (2 if model.output == "tied" else 3)
    worst = {name: twin.distance(ours[name], gradient) for name, gradient in theirs.items()}
    assert max(worst.values()) <= twin.GRADIENTS, worst


STEPS, WARMUP = 50, 8


def their_rate(warmup=WARMUP, floor=0.1):
    """As a part of the peak, after so many steps: linear from 0, then "a cosine learning rate schedule,
    such that the final learning rate is equal to 10% of the maximal" (arXiv:2302.13971 section 2.3)."""

    def rate(done):
        if done < warmup:
            return done / warmup
        progress = (done - warmup) / (STEPS - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return rate


def their_curve(model, layout, settings, batches, rate=None, decayed=2):
    """Loss and gradient norm of each step by torch; tensors of `decayed` dimensions or more decay."""
    _, params = twin.network(model, layout)
    their_model = twin.llama(model, params)
    every = list(their_model.parameters())
    groups = [
        dict(params=[p for p in every if p.ndim >= decayed], weight_decay=settings.weight_decay),
        dict(params=[p for p in every if p.ndim < decayed], weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, rate or their_rate())
    curve = []
    for rows in batches:
        adamw.zero_grad()
        value = twin.their_loss(their_model, rows)
        value.backward()
        # Its coefficient is clip / (norm + 1e-6), ours clip / norm: 1e-6 apart where it acts, norm > 1.
        norm = torch.nn.utils.clip_grad_norm_(every, settings.clip_norm)
        adamw.step()
        schedule.step()
        curve.append((value.item(), norm.item()))
    return np.array(curve).T


def our_curve(model, layout, settings, batches):
    module, params = twin.network(model, layout)
    tx, rate = optim.build(settings, STEPS, transformer.letters(module))
    train = config.Train(steps=STEPS, batch_size=2)
    objective = loss.next_token(module)
    advance = jax.jit(step.make_step(objective, tx, rate, train))
    now = state.init(objective, tx, layout, 0)
    params = jax.tree.map(jnp.asarray, params)
    now = now.replace(params=params, opt_state=tx.init(params))
    curve = []
    for rows in batches:
        now, metrics = advance(now, {}, rows)
        curve.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(curve).T


def course(stem):
    """LLaMA's AdamW, its betas, eps, decay and clipping, for fifty steps through five batches."""
    settings = dataclasses.replace(twin.page("7b").optim, learning_rate=1e-3, warmup_steps=WARMUP)
    model = twin.tiny(stem)
    return model, settings, [twin.packed(model, seed % 5) for seed in range(STEPS)]


@pytest.mark.parametrize("stem", [pytest.param("65b", marks=pytest.mark.slow), "llama32_1b"])
def test_fifty_steps_of_adamw_have_the_losses_of_torch(stem, layout):
    model, settings, batches = course(stem)
    losses, norms = our_curve(model, layout, settings, batches)
    their_losses, their_norms = their_curve(model, layout, settings, batches)
    clipped = norms > settings.clip_norm
    assert 5 < clipped.sum() < STEPS - 5
    np.testing.assert_array_equal(clipped, their_norms > settings.clip_norm)
    assert losses[0] > 8
    assert losses[-1] < 0.1
    assert np.abs(losses - their_losses).max() <= twin.LOSS


OTHERWISE = {
    "no decay": dict(optim=dict(weight_decay=0.0)),
    "decay of scales too": dict(decayed=1),
    "beta2 0.999": dict(optim=dict(beta2=0.999)),
    "no clipping": dict(optim=dict(clip_norm=1e9)),
    "warm-up a step longer": dict(rate=their_rate(warmup=WARMUP + 1)),
    "cosine to 9%": dict(rate=their_rate(floor=0.09)),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_training_otherwise_misses_the_bound_fivefold(otherwise, layout):
    model, settings, batches = course("65b")
    losses, _ = their_curve(model, layout, settings, batches)
    change = dict(OTHERWISE[otherwise])
    settings = dataclasses.replace(settings, **change.pop("optim", {}))
    wrong, _ = their_curve(model, layout, settings, batches, **change)
    assert np.abs(wrong - losses).max() > 5 * twin.LOSS
