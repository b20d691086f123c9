"""What the studies here start from: a network for a laptop on Python's standard library."""

import dataclasses

import ml_collections

from configs import base, mixtures, sizes

SEQ_LEN = 256
ROWS = 256  # that results are scored on: 65,536 tokens
# A look at the whole thing in minutes; too short to conclude anything.
QUICK = {
    "seeds": 2,
    "rows": 64,
    "base": {
        "train": {"steps": 60},
        "optim": {"warmup_steps": 10},
        "eval": {"every": 20, "rows": 32},
    },
}


def run() -> ml_collections.ConfigDict:
    """300K parameters, 1.5M tokens, a third of the text: 80 to 90 s a run on 2 cores."""
    return base.page(
        "",
        sizes.RESEARCH_300K,
        dataclasses.replace(mixtures.STDLIB, seq_len=SEQ_LEN),
        tokens=1.5e6,
        train=dict(batch_size=16),
        optim=dict(learning_rate=3e-3, warmup_steps=50),
        checkpoint=dict(every=1000, keep=1),
        eval=dict(every=40, rows=128),
        log=dict(every=20, tensorboard="off"),
    )
