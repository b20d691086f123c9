"""LLaMA 7B (arXiv:2302.13971, table 2): 1.0T tokens in batches of 4M, learning rate 3e-4.

82,432 A100 hours in the paper (table 15). AdamW 0.9/0.95, decay 0.1, clip 1.0, 2,000 warm-up steps,
cosine to 10% (section 2.3).

    python -m experiments.train --config=configs/7b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_32     linear     18.4 GiB of 30.75   MFU 47 to 63%
    :v3_32     linear      9.8 GiB of 15.5   MFU 57 to 65%
    :v5e_256x2 attention  13.8 GiB of 15.75   MFU 62 to 74%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.LLAMA_7B,
        mixtures.LLAMA1,
        tokens=1.0e12,
        train=dict(batch_size=2048, microbatches=16),
        optim=dict(learning_rate=3e-4),
    )
