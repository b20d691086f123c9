"""Research size 10M (configs/sizes.py): an hour on a laptop.

The standard-library corpus has about 4M tokens: more than that repeats it. Learning rate by habit, not swept.

    python -m experiments.train --config=configs/research_10m.py --workdir=DIR
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_10M,
        mixtures.STDLIB,
        tokens=16e6,
        train=dict(batch_size=32),
        optim=dict(learning_rate=1e-3, warmup_steps=100),
        checkpoint=dict(every=500),
        eval=dict(every=500, rows=256),
    )
