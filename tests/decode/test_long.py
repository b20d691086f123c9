"""Texts as long as Llama 3.1 reads, on a network as small as one can be."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config
from llama_jax.decode import engine as engines
from llama_jax.decode.engine import Engine
from llama_jax.model import cache, transformer
from tests import oracle

TINY = config.Model(
    vocab_size=64, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_dim=16, norm_eps=1e-5,
    compute_dtype="float32", rope=config.Rope(theta=500_000.0, factor=8.0),
)  # fmt: skip


def test_chunks_of_a_long_text_are_small(layout, monkeypatch):
    """A chunk's scores do not grow with the text."""
    module = transformer.build(TINY, layout)
    params = jax.jit(transformer.init, static_argnums=0)(module, jax.random.key(0))
    engine, params = Engine(module, config.Decode()), transformer.unstack(module, params)
    sizes = []
    begin = engines.begin
    monkeypatch.setattr(engines, "begin", lambda *a: sizes.append(len(a[4])) or begin(*a))
    for length, largest in ((2000, 512), (100_000, 64), (130_000, 64)):
        sizes.clear()
        engine.begin(params, engine.rows(1, length), 0, [1] * 700, jax.random.key(0))
        assert max(sizes) == largest


def last_logprobs(params, tokens, window):
    """Of the token after all, float64, for one layer of one head: the last query against all keys."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layer = jax.tree.map(lambda leaf: leaf[0], weights["groups"]["self_0"])
    norm = lambda x, where: oracle.rms_norm(x, where["scale"], TINY.norm_eps)
    x = weights["embed"][np.array(tokens)]
    h, attention = norm(x, layer["attention_norm"]), layer["attention"]
    q, k, v = (h @ attention[name][:, 0] for name in "qkv")
    rope = TINY.rope
    frequencies = oracle.llama3_frequencies(
        8,
        rope.theta,
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        rope.original_length,
    )
    # Only the distance counts: the last query is turned ahead of each key.
    back = np.arange(len(tokens))[::-1]
    turned = (k[:, :4] + 1j * k[:, 4:]) * np.exp(-1j * back[:, None] * frequencies)
    scores = np.concatenate([turned.real, turned.imag], axis=1) @ q[-1] / np.sqrt(8)
    if window:
        scores[back >= window] = -np.inf
    share = np.exp(scores - scores.max())
    x = x[-1] + (share / share.sum()) @ v @ attention["o"][0]
    h, ffn = norm(x, layer["ffn_norm"]), layer["ffn"]
    x = x + (oracle.silu(h @ ffn["gate"]) * (h @ ffn["up"])) @ ffn["down"]
    logits = norm(x, weights["norm"]) @ weights["output"]
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize("length", [9_000, pytest.param(131_000, marks=pytest.mark.slow)])
def test_a_long_prompt_is_read_to_its_beginning(layout, window, length):
    """Through the cache in chunks; with a window the cache keeps 4,608 places."""
    module = transformer.build(dataclasses.replace(TINY, window=window), layout)
    params = jax.jit(transformer.init, static_argnums=0)(module, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 2 else leaf, params)
    tokens = np.random.default_rng(0).integers(0, 64, length).tolist()
    wanted = last_logprobs(params, tokens, window)
    engine, params = Engine(module, config.Decode()), transformer.unstack(module, params)
    rows, said = engine.begin(params, engine.rows(1, length + 8), 0, tokens, jax.random.key(0))
    assert said.tokens_BX[0, 0] == wanted.argmax()
    assert float(said.logprobs_BX[0, 0]) == pytest.approx(wanted.max(), abs=1e-5)
    assert cache.slots(engine.module, rows.cache) == (
        4608 if window else 9216 if length == 9_000 else 131_072
    )
    _, said = engine.advance(params, rows)
    assert np.isfinite(said.logprobs_BX).all()
