"""Torch's .pth and .bin files, read without torch and without running what is in them.

A file is a zip of uncompressed members: `data.pkl`, a pickle of the names and of how each tensor lies in
its storage, and one member `data/KEY` a storage. A pickle may name any function to be called. Ours looks
up six harmless names and refuses all others, so that a hostile file is an error and nothing more.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.convert.stored import DTYPES, Stored

MAX_PICKLE = 64 << 20  # bytes of names; LLaMA 65B needs 0.1 MB
STORAGES = {
    "FloatStorage": DTYPES["F32"],
    "HalfStorage": DTYPES["F16"],
    "BFloat16Storage": DTYPES["BF16"],
}


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage, start, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, start, tuple(shape), tuple(strides))


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Names(pickle.Unpickler):
    """An unpickler that can make dictionaries and our own descriptions of tensors, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name.endswith("Storage"):
            raise ValueError(f"it has tensors of torch.{name}; weights must be {_kinds()}")
        raise ValueError(f"its pickle asks for {module}.{name}, which no weights need; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        try:
            what, dtype, key, _, count = pid
        except (TypeError, ValueError):
            what = None
        if what != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int:
            raise ValueError(f"its pickle refers to {str(pid)[:80]}, which is not a storage")
        return _Storage(dtype, str(key), count)


def _kinds() -> str:
    return ", ".join(str(dtype) for dtype in STORAGES.values())


def read_names(file: Path) -> dict[str, Stored]:
    """{name: where it lies}. ValueError names the file, the tensor and what is wrong."""
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{file} is a zip, but not one of torch: it has no data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            _check_byteorder(file, raw, members.get(root + "byteorder"))
            tree = _unpickle(file, archive, members[pickles[0]])
            places = {
                name.removeprefix(root + "data/"): (_data_offset(file, raw, member), member)
                for name, member in members.items()
                if name.startswith(root + "data/")
            }
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{file} is not a whole zip file as torch has written since 1.6; fetch it again, or load "
            "and save it with a newer torch"
        ) from error
    return {name: _place(file, name, tensor, places) for name, tensor in _tensors(file, tree)}


def _check_byteorder(file: Path, raw, member: zipfile.ZipInfo | None) -> None:
    """Torch 2.1 and later say it; what older ones wrote is little-endian, as nearly all machines are."""
    if member is None:
        return
    raw.seek(_data_offset(file, raw, member))
    order = raw.read(min(member.file_size, 16))
    if order != b"little":
        raise ValueError(
            f"{file}: its byteorder is {order!r}, it must be b'little'; load and save it with torch on "
            "a little-endian machine"
        )


def _unpickle(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    if member.file_size > MAX_PICKLE:
        raise ValueError(
            f"{file}: its data.pkl has {member.file_size:,} bytes, over {MAX_PICKLE:,}"
        )
    try:
        return _Names(io.BytesIO(archive.read(member))).load()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{file}: its data.pkl is damaged ({type(error).__name__}: {error})"
        ) from error


def _tensors(file: Path, tree: Any):
    if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
        tree = tree["model"]
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds a {type(tree).__name__}, not a dictionary of tensors")
    for name, value in tree.items():
        if isinstance(value, _Tensor):
            yield str(name), value


def _data_offset(file: Path, raw, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose lengths may differ from the index's."""
    raw.seek(member.header_offset)
    header = raw.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{file}: {member.filename} is damaged")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{file}: {member.filename} is compressed; torch does not write that")
    return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _place(file: Path, name: str, tensor: _Tensor, places) -> Stored:
    storage = tensor.storage
    numbers = (*tensor.shape, *tensor.strides, tensor.start)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{file}: {name} is described wrongly: {str(tensor)[:120]}")
    rows, row_major = 1, []
    for extent in reversed(tensor.shape):
        row_major.insert(0, rows)
        rows *= extent
    strided = [s for s, n in zip(tensor.strides, tensor.shape, strict=True) if n > 1]
    if strided != [s for s, n in zip(row_major, tensor.shape, strict=True) if n > 1]:
        raise ValueError(
            f"{file}: {name} is not stored row by row (strides {list(tensor.strides)}); "
            "save it with .contiguous()"
        )
    if storage.key not in places:
        raise ValueError(f"{file}: the data of {name} (member {storage.key!r}) is missing")
    offset, member = places[storage.key]
    width = storage.dtype.itemsize
    end = (tensor.start + math.prod(tensor.shape)) * width
    if end > member.file_size:
        raise ValueError(
            f"{file}: {name} needs {end:,} bytes of member {storage.key!r}, which has "
            f"{member.file_size:,}"
        )
    return Stored(file, name, storage.dtype, tensor.shape, offset + tensor.start * width)
