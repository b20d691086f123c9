"""Research size 150M (configs/sizes.py): ablations on 8 chips in hours.

20 tokens a parameter (arXiv:2203.15556), batches of 0.5M tokens; the mixture is LLaMA's, from your rows.

    python -m experiments.train --config=configs/research_150m.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_8      full        9.4 GiB of 30.75   MFU 29 to 38%
    :v5e_8     full        5.7 GiB of 15.75   MFU 32 to 43%
    :v6e_8     full        5.8 GiB of 31.25   MFU 16 to 21%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.RESEARCH_150M,
        mixtures.LLAMA1,
        tokens=3e9,
        train=dict(batch_size=256),
        optim=dict(learning_rate=8e-4, warmup_steps=500),
    )
