"""Optimisers and learning-rate schedules, from optax."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from llama_jax import config, dims


class Optimiser(NamedTuple):
    tx: optax.GradientTransformation
    rate: optax.Schedule  # the learning rates that it takes


def build(optim: config.Optim, steps: int, letters: Any, mup_ratio: float = 1.0) -> Optimiser:
    """Clip by global norm, then the optimiser; weight decay on matrices only, chosen by letters.

    mup_ratio divides the learning rate of inner matrices, and so their decay (muP, arXiv:2203.03466 table 8,
    Adam).
    """
    optimiser, rate = config.choose(OPTIMISERS, optim.name, "optim.name"), schedule(optim, steps)
    parts = [optax.clip_by_global_norm(optim.clip_norm), optimiser(optim, rate, letters)]
    if mup_ratio != 1:
        slower = lambda label, update: update / (mup_ratio if dims.is_inner(label) else 1)  # noqa: E731
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(slower, letters, updates)))
    return Optimiser(optax.chain(*parts), rate)


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


def rates(optim: config.Optim, steps: int, count: int) -> np.ndarray:
    """The learning rates of the first `count` steps, float32."""
    return np.asarray(jax.vmap(schedule(optim, steps))(np.arange(count, dtype=np.int32)))


def _adamw(optim, rate, letters):
    """arXiv:1711.05101 algorithm 2."""
    decay = dict(weight_decay=optim.weight_decay, mask=jax.tree.map(dims.is_matrix, letters))
    return optax.adamw(rate, b1=optim.beta1, b2=optim.beta2, eps=optim.eps, **decay)


def _lion(optim, rate, letters):
    """arXiv:2302.06675; wants a learning rate 3 to 10 times smaller than AdamW's."""
    decay = dict(weight_decay=optim.weight_decay, mask=jax.tree.map(dims.is_matrix, letters))
    return optax.lion(rate, b1=optim.beta1, b2=optim.beta2, **decay)


def _adafactor(optim, rate, letters):
    """arXiv:1804.04235 algorithm 4, without momentum, at the schedule's rate."""
    # optax adds its decay after the learning rate: it is given as the others' at the peak.
    decay = dict(
        weight_decay_rate=optim.weight_decay * optim.learning_rate or None,
        weight_decay_mask=jax.tree.map(dims.is_matrix, letters),
    )
    return optax.adafactor(rate, **decay)


def _muon(optim, rate, letters):
    """Inner matrices by orthogonalised momentum, scaled to AdamW's usual size (arXiv:2502.16982 eq. 4).

    The rest by AdamW. Both at AdamW's learning rate.
    """

    def axes(params):
        """Which axes of each matrix are inputs and which outputs; of L each entry is a matrix."""
        one = lambda label, of: of if isinstance(of, optax.MaskedNode) else _sides(label)  # noqa: E731
        return jax.tree.map(one, letters, params)

    orthogonal = optax.contrib.muon(
        rate,
        weight_decay=optim.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=axes,
    )
    return optax.partition(
        {True: orthogonal, False: _adamw(optim, rate, letters)},
        jax.tree.map(dims.is_inner, letters),
    )


def _sides(label: str) -> optax.contrib.MuonDimensionNumbers:
    sizes, narrow = dims.unstacked(label), dims.width(label)
    outputs = sizes[1:] if sizes[0] == narrow else narrow
    places = {letter: i for i, letter in enumerate(label)}
    inputs = [places[letter] for letter in sizes if letter not in outputs]
    return optax.contrib.MuonDimensionNumbers(inputs, [places[letter] for letter in outputs])


def _cosine(optim, steps):
    return optax.cosine_decay_schedule(optim.learning_rate, steps, alpha=optim.final_fraction)


def _linear(optim, steps):
    return optax.linear_schedule(
        optim.learning_rate, optim.learning_rate * optim.final_fraction, steps
    )


def _wsd(optim, steps):
    """Warm-up, stable, decay (arXiv:2404.06395 section 4): the peak, and at the end a line down."""
    stable = round(steps * (1 - optim.decay_fraction))
    return optax.join_schedules(
        [optax.constant_schedule(optim.learning_rate), _linear(optim, steps - stable)], [stable]
    )


def _inverse_sqrt(optim, steps):
    """arXiv:1706.03762 eq. 3, so scaled that it begins at the peak, where warm-up ends."""
    warm = max(optim.warmup_steps, 1)
    return lambda step: optim.learning_rate * (warm / (step + warm)) ** 0.5


OPTIMISERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
SCHEDULES = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
