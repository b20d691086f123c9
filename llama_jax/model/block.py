"""One layer: pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.attention import Attention
from llama_jax.model.ffn import FFNS
from llama_jax.model.norm import NORMS
from llama_jax.sharding import Layout


class SelfBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)) (arXiv:2302.13971 section 2.2)."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD, turns, segments_BT):
        act, norm = self.layout.act, NORMS[self.config.norm]
        normed_BTD = norm(self.config, self.layout, name="attention_norm")(x_BTD)
        attention = Attention(self.config, self.layout, name="attention")
        attended_BTD = act(attention(normed_BTD, turns, segments_BT), "BTD")
        x_BTD = x_BTD + checkpoint_name(attended_BTD, "attention_out")
        normed_BTD = norm(self.config, self.layout, name="ffn_norm")(x_BTD)
        normed_BTD = self.layout.materialise(normed_BTD)
        ffn = FFNS[self.config.ffn](self.config, self.layout, name="ffn")
        return x_BTD + checkpoint_name(act(ffn(normed_BTD), "BTD"), "ffn_out")


BLOCKS = {"self": SelfBlock}
