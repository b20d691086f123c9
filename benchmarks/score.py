"""One side of the log-likelihood comparison, in a process of its own; prints tokens/s as JSON.

    python -m benchmarks.score ours|transformers

Nats of every token of 8 rows of 512, the network of benchmarks/w1.py in float32, 2 threads.
"""

import json
import statistics
import sys
import time

import numpy as np

from benchmarks.decode import V, network, peer

B, T, ROUNDS = 8, 512, 5


def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)


def ours():
    module, params = network(unroll=8)
    from llama_jax.eval import score

    return lambda: np.asarray(score.token_nll(module, params, rows()))


def transformers():
    import torch

    model, tokens = peer(), torch.from_numpy(rows().astype(np.int64))

    @torch.no_grad()
    def run():
        logits = model(tokens[:, :-1]).logits.reshape(-1, V)
        return torch.nn.functional.cross_entropy(
            logits, tokens[:, 1:].reshape(-1), reduction="none"
        )

    return run


def main() -> None:
    run = {"ours": ours, "transformers": transformers}[sys.argv[1]]()
    run()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(B * T / statistics.median(seconds)))


if __name__ == "__main__":
    main()
