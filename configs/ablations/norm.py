"""RMS or layer norm, before or after: each with each.

python -m experiments.ablate --config=configs/ablations/norm.py --workdir=DIR
"""

from configs.ablations import base
from llama_jax.study import schema


def get_config():
    return schema.edit(
        base.run(),
        axes={
            "norm": {name: {"model": {"norm": name}} for name in ("rms", "layer")},
            "placement": {name: {"model": {"placement": name}} for name in ("pre", "post")},
        },
        grid="full",
        rows=base.ROWS,
        quick=base.QUICK,
    )
