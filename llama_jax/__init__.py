"""The LLaMA family in JAX, for research. `load` opens a trained model; docs/architecture.md is the map."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.run.trained import TrainedModel, load

__version__ = "0.1.0"
__all__ = ["TrainedModel", "load"]


def __getattr__(name: str):
    """`load` and its result, imported when they are first asked for: importing llama_jax starts nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    from llama_jax.run import trained

    return getattr(trained, name)
