"""One side of the decoding comparison, in a process of its own; prints one JSON object.

    python -m benchmarks.decode ours|transformers [--batch=1] [--weights=int8]

The network of benchmarks/w1.py in float32, 2 threads: a prompt of 64 tokens, 128 new ones, greedy.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

from llama_jax import config

PROMPT, NEW, V, THREADS = 64, 128, 32_000, 2
ROUNDS = 3


def prompts(batch: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, V, (batch, PROMPT)).tolist()


def network(**changes):
    """Module and parameters, float32, tuned as the commands are."""
    from experiments import cli

    cli.tune_for_cpu()
    import jax

    from llama_jax import sharding
    from llama_jax.model import transformer

    model = config.Model(
        vocab_size=V, dim=512, layers=8, heads=8, kv_heads=4, head_dim=64, ffn_dim=1408,
        norm_eps=1e-5, compute_dtype="float32", **changes,
    )  # fmt: skip
    module = transformer.build(model, sharding.make(config.Mesh(), jax.devices()))
    return module, jax.jit(transformer.init, static_argnums=0)(module, jax.random.key(0))


def peer() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=V, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=1408, rms_norm_eps=1e-5,
        max_position_embeddings=512, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def ours(batch: int, weights: str):
    module, params = network()
    from llama_jax.decode.engine import Engine
    from llama_jax.decode.generate import Decoder, Request
    from llama_jax.model import transformer
    from llama_jax.quant.network import quantise

    if weights != "float32":
        params = quantise(module, params, QUANT[weights])
    params = transformer.unstack(module, params)
    letters: Any = _Letters()
    decoder = Decoder(Engine(module, config.Decode()), letters, (), batch, PROMPT + NEW)

    turn = 0

    def run(new: int) -> list[float]:
        """Seconds to the first text's first token, and to the end of all."""
        nonlocal turn
        turn += 1  # another beginning each time: nothing is kept of the run before
        start, heard = time.perf_counter(), []
        asked = [Request([turn, *tokens[1:]], new) for tokens in prompts(batch)]
        listen = lambda number, _: heard.append(time.perf_counter() - start) if not number else None  # noqa: E731
        done = list(decoder.run(params, asked, listen))
        assert sum(len(result.tokens) for _, result in done) == batch * new
        return [heard[0], time.perf_counter() - start]

    return run


class _Letters:
    """A tokenizer whose every id is a letter."""

    def decode(self, ids):
        return "x" * len(ids)

    def token_bytes(self, token):
        return b"x"


def transformers(batch: int, weights: str):
    import torch

    model = peer()
    tokens = torch.tensor(prompts(batch))

    def run(new: int) -> list[float]:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(tokens, max_new_tokens=1, min_new_tokens=1, do_sample=False)
        first = time.perf_counter() - start
        start = time.perf_counter()
        with torch.no_grad():
            made = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert made.shape[1] == PROMPT + new
        return [first, time.perf_counter() - start]

    return run


QUANT = {
    "int8": config.Quant(),
    "int8 x int16": config.Quant(activations="int16"),
    "int4": config.Quant(bits=4, method="nearest"),
}
SIDES = {"ours": ours, "transformers": transformers}


def bandwidth() -> float:
    """GB/s at which both threads read 256 MB."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(64 << 20)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    best = 1e9
    for _ in range(10):
        start = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--weights", choices=["float32", *QUANT], default="float32", help="ours")
    options = parser.parse_args()
    run = SIDES[options.side](options.batch, options.weights)
    run(NEW)
    found = [run(NEW) for _ in range(ROUNDS)]
    print(
        json.dumps(
            {
                "tokens_per_second": [options.batch * NEW / times[-1] for times in found],
                "first_token_seconds": [times[0] for times in found],
                "bandwidth": bandwidth() if options.side == "ours" else 0,
            }
        )
    )


if __name__ == "__main__":
    main()
