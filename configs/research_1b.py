"""Research size 1B (configs/sizes.py): a week on 8 chips.

20 tokens a parameter (arXiv:2203.15556), batches of 0.5M tokens; the mixture is LLaMA's, from your rows.

    python -m experiments.train --config=configs/research_1b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_8      full       21.3 GiB of 30.75   MFU 37 to 50%
    :v5e_8     full       13.2 GiB of 15.75   MFU 44 to 60%
    :v6e_8     full       26.4 GiB of 31.25   MFU 27 to 37%
    :v2_8      linear      5.9 GiB of 7.5   MFU 55 to 74%
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
