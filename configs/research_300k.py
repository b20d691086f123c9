"""Research size 300K (configs/sizes.py): for tests.

The standard-library corpus has about 4M tokens: more than that repeats it. Learning rate by habit, not swept.

    python -m experiments.train --config=configs/research_300k.py --workdir=DIR
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_300K,
        mixtures.STDLIB,
        tokens=3e6,
        train=dict(batch_size=16),
        optim=dict(learning_rate=3e-3, warmup_steps=50),
        checkpoint=dict(every=200),
        eval=dict(every=200, rows=128),
    )
