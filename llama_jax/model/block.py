"""One layer: attention and a feed-forward network, each added to the residual stream x.

A kind of block is an entry of BLOCKS, and of the tables by kind of block: what it costs (analysis/flops.py,
memory.py), and what its tensors are called elsewhere (convert/names.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model import cache
from llama_jax.model.attention import Attention
from llama_jax.model.context import Context
from llama_jax.model.ffn import FFNS
from llama_jax.model.norm import NORMS
from llama_jax.sharding import Layout


class SelfBlock(nn.Module):
    """Self-attention and feed-forward, norms and residuals placed as `config.placement` says."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        def norm(name, x_BTD):
            return NORMS[self.config.norm](self.config, self.layout, name=name)(x_BTD)

        def attention(x_BTD):
            out_BTD = Attention(self.config, self.layout, name="attention")(x_BTD, context)
            return checkpoint_name(self.layout.act(out_BTD, "BTD"), "attention_out")

        def ffn(x_BTD):
            network = FFNS[self.config.ffn](self.config, self.layout, name="ffn")
            out_BTD = network(self.layout.materialise(x_BTD))
            return checkpoint_name(self.layout.act(out_BTD, "BTD"), "ffn_out")

        return PLACEMENTS[self.config.placement].layer(x_BTD, attention, ffn, norm)


Part = Callable[[jax.Array], jax.Array]
Norm = Callable[[str, jax.Array], jax.Array]  # by name


def pre(x: jax.Array, attention: Part, ffn: Part, norm: Norm) -> jax.Array:
    """LLaMA's (arXiv:2302.13971 section 2.2)."""
    x = x + attention(norm("attention_norm", x))
    return x + ffn(norm("ffn_norm", x))


def post(x: jax.Array, attention: Part, ffn: Part, norm: Norm) -> jax.Array:
    """The first transformer's (arXiv:1706.03762 section 3.1)."""
    x = norm("attention_norm", x + attention(x))
    return norm("ffn_norm", x + ffn(x))


def sandwich(x: jax.Array, attention: Part, ffn: Part, norm: Norm) -> jax.Array:
    """Before and after (CogView, arXiv:2105.13290 section 2.4)."""
    x = x + norm("attention_out_norm", attention(norm("attention_norm", x)))
    return x + norm("ffn_out_norm", ffn(norm("ffn_norm", x)))


def parallel(x: jax.Array, attention: Part, ffn: Part, norm: Norm) -> jax.Array:
    """Both from one norm, at once (arXiv:2204.02311 section 2)."""
    normed = norm("attention_norm", x)
    return x + attention(normed) + ffn(normed)


class Placement(NamedTuple):
    layer: Callable
    norm_embedding: bool = False
    norm_output: bool = True  # of the last layer


# peri: sandwich, and a norm of the embedding (arXiv:2502.02732 section 3.3).
PLACEMENTS = {
    "pre": Placement(pre),
    "post": Placement(post, norm_output=False),  # there is one
    "sandwich": Placement(sandwich),
    "peri": Placement(sandwich, norm_embedding=True),
    "parallel": Placement(parallel),
}


class Block(NamedTuple):
    """A kind of block: `module(config, layout, name=...)` maps x_BTD and a `Context` to x_BTD."""

    module: Callable
    caches: dict[
        str, dict[str, str]
    ]  # by submodule and name: the letters of what it caches (cache.py)


BLOCKS = {"self": Block(SelfBlock, {"attention": cache.KEYS_AND_VALUES})}
