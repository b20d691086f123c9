"""Every published text network of the family, and research sizes in LLaMA's proportions.

Sources: LLaMA arXiv:2302.13971 table 2; Llama 2 arXiv:2307.09288 table 1; Llama 3 arXiv:2407.21783
table 3; Llama 3.2 its model card; ffn widths, eps, theta and rope scaling from the checkpoints'
params.json and config.json. Exact parameter counts are tested in tests/house/test_published_sizes.py.
"""

import dataclasses

from llama_jax.config import Model, Rope


def _model(dim, layers, heads, kv_heads, ffn_dim, **rest) -> Model:
    rest = {"head_dim": dim // heads, **rest}
    return Model(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, ffn_dim=ffn_dim, **rest)


def _published(*sizes, **rest) -> Model:
    """Layers recomputed in the backward pass: what lets the large ones fit."""
    return _model(*sizes, remat="full", **rest)


# LLaMA 1: eps 1e-6, but 1e-5 for 65B.
LLAMA_7B = _published(4096, 32, 32, 32, 11_008)
LLAMA_13B = _published(5120, 40, 40, 40, 13_824)
LLAMA_33B = _published(6656, 60, 52, 52, 17_920)
LLAMA_65B = _published(8192, 80, 64, 64, 22_016, norm_eps=1e-5)

LLAMA2_7B = dataclasses.replace(LLAMA_7B, norm_eps=1e-5)
LLAMA2_13B = dataclasses.replace(LLAMA_13B, norm_eps=1e-5)
LLAMA2_70B = _published(8192, 80, 64, 8, 28_672, norm_eps=1e-5)

_LLAMA3 = dict(vocab_size=128_256, norm_eps=1e-5, rope=Rope(theta=500_000.0))
LLAMA3_8B = _published(4096, 32, 32, 8, 14_336, **_LLAMA3)
LLAMA3_70B = _published(8192, 80, 64, 8, 28_672, **_LLAMA3)

_LLAMA31 = {**_LLAMA3, "rope": Rope(theta=500_000.0, factor=8.0)}
LLAMA31_8B = _published(4096, 32, 32, 8, 14_336, **_LLAMA31)
LLAMA31_70B = _published(8192, 80, 64, 8, 28_672, **_LLAMA31)
LLAMA31_405B = _published(16_384, 126, 128, 8, 53_248, **_LLAMA31)

# 32, not 8: with 8 the text falls apart past 80k tokens (meta-llama/llama-models issue 241).
_LLAMA32 = {**_LLAMA3, "rope": Rope(theta=500_000.0, factor=32.0), "output": "tied"}
LLAMA32_1B = _published(2048, 16, 32, 8, 8192, **_LLAMA32)
LLAMA32_3B = _published(3072, 28, 24, 8, 8192, **_LLAMA32)

# Research sizes: heads of 64 or 128 (16 for the smallest), ffn 8/3 of the width in multiples of 32. Those for
# a laptop compute in float32, which its CPU does faster.
RESEARCH_300K = _model(64, 4, 4, 4, 160, vocab_size=1024, compute_dtype="float32")
RESEARCH_1M = _model(96, 6, 6, 6, 256, vocab_size=2048, compute_dtype="float32")
RESEARCH_10M = _model(256, 8, 4, 4, 704, vocab_size=8192, compute_dtype="float32")
RESEARCH_60M = _model(512, 10, 8, 8, 1376)
# Heads of 128, as LLaMA's: of 64 fill half the lanes of a TPU, a fifth more cycles at 150M (LOG.md).
RESEARCH_150M = _model(768, 14, 6, 6, 2048)
RESEARCH_350M = _model(1024, 24, 8, 8, 2752)
RESEARCH_1B = _model(2048, 18, 16, 16, 5472)
