"""A position scheme by itself."""

from typing import Any

import flax.linen as nn

from llama_jax.model.position import Where


def apply(scheme, model, layout, params: dict, positions_BT) -> Where:
    """What the scheme gives to a network that has these parameters."""

    class Alone(nn.Module):
        config: Any
        layout: Any

        @nn.compact
        def __call__(self, positions_BT):
            return scheme(self, positions_BT, positions_BT.shape[1])

    return Alone(model, layout).apply({"params": params}, positions_BT)
