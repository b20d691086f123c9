"""Optimisers and learning-rate schedules, from optax."""

from typing import Any

import jax
import optax

from llama_jax import config


def build(optim: config.Optim, steps: int, letters: Any) -> optax.GradientTransformation:
    """Clip by global norm, then the optimiser; weight decay on matrices only, chosen by letters."""
    optimiser = config.choose(OPTIMISERS, optim.name, "optim.name")
    is_matrix = jax.tree.map(lambda label: len(label.replace("L", "")) >= 2, letters)
    rate = schedule(optim, steps)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm), optimiser(optim, rate, is_matrix)
    )


def schedule(optim: config.Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the named decay to `final_fraction` of it."""
    decay = config.choose(SCHEDULES, optim.schedule, "optim.schedule")
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps),
            decay(optim, steps - optim.warmup_steps),
        ],
        [optim.warmup_steps],
    )


def _adamw(optim, rate, is_matrix):
    """arXiv:1711.05101 algorithm 2."""
    decay = dict(weight_decay=optim.weight_decay, mask=is_matrix)
    return optax.adamw(rate, b1=optim.beta1, b2=optim.beta2, eps=optim.eps, **decay)


def _lion(optim, rate, is_matrix):
    """arXiv:2302.06675; wants a learning rate 3 to 10 times smaller than AdamW's. eps has no part."""
    decay = dict(weight_decay=optim.weight_decay, mask=is_matrix)
    return optax.lion(rate, b1=optim.beta1, b2=optim.beta2, **decay)


def _cosine(optim, steps):
    return optax.cosine_decay_schedule(optim.learning_rate, steps, alpha=optim.final_fraction)


def _linear(optim, steps):
    return optax.linear_schedule(
        optim.learning_rate, optim.learning_rate * optim.final_fraction, steps
    )


OPTIMISERS = {"adamw": _adamw, "lion": _lion}
SCHEDULES = {"cosine": _cosine, "linear": _linear}
