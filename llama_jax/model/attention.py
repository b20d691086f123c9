"""Grouped-query self-attention (arXiv:2305.13245): K = N is multi-head, K = 1 multi-query."""

import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.init import normal, param
from llama_jax.model.kernels import KERNELS
from llama_jax.model.linear import linear
from llama_jax.model.position import rotate
from llama_jax.sharding import Layout


class Attention(nn.Module):
    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD, turns, segments_BT):
        act, initialise = self.layout.act, normal(self.config)
        product = functools.partial(linear, layout=self.layout)
        q_BNTH = act(product("BTD,DNH->BNTH", x_BTD, param(self, "q", "DNH", initialise)), "BNTH")
        k_BKTH = act(product("BTD,DKH->BKTH", x_BTD, param(self, "k", "DKH", initialise)), "BKTH")
        v_BKTH = act(product("BTD,DKH->BKTH", x_BTD, param(self, "v", "DKH", initialise)), "BKTH")
        q_BNTH = checkpoint_name(rotate(q_BNTH, turns), "q")
        k_BKTH = checkpoint_name(rotate(k_BKTH, turns), "k")
        v_BKTH = checkpoint_name(v_BKTH, "v")
        attend = KERNELS[self.config.kernel]
        out_BNTH = act(attend(q_BNTH, k_BKTH, v_BKTH, segments_BT, self.layout), "BNTH")
        return product("BNTH,NHD->BTD", out_BNTH, param(self, "o", "NHD", initialise))
