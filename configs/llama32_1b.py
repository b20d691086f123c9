"""Llama 3.2 1B (model card, September 2024): tied embeddings, rotary factor 32, up to 9T tokens.

Meta pruned it from 3.1 8B and trained it on the larger models' logits; no hyper-parameters are published.
These are Llama 3 8B's: training it from scratch, not Meta's recipe. 370k H100 hours on its model card.

    python -m experiments.train --config=configs/llama32_1b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v4_8      linear     20.8 GiB of 30.75   MFU 37 to 50%
    :v3_8      linear     13.5 GiB of 15.5   MFU 32 to 32%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.LLAMA32_1B,
        mixtures.LLAMA3,
        tokens=9e12,
        train=dict(batch_size=1024, microbatches=16, loss_chunks=8),
        optim=dict(learning_rate=3e-4, warmup_steps=8000, final_fraction=0.01),
    )
