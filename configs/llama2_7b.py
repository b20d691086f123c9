"""Llama 2 7B (arXiv:2307.09288, table 1 and section 2.2): 2.0T tokens in batches of 4M, context 4096.

184,320 A100 hours in the paper (table 2). AdamW 0.9/0.95, eps 1e-5, decay 0.1, clip 1.0, 2,000 warm-up
steps, cosine to 10%.

    python -m experiments.train --config=configs/llama2_7b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_32     linear     18.4 GiB of 30.75   MFU 45 to 61%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.LLAMA2_7B,
        mixtures.LLAMA2,
        tokens=2.0e12,
        train=dict(batch_size=1024, microbatches=16),
        optim=dict(learning_rate=3e-4, eps=1e-5),
    )
