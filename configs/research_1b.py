"""Research size 1B (configs/sizes.py): a week on 8 chips.

20 tokens a parameter (arXiv:2203.15556), batches of 0.5M tokens; the mixture is LLaMA's, from your rows.

    python -m experiments.train --config=configs/research_1b.py --workdir=DIR
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_1B,
        mixtures.LLAMA1,
        tokens=21e9,
        train=dict(batch_size=256),
        optim=dict(learning_rate=4e-4, warmup_steps=500),
    )
