"""LLaMA's own training step is computed as if there were no other choices.

Operations of the traced step (jaxpr, inner ones included), by kind, as they were before there were any. When the
step is changed on purpose, take the new counts from the failing test's message; when a new choice changes
them, it costs everybody something.
"""

import collections

import jax
import pytest

from configs import tiny
from llama_jax import config, sharding
from llama_jax.train import program

COUNTS = {
    "abs": 1, "add": 153, "add_any": 5, "and": 1, "broadcast_in_dim": 105, "concatenate": 10,
    "convert_element_type": 31, "copy": 14, "cos": 3, "custom_vjp_call": 16, "div": 75, "dot_general":
    43, "eq": 3, "exp": 6, "gather": 1, "ge": 6, "integer_pow": 29, "iota": 13, "is_finite": 3, "jit":
    66, "log": 1, "logistic": 2, "lt": 7, "max": 7, "min": 4, "mul": 149, "name": 30, "ne": 1, "neg": 2,
    "not": 1, "pad": 4, "pow": 4, "reduce_max": 5, "reduce_sum": 45, "reshape": 56, "reshard": 1,
    "rsqrt": 3, "scan": 3, "scatter-add": 1, "select_n": 68, "sign": 1, "sin": 1, "slice": 12, "sqrt":
    14, "square": 52, "stop_gradient": 5, "sub": 24, "tile": 6, "transpose": 19,
}  # fmt: skip


def operations(jaxpr) -> collections.Counter:
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    found += operations(part)
    return found


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="counts are of the pinned JAX")
def test_the_step_has_the_operations_that_it_had():
    run = config.Run(
        model=tiny.MODEL, data=config.Data(seq_len=256), train=config.Train(batch_size=8)
    )
    built = program.build(run, sharding.make(config.Mesh(fsdp=1), jax.devices()[:1]))
    found = operations(built.step.trace(built.state, built.frozen, built.batch).jaxpr.jaxpr)
    assert dict(found) == COUNTS
