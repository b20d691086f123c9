"""Llama 3 8B (arXiv:2407.21783, table 3 and section 3.4.1): 15T tokens, context 8192.

Peak learning rate 3e-4, 8,000 warm-up steps, cosine to 1% are the paper's; it grows the batch from 4M
to 16M tokens, here it is 8M throughout. 1.3M H100 hours on its model card.

    python -m experiments.train --config=configs/llama3_8b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v5p_32    linear     77.9 GiB of 95   MFU 55 to 73%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.LLAMA3_8B,
        mixtures.LLAMA3,
        tokens=15e12,
        train=dict(batch_size=1024, microbatches=16, loss_chunks=8),
        optim=dict(learning_rate=3e-4, warmup_steps=8000, final_fraction=0.01),
    )
