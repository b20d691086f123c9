"""A tensor inside a file: where it lies and how its rows are read, without the rest of the file."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# The dtypes in which weights of the family are published, by safetensors' names.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The ends of names of what is no weight: the settings determine it, and it may be of any dtype.
TABLES = ("rotary_emb.inv_freq", "rope.freqs", "position_ids", "rotary_emb.cos_cached")
TABLES += ("rotary_emb.sin_cached", "causal_mask", "masked_bias")
# The bits of infinity without its sign: NaN and the infinities are at or above.
_INFINITY = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
_CHECKED = 1 << 17  # elements at a time: they stay in the cache
_COMPARED = 16 << 20  # bytes at a time
MAX_AXES = 8  # of a shape in a file's header; the family's tensors have one or two


class Stored(NamedTuple):
    """Row-major elements of `dtype`, from byte `offset` on."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Elements start..stop along the first axis. ValueError if the file ends before them."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_bytes = self.nbytes // max(self.shape[0], 1)
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + start * row_bytes)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(f"{self.file}: {self.name} is cut off; fetch the file again")
                done += got
        return out

    def same(self, other: "Stored") -> bool:
        """Whether two matrices are equal bit by bit; read a block at a time."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if (self.file, self.offset) == (other.file, other.offset):
            return True
        step = max(_COMPARED * self.shape[0] // max(self.nbytes, 1), 1)
        return all(
            self.rows(start, min(start + step, self.shape[0])).tobytes()
            == other.rows(start, min(start + step, self.shape[0])).tobytes()
            for start in range(0, self.shape[0], step)
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if self.shape != shape:
            raise ValueError(
                f"{self.file}: {self.name} has shape {list(self.shape)}, but the settings of the "
                f"checkpoint say {list(shape)}"
            )


def are_sizes(numbers: Iterable[Any]) -> bool:
    """Whether all are whole numbers that a size or a place in a file can be: of 63 bits, not negative."""
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def check_finite(rows: np.ndarray, file: Path, name: str) -> None:
    """ValueError if an element is NaN or infinite."""
    unsigned = rows.reshape(-1).view(f"u{rows.dtype.itemsize}")
    infinity, wrong = _INFINITY[rows.dtype.name], 0
    for start in range(0, unsigned.size, _CHECKED):
        magnitude = unsigned[start : start + _CHECKED] & (np.iinfo(unsigned.dtype).max // 2)
        if magnitude.max() >= infinity:
            wrong += int(np.count_nonzero(magnitude >= infinity))
    if wrong:
        raise ValueError(
            f"{file}: {name} holds {wrong:,} values that are NaN or infinite among {rows.size:,}; "
            "the file is damaged, or the training that wrote it diverged"
        )


def size(file: Path) -> int:
    """Bytes of a file. ValueError if it is not there."""
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
