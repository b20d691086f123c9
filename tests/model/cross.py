"""A small block of cross-attention to a memory: a kind of block that the library does not have.

Flamingo's place for it (arXiv:2204.14198 section 2.2) without gates. A token that sees nothing of the memory
passes unchanged.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from llama_jax.analysis import flops, memory
from llama_jax.convert import names
from llama_jax.model import block, cache, kernels
from llama_jax.model.context import Cached, CachedMemory, Context, NoMemory
from llama_jax.model.ffn import FFNS
from llama_jax.model.linear import linear
from llama_jax.model.norm import NORMS

STATES = 5  # M


class CrossAttention(nn.Module):
    config: Any
    layout: Any

    @nn.compact
    def __call__(self, x_BTD, context: Context):
        memory, dtype = context.memory, self.config.compute_dtype
        q_BNTH = linear(self, "q", "BTD,DNH->BNTH", x_BTD, "inner")
        if isinstance(memory, CachedMemory):
            k_BKMH, v_BKMH = (cache.kept(self, name, "BKMH", dtype) for name in "kv")
            (q_BNTH,) = self.layout.heads(q_BNTH, k_BKMH)[:1]
        else:
            k_BKMH = linear(self, "k", "BMD,DKH->BKMH", memory.x_BMD, "inner")
            v_BKMH = linear(self, "v", "BMD,DKH->BKMH", memory.x_BMD, "inner")
            q_BNTH, k_BKMH, v_BKMH = self.layout.heads(q_BNTH, k_BKMH, v_BKMH)
            if isinstance(context.keys, Cached):
                whole = lambda held, new, letters: new if held.ndim == len(letters) else new[0]
                k_BKMH = cache.keep(self, "k", "BKMH", k_BKMH, whole)
                v_BKMH = cache.keep(self, "v", "BKMH", v_BKMH, whole)
        out_BNTH = kernels.attend(q_BNTH, k_BKMH, v_BKMH, memory.visible_BTM)
        return linear(self, "o", "BNTH,NHD->BTD", self.layout.act(out_BNTH, "BNTH"), "residual")


class CrossBlock(nn.Module):
    config: Any
    layout: Any

    @nn.compact
    def __call__(self, x_BTD, context: Context):
        if isinstance(context.memory, NoMemory):
            return x_BTD
        norm = lambda name: NORMS[self.config.norm](self.config, self.layout, name=name)
        sees_BT1 = jnp.any(context.memory.visible_BTM, axis=-1, keepdims=True)
        attention = CrossAttention(self.config, self.layout, name="cross_attention")
        x_BTD += sees_BT1 * attention(norm("attention_norm")(x_BTD), context)
        ffn = FFNS[self.config.ffn](self.config, self.layout, name="ffn")
        x_BTD += sees_BT1 * ffn(norm("ffn_norm")(x_BTD))
        return self.layout.act(x_BTD, "BTD")


def flops_a_token(model, seq_len):
    """Two products with M states, and the keys and values of M states a sequence rather than of T tokens."""
    attended = 12 * model.heads * model.head_dim * STATES
    keys_and_values = 2 * model.dim * model.kv_heads * model.head_dim
    return attended + 6 * keys_and_values * (STATES / seq_len - 1)


def stored_a_token(model):
    return 5 * model.dim + 2 * model.heads * model.head_dim + 3 * model.ffn_dim


ROWS = tuple(
    names.TensorRow(
        f"groups/{{block}}/{path}",
        letters,
        torch,
        f"cross_attention_layers.{{number}}.{meta}",
        f"model.layers.{{layer}}.{hf}",
        split,
    )
    for path, letters, torch, meta, hf, split in (
        ("attention_norm/scale", "D", "D", "attention_norm", "input_layernorm", ""),
        ("cross_attention/q", "DNH", "NH D", "attention.wq", "cross_attn.q_proj", "N"),
        ("cross_attention/k", "DKH", "KH D", "attention.wk", "cross_attn.k_proj", "K"),
        ("cross_attention/v", "DKH", "KH D", "attention.wv", "cross_attn.v_proj", "K"),
        ("cross_attention/o", "NHD", "D NH", "attention.wo", "cross_attn.o_proj", "N"),
        ("ffn_norm/scale", "D", "D", "ffn_norm", "post_attention_layernorm", ""),
        ("ffn/gate", "DF", "F D", "feed_forward.w1", "mlp.gate_proj", "F"),
        ("ffn/up", "DF", "F D", "feed_forward.w3", "mlp.up_proj", "F"),
        ("ffn/down", "FD", "D F", "feed_forward.w2", "mlp.down_proj", "F"),
    )
)
CACHES = {"cross_attention": {"k": "BKMH", "v": "BKMH"}}


def register(monkeypatch) -> None:
    """Enter the kind of block "cross" into every table."""
    monkeypatch.setitem(block.BLOCKS, "cross", block.Block(CrossBlock, CACHES))
    monkeypatch.setitem(flops.ATTENTION, "cross", flops_a_token)
    monkeypatch.setitem(memory.STORED, "cross", stored_a_token)
    monkeypatch.setitem(names.ROWS, "cross", ROWS)
