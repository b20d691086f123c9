"""What a training method gives to the step: sums to minimise, trained and frozen parameters, a batch type.

Pretraining (loss.py) is one; a fine-tuning method is another, and needs no other step or loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from llama_jax import config
from llama_jax.sharding import Layout

Weighted = tuple[jax.Array, jax.Array]  # a sum and the weight that divides it, float32 scalars


class Sums(NamedTuple):
    """What an objective adds up over a batch or microbatch, float32 scalars.

    Sums of microbatches are added before they are divided: a mean of their means is wrong where their weights
    differ. The divisor is the objective's choice: the sum of its weights, of any size and sign, or a count of
    tokens or sequences where signed weights (advantages) may cancel. A divisor of 0 counts as 1.
    """

    total: jax.Array  # what is minimised, after division by `weight`
    weight: jax.Array
    aux: dict[str, Weighted]  # what is recorded; each sum has its own divisor

    @property
    def reported(self) -> dict[str, Weighted]:
        """The sums that are recorded: "loss", and aux.

        An aux "loss" takes the place of total: pretraining's leaves z-loss out.
        """
        return {"loss": (self.total, self.weight), **self.aux}


class Objective(NamedTuple):
    """One training method for one module.

    A frozen tree holds what the sums read and no step changes: base weights under LoRA, DPO's reference, a
    teacher, a frozen tower; {} if there is nothing. It has no gradient and no optimiser state, is not saved
    and not donated, and so shares no array with the state, which is.
    """

    sums: Callable[[Any, Any, Any], Sums]  # (trained, frozen, batch) -> Sums; pure
    tokens: Callable[
        [Any], jax.Array
    ]  # batch -> tokens that it trains on, for tokens per second; float32
    init: Callable[[jax.Array], Any]  # RNG key -> trained parameters; float32
    letters: Any  # of each trained parameter, strings like "LDNH"
    frozen: Any  # shape, dtype and sharding of each frozen array (jax.ShapeDtypeStruct)
    params: Callable[
        [Any, Any], Any
    ]  # (trained, frozen) -> the module's, for evaluation and sampling
    # Shape, dtype and sharding of each array of a batch: what a step is compiled for before there are data.
    batch: Callable[[config.Run, Layout], Any]
