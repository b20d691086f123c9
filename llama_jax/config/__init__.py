"""The schema: every setting, its default, its rule.

All of `llama_jax` reads frozen, hashable parts; the settings of a training run are one `Run`. Rules are
checked where a part is constructed, so that an invalid one cannot exist.
"""

from llama_jax.config.data import Data, Source, TokenizerConfig
from llama_jax.config.decode import Decode, Quant
from llama_jax.config.form import add_sources, diff, edit, flatten, freeze, from_dict, to_dict
from llama_jax.config.model import Model, Rope
from llama_jax.config.rules import check_seed, choose, nearest
from llama_jax.config.run import Checkpoint, Eval, Log, Mesh, Optim, Run, Train

__all__ = [
    "Checkpoint",
    "Data",
    "Decode",
    "Eval",
    "Log",
    "Mesh",
    "Model",
    "Optim",
    "Quant",
    "Rope",
    "Run",
    "Source",
    "TokenizerConfig",
    "Train",
    "add_sources",
    "check_seed",
    "choose",
    "diff",
    "edit",
    "flatten",
    "freeze",
    "from_dict",
    "nearest",
    "to_dict",
]
