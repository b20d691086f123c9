"""What every kind of checkpoint gives once it is opened: settings, and rows of tensors in one layout."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llama_jax import config
from llama_jax.convert.names import Unit
from llama_jax.tokenizer import base, in_folder
from llama_jax.tokenizer.added import NONE, Additions


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A kind of the config, the content of its model file ("byte" has none), a checkpoint's additions."""

    kind: str
    content: bytes = b""
    additions: Additions = NONE

    def load(self) -> base.Tokenizer:
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.content)
            file.flush()
            path = "" if self.kind == "byte" else file.name
            return base.load(config.TokenizerConfig(self.kind, path), self.additions)


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint: headers read and checked, tensors not yet.

    `read(unit, start, stop)` gives rows of the hub layout: torch's matrix, half-split. Whole heads only.
    """

    format: str
    model: config.Model
    context: int  # positions it was trained for
    dtypes: dict[str, np.dtype]  # by Hugging Face's names
    read: Callable[[Unit, int, int], np.ndarray]
    where: Callable[[Unit], Path]  # the file of a tensor, for messages
    files: tuple[Path, ...]
    tokenizer: TokenizerFile | None = None
    carried: dict[str, bytes] = dataclasses.field(
        default_factory=dict
    )  # Hugging Face's small files
    notes: tuple[str, ...] = ()  # what was decided, worth a line to the user


def compute_dtype(dtypes: dict[str, np.dtype]) -> str:
    """The dtype to compute in: that of the matrices, bfloat16 for float16's range.

    Norms are often kept in float32 beside matrices in bfloat16, and are computed in float32 anyway.
    """
    matrices = [dtype.name for name, dtype in dtypes.items() if not name.endswith("norm.weight")]
    return "float32" if "float32" in matrices else "bfloat16"


def tokenizer_of(content: bytes) -> TokenizerFile:
    """The tokenizer in a file."""
    return TokenizerFile(in_folder.kind_of(content), content)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the file in front of an error: the schema names its own fields, not where they were read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
