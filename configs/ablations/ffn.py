"""What do gated networks buy at the same number of parameters? SwiGLU, GEGLU, GELU, ReLU.

The widths of those of two matrices are 3/2 of the others (arXiv:2002.05202 section 3).

    python -m experiments.ablate --config=configs/ablations/ffn.py --workdir=DIR
"""

from configs.ablations import base
from llama_jax.study import schema


def get_config():
    names = ("swiglu", "geglu", "gelu", "relu")
    return schema.edit(
        base.run(),
        axes={"ffn": {name: {"model": {"ffn": name}} for name in names}},
        match="parameters",
        rows=base.ROWS,
        quick=base.QUICK,
    )
