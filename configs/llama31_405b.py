"""Llama 3.1 405B (arXiv:2407.21783, table 3 and section 3.4.2): the long-context stage, context 131072.

The paper reaches it in six steps over about 800B tokens, after 15T at 8192 (as `llama3_8b`, with the
schedule below); this page is the last step, in batches of 16M tokens. 30.84M H100 hours in all on its model
card.

    python -m experiments.train --config=configs/llama31_405b.py --workdir=DIR

Compiled for slices, estimated (docs/scale.md): recomputation, memory a chip, MFU in series to products alone.

    :v5p_1024  linear     68.0 GiB of 95   MFU 43 to 75%
"""

from configs import base, mixtures, sizes


def get_config(slice=""):
    return base.page(
        slice,
        sizes.LLAMA31_405B,
        mixtures.LLAMA31,
        tokens=800e9,
        train=dict(batch_size=128, loss_chunks=128),
        optim=dict(learning_rate=8e-5, warmup_steps=8000, final_fraction=0.01),
    )
