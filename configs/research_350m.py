"""Research size 350M (configs/sizes.py): ablations on 8 chips in a day.

20 tokens a parameter (arXiv:2203.15556), batches of 0.5M tokens; the mixture is LLaMA's, from your rows.

    python -m experiments.train --config=configs/research_350m.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_8      full       17.5 GiB of 30.75   MFU 32 to 43%
    :v5e_8     full       11.6 GiB of 15.75   MFU 37 to 50%
    :v6e_8     full       11.7 GiB of 31.25   MFU 19 to 26%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_350M,
        mixtures.LLAMA1,
        tokens=7.4e9,
        train=dict(batch_size=256),
        optim=dict(learning_rate=6e-4, warmup_steps=500),
    )
