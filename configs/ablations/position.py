"""Does it matter how a network knows positions? Rotary, ALiBi, learned, none; and beyond the trained length.

python -m experiments.ablate --config=configs/ablations/position.py --workdir=DIR
"""

from configs.ablations import base
from llama_jax.study import schema


def get_config():
    return schema.edit(
        base.run(),
        axes={
            "position": {
                "rope": {"model": {"position": "rope"}},
                "alibi": {"model": {"position": "alibi"}},
                "learned": {"model": {"position": "learned", "max_positions": base.SEQ_LEN}},
                "none": {"model": {"position": "none"}},
            }
        },
        lengths=(1, 2, 4, 8),
        rows=base.ROWS,
        quick=base.QUICK,
    )
