"""The training step of a run on a layout, before there are data or a state: what is compiled or planned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from llama_jax import config
from llama_jax.data import iterator
from llama_jax.data.batch import Batch
from llama_jax.model import init, kernels, transformer
from llama_jax.model.transformer import Transformer
from llama_jax.sharding import Layout
from llama_jax.train import loss, optim, step
from llama_jax.train import state as train_state
from llama_jax.train.state import State


class Program(NamedTuple):
    module: Transformer
    tx: optax.GradientTransformation
    objective: Callable[[Any, Batch], loss.Sums]
    step: Any  # jitted (state, batch) -> (state, metrics); the state is donated
    state: State  # shapes and places, no memory
    batch: Batch  # likewise


def build(run: config.Run, layout: Layout) -> Program:
    """ValueError if the model or the batch does not divide by the layout, or a named choice is none."""
    kernels.check_length(run.model.kernel, run.data.seq_len)
    layout.check_rows(run.train.batch_size // run.train.microbatches)
    module = transformer.build(run.model, layout)
    letters, ratio = transformer.letters(module), init.mup_ratio(run.model)
    tx = optim.build(run.optim, run.train.steps, letters, ratio)
    objective = loss.next_token(module, run.train.loss_chunks, run.train.z_loss, run.data.segments)
    rate = optim.schedule(run.optim, run.train.steps)
    places = train_state.shardings(module, tx, layout)
    jitted = jax.jit(
        step.make_step(objective, tx, rate, run.train),
        donate_argnums=0,
        out_shardings=(places, layout.replicated),
    )
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        train_state.abstract(module, tx),
        places,
    )
    return Program(module, tx, objective, jitted, state, iterator.abstract(run, layout))
