"""The training step of a run on a layout, before there are data or a state: what is compiled or planned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from llama_jax import config
from llama_jax.model import init, kernels, transformer
from llama_jax.model.transformer import Transformer
from llama_jax.sharding import Layout
from llama_jax.train import loss, optim, step
from llama_jax.train import state as train_state
from llama_jax.train.objective import Objective
from llama_jax.train.state import State


class Program(NamedTuple):
    """state, frozen and batch are the arguments of step: shapes, dtypes and shardings, no memory."""

    module: Transformer
    objective: Objective
    tx: optax.GradientTransformation
    step: Any  # jitted (state, frozen, batch) -> (state, metrics); the state is donated
    state: State
    frozen: Any
    batch: Any


def build(
    run: config.Run,
    layout: Layout,
    objective: Callable[[config.Run, Transformer], Objective] = loss.pretraining,
) -> Program:
    """The program of a training method, which `objective` makes of the run and its module.

    ValueError if the model or the batch does not divide by the layout, or a named choice is none.
    """
    kernels.check_length(run.model.kernel, run.data.seq_len)
    layout.check_rows(run.train.batch_size // run.train.microbatches)
    module = transformer.build(run.model, layout)
    made = objective(run, module)
    tx, rate = optim.build(run.optim, run.train.steps, made.letters, init.mup_ratio(run.model))
    state = train_state.abstract(made, tx, layout)
    jitted = jax.jit(
        step.make_step(made, tx, rate, run.train),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), layout.replicated),
    )
    return Program(module, made, tx, jitted, state, made.frozen, made.batch(run, layout))
