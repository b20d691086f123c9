"""Grouped-query self-attention (arXiv:2305.13245): K = N is multi-head, K = 1 multi-query."""

import functools

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model import cache
from llama_jax.model.context import Cached, Context
from llama_jax.model.init import dense_param
from llama_jax.model.kernels import KERNELS, ScoreRule
from llama_jax.model.linear import linear
from llama_jax.model.norm import NORMS
from llama_jax.model.position import rotate
from llama_jax.sharding import Layout


class Attention(nn.Module):
    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        config, act, where = self.config, self.layout.act, context.where
        q_BNTH = act(linear(self, "q", "BTD,DNH->BNTH", x_BTD, "inner"), "BNTH")
        k_BKTH = act(linear(self, "k", "BTD,DKH->BKTH", x_BTD, "inner"), "BKTH")
        v_BKTH = act(linear(self, "v", "BTD,DKH->BKTH", x_BTD, "inner"), "BKTH")
        if config.bias in ("qkv", "all"):
            zeros = nn.initializers.zeros
            q_BNTH += dense_param(self, "q_bias", "NH", zeros)[:, None]
            k_BKTH += dense_param(self, "k_bias", "KH", zeros)[:, None]
            v_BKTH += dense_param(self, "v_bias", "KH", zeros)[:, None]
        if config.qk_norm != "none":  # arXiv:2302.05442 section 2, a scale for each entry of a head
            norm = functools.partial(NORMS[config.qk_norm], config, self.layout, "H")
            q_BNTH, k_BKTH = norm(name="q_norm")(q_BNTH), norm(name="k_norm")(k_BKTH)
        q_BNTH = checkpoint_name(rotate(q_BNTH, where.turns), "q")
        k_BKTH = checkpoint_name(rotate(k_BKTH, where.turns), "k")
        v_BKTH = checkpoint_name(v_BKTH, "v")
        scores = ScoreRule(config.window, config.softcap, where.bias_NS)
        qkv = q_BNTH, k_BKTH, v_BKTH
        if isinstance(context.keys, Cached):
            out_BNTH = cache.attend(self, *qkv, context, scores)
        else:
            out_BNTH = KERNELS[config.kernel](*qkv, context.keys, self.layout, scores)
        out_BNTH = act(out_BNTH, "BNTH")
        out_BTD = linear(self, "o", "BNTH,NHD->BTD", out_BNTH, "residual")
        if config.bias == "all":
            out_BTD += dense_param(self, "o_bias", "D", nn.initializers.zeros)
        return out_BTD
