"""What counting alone achieves: unigram and bigram models of the same training and validation tokens.

A language model that does not beat the bigram has learned nothing that a table of pairs would not
give. A model is made from the training pairs (context, target) that count, and gives the nats of
each target of other pairs.
"""

from collections.abc import Callable

import numpy as np

DISCOUNT = 0.75  # absolute discounting, a usual value for bigrams (Ney, Essen and Kneser 1994)

Model = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (contexts, targets) -> nats of each target


def unigram(contexts: np.ndarray, targets: np.ndarray, vocab_size: int) -> Model:
    """The add-one estimate p(w) = (count(w) + 1) / (tokens + V)."""
    p_V = _unigram(targets, vocab_size)
    return lambda contexts, targets: -np.log(p_V[targets])


def bigram(contexts: np.ndarray, targets: np.ndarray, vocab_size: int) -> Model:
    """The bigram with absolute discounting, backing off to the unigram.

    p(w | c) = max(count(c w) - d, 0) / count(c) + d x kinds(c) / count(c) x p(w), where kinds(c) is
    the number of different words seen after c; p(w) alone after an unseen c.
    """
    p_V = _unigram(targets, vocab_size)
    pairs, counts = np.unique(contexts.astype(np.int64) * vocab_size + targets, return_counts=True)
    count_V = np.bincount(contexts, minlength=vocab_size)
    kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size)

    def nats(contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        wanted = contexts.astype(np.int64) * vocab_size + targets
        at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where(pairs[at] == wanted, counts[at], 0)
        total, lower = count_V[contexts], p_V[targets]
        with np.errstate(invalid="ignore", divide="ignore"):
            higher = np.maximum(seen - DISCOUNT, 0) / total
            higher += DISCOUNT * kinds_V[contexts] / total * lower
        return -np.log(np.where(total > 0, higher, lower))

    return nats


def _unigram(targets: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(targets, minlength=vocab_size) + 1.0
    return counts / counts.sum()
