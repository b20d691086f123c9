"""What counting alone achieves: unigram and bigram models of the same training and validation tokens.

A language model that does not beat the bigram has learned nothing that a table of pairs would not
give. Losses are nats a token on the validation targets.
"""

import numpy as np

DISCOUNT = 0.75  # absolute discounting, a usual value for bigrams (Ney, Essen and Kneser 1994)


def unigram(train: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the add-one estimate p(w) = (count(w) + 1) / (tokens + V)."""
    return float(-np.log(_unigram(train, vocab_size)[targets]).mean())


def bigram(train: np.ndarray, contexts: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the bigram with absolute discounting, backing off to the unigram.

    p(w | c) = max(count(c w) - d, 0) / count(c) + d x kinds(c) / count(c) x p(w), where kinds(c) is
    the number of different words seen after c; p(w) alone after an unseen c.
    """
    code = train[:-1].astype(np.int64) * vocab_size + train[1:]
    pairs, counts = np.unique(code, return_counts=True)
    context_count = np.zeros(vocab_size)
    np.add.at(context_count, pairs // vocab_size, counts)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)

    wanted = contexts.astype(np.int64) * vocab_size + targets
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    lower = _unigram(train, vocab_size)[targets]
    total = context_count[contexts]
    with np.errstate(invalid="ignore", divide="ignore"):
        higher = np.maximum(seen - DISCOUNT, 0) / total + DISCOUNT * kinds[contexts] / total * lower
    return float(-np.log(np.where(total > 0, higher, lower)).mean())


def _unigram(train, vocab_size):
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return counts / counts.sum()
