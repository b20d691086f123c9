"""One side of a log-likelihood comparison, in a process of its own; prints a rate as JSON.

    python -m benchmarks.score ours|transformers
    python -m benchmarks.score choices|whole_rows

The network of benchmarks/w1.py in float32, 2 threads. The first two: tokens/s of nats of every token of 8
rows of 512. The others: questions/s of 100 questions of 32 to 64 tokens after 5 examples of 64 that all
share, each with 4 choices of 2 to 12 tokens: by `eval.loglikelihood`, and by `score.token_nll`, 16 rows at a
time.
"""

import json
import statistics
import sys
import time

import numpy as np

from benchmarks.decode import V, network, peer

B, T, ROUNDS, QUESTIONS = 8, 512, 5, 100


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


def requests():
    from llama_jax.eval.loglikelihood import Continuation

    rng = np.random.default_rng(0)
    tokens = lambda low, high: rng.integers(0, V, rng.integers(low, high + 1)).tolist()  # noqa: E731
    examples = tokens(5 * 64, 5 * 64)
    contexts = [[*examples, *tokens(32, 64)] for _ in range(QUESTIONS)]
    return [Continuation(context, tokens(2, 12)) for context in contexts for _ in range(4)]


def choices():
    from llama_jax.eval.loglikelihood import loglikelihood
    from llama_jax.model import transformer

    module, params = network()
    params, asked = transformer.unstack(module, params), requests()
    run = lambda: [one.total for _, one in sorted(loglikelihood(module, params, asked))]  # noqa: E731
    run()
    return run


def whole_rows():
    """Every choice in a row of its own, padded to the longest; the tokens of the choice are added up."""
    module, params = network(unroll=8)
    from llama_jax.eval import score

    asked = requests()
    size = max(len(context) + len(tokens) for context, tokens in asked)
    filled = np.array([[*c, *t, *[0] * (size - len(c) - len(t))] for c, t in asked], np.int32)
    np.asarray(score.token_nll(module, params, filled[:16]))  # compiled

    def run():
        parts = np.split(filled, len(filled) // 16)
        nll = np.concatenate([score.token_nll(module, params, part) for part in parts])
        ends = [len(context) - 1 for context, _ in asked]
        return [-nll[i, end : end + len(asked[i].tokens)].sum() for i, end in enumerate(ends)]

    return run


def main() -> None:
    side = sys.argv[1]
    run = SIDES[side]()
    done, rounds = (QUESTIONS, 1) if side in ("choices", "whole_rows") else (B * T, ROUNDS)
    if rounds > 1:
        run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(done / statistics.median(seconds)))


SIDES = {
    "ours": ours, "transformers": transformers, "choices": choices, "whole_rows": whole_rows,
}  # fmt: skip


if __name__ == "__main__":
    main()
