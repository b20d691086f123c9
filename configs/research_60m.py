"""Research size 60M (configs/sizes.py): the smallest whose ablations carry over.

20 tokens a parameter (arXiv:2203.15556), batches of 0.5M tokens; the mixture is LLaMA's, from your rows.

    python -m experiments.train --config=configs/research_60m.py --workdir=DIR
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_60M,
        mixtures.LLAMA1,
        tokens=1.3e9,
        train=dict(batch_size=256),
        optim=dict(learning_rate=1e-3, warmup_steps=500),
    )
