"""One side of the training-step comparison, in a process of its own; prints one JSON object.

    python -m benchmarks.w1 ours|transformers|tunix [--steps=3]

The network: width 512, 8 layers, 8 heads, 4 key heads, ffn 1408, vocabulary 32000; 8 rows of 512 tokens;
float32, AdamW with clipping, nothing recomputed, 2 threads.
"""

import argparse
import dataclasses
import json
import resource
import time
from typing import Any

import numpy as np

B, T, V = 8, 512, 32_000
TOKENS = B * T
THREADS = 2


def rows() -> np.ndarray:
    """[B, T+1] tokens of a fixed seed."""
    return np.random.default_rng(0).integers(0, V, (B, T + 1))


def ours(model_changes=None):
    from experiments import cli

    cli.tune_for_cpu()
    import jax

    from llama_jax import config, sharding
    from llama_jax.data.batch import Batch
    from llama_jax.model import transformer
    from llama_jax.train import loss, optim, state, step

    model = config.Model(
        vocab_size=V, dim=512, layers=8, heads=8, kv_heads=4, head_dim=64, ffn_dim=1408,
        norm_eps=1e-5, compute_dtype="float32", unroll=8,
    )  # fmt: skip
    model = dataclasses.replace(model, **(model_changes or {}))
    layout = sharding.make(config.Mesh(), jax.devices())
    module = transformer.build(model, layout)
    optimiser = config.Optim(warmup_steps=0)
    tx, rate = optim.build(optimiser, 100, transformer.letters(module))
    settings = config.Train(batch_size=B, loss_chunks=4)
    objective = loss.next_token(module, settings.loss_chunks)
    advance = step.make_step(objective, tx, rate, settings)
    now = state.init(objective, tx, layout, seed=0)
    tokens = rows().astype(np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    one = np.ones((B, T), np.int32)
    arrays = (tokens[:, :-1], tokens[:, 1:], one.astype(np.float32), places, one)
    batch = Batch(*(layout.put(np.ascontiguousarray(a), "BT", B) for a in arrays))
    compiled = jax.jit(advance, donate_argnums=0).lower(now, {}, batch).compile()

    def one_step():
        nonlocal now
        now, metrics = compiled(now, {}, batch)
        return float(metrics.loss)

    return one_step


def transformers():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=V, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=1408, rms_norm_eps=1e-5,
        max_position_embeddings=T, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(rows())

    def one_step():
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), tokens[:, 1:].reshape(-1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return float(loss)

    return one_step


def tunix():
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3 import (  # pyright: ignore[reportMissingImports]  (of extra "bench")
        model as llama3,
    )

    settings = llama3.ModelConfig(
        num_layers=8, vocab_size=V, embed_dim=512, hidden_dim=1408, num_heads=8, head_dim=64,
        num_kv_heads=4, rope_theta=10_000, norm_eps=1e-5, weight_tying=False,
    )  # fmt: skip
    model = llama3.Llama3(settings, rngs=nnx.Rngs(0))
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask),
    )
    optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
    tokens = jnp.asarray(rows(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))

    @nnx.jit(donate_argnums=(0, 1))
    def advance(model, optimiser):
        def loss(model):
            logits, _ = model(tokens[:, :-1], positions, None, causal)
            logits = logits.astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimiser.update(model, gradient)
        return value

    return lambda: float(advance(model, optimiser))


SIDES = {"ours": ours, "transformers": transformers, "tunix": tunix}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--change", type=json.loads, default={}, help="of our model, as JSON")
    options = parser.parse_args()
    one_step = ours(options.change) if options.side == "ours" else SIDES[options.side]()
    losses, seconds = [one_step()], []
    for _ in range(options.steps):
        start = time.perf_counter()
        losses.append(one_step())
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time()
    print(
        json.dumps(
            {
                "tokens_per_second": [TOKENS / s for s in seconds],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "cpu_seconds": cpu,
                "losses": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
