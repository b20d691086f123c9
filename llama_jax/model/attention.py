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
        q_BTNH = product("BTD,DNH->BTNH", x_BTD, param(self, "q", "DNH", initialise))
        k_BTKH = product("BTD,DKH->BTKH", x_BTD, param(self, "k", "DKH", initialise))
        v_BTKH = product("BTD,DKH->BTKH", x_BTD, param(self, "v", "DKH", initialise))
        q_BTNH = checkpoint_name(act(rotate(q_BTNH, turns), "BTNH"), "q")
        k_BTKH = checkpoint_name(act(rotate(k_BTKH, turns), "BTKH"), "k")
        v_BTKH = checkpoint_name(act(v_BTKH, "BTKH"), "v")
        attend = KERNELS[self.config.kernel]
        out_BTNH = act(attend(q_BTNH, k_BTKH, v_BTKH, segments_BT), "BTNH")
        return product("BTNH,NHD->BTD", out_BTNH, param(self, "o", "NHD", initialise))
