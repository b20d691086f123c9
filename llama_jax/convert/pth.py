"""Torch's .pth and .bin files, read without torch and without running what is in them.

A file is a zip of uncompressed members: `data.pkl`, a pickle of the names and of how each tensor lies in
its storage, and one member `data/KEY` a storage. A pickle may name any function to be called, and a few
bytes of it can ask for gigabytes. Ours looks up a few harmless names, follows the instructions that torch
writes and refuses all others, so that a hostile file is an error and nothing more.
"""

import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.convert.json_file import shown
from llama_jax.convert.stored import DTYPES, MAX_AXES, TABLES, Stored, are_sizes

MAX_WRAPPERS = 4  # dictionaries in dictionaries; a pickle may hold itself
MAX_PICKLE = 4 << 20  # bytes of names; Llama 3.1 405B, of 1,138 tensors, needs 0.2 MB
STORAGES = {
    "FloatStorage": DTYPES["F32"],
    "HalfStorage": DTYPES["F16"],
    "BFloat16Storage": DTYPES["BF16"],
}
# Of buffers, which are left out, and of what is refused once its name is known.
_OTHERS = {
    **{"DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32},
    **{"ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8},
    "BoolStorage": np.bool_,
}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    """As the pickle has it, to be checked once its name is known."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# As torch calls them, with no room for more: a list of arguments is copied at each call.
def _tensor(storage, start, shape, strides, requires_grad=False, hooks=None, metadata=None):
    return _Tensor(storage, start, shape, strides)


def _tensor_of_bytes(storage, start, shape, strides, grad, hooks, dtype, metadata=None):
    """Of a dtype for which torch has no class of storage: 8-bit floats."""
    if isinstance(storage, _Storage) and isinstance(dtype, np.dtype):
        storage = storage._replace(dtype=dtype)
    return _Tensor(storage, start, shape, strides)


def _parameter(tensor, requires_grad=True, hooks=None, state=None):
    """state: attributes that someone has set on it."""
    return tensor


def _dictionary() -> dict:
    """For an OrderedDict, without attributes that could hide its methods."""
    return {}


_KNOWN = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): np.dtype(kind) for name, kind in _OTHERS.items()},
    **{("torch", name): np.dtype(getattr(ml_dtypes, name)) for name in _FLOAT8},
}


class _Instructions(dict):
    def __missing__(self, code: int):
        raise ValueError(
            f"its pickle has the instruction {bytes([code])}, which torch does not write"
        )


# Those of torch's reader for weights alone (torch/_weights_only_unpickler.py), less sets and instances.
_PICKLE_OF_TORCH = (
    *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID, pickle.BUILD),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MARK),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINUNICODE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
)


class _Names(pickle._Unpickler):
    """An unpickler that can make dictionaries and our own descriptions of tensors, nothing else.

    The one in Python: its memo is a dictionary (the one in C takes 8 bytes for each index up to the
    largest, which a file chooses), and it can be told which instructions there are. 405B takes 0.1 s.
    """

    dispatch = _Instructions({c[0]: pickle._Unpickler.dispatch[c[0]] for c in _PICKLE_OF_TORCH})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        asked = ascii(f"{module}.{name}"[:80])
        if module == "torch" and name.endswith("Storage"):
            raise ValueError(f"it has tensors of {asked}; weights must be {_kinds()}")
        raise ValueError(f"its pickle asks for {asked}, which no weights need; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        what = dtype = key = count = None
        with contextlib.suppress(TypeError, ValueError):
            what, dtype, key, _, count = pid
        if (
            type(what) is not str
            or what != "storage"
            or type(key) is not str
            or not isinstance(dtype, np.dtype)
            or type(count) is not int
        ):
            # Not the value: printing a tuple of tuples that share parts doubles with each level.
            raise ValueError(f"its pickle refers to a {type(pid).__name__} that is not a storage")
        return _Storage(dtype, key, count)

    stack: list[Any]  # pickle._Unpickler has it, its annotations do not
    pop_mark: Callable[[], list[Any]]

    def load_build(self):
        """Attributes, as the _metadata of a module's state, are left out: none is set on anything."""
        self.stack.pop()

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self):
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        into = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a tuple of tuples that share parts takes twice as long with each level.
            if type(into) is not dict or not isinstance(key, str | int | float | None):
                raise ValueError(
                    f"its pickle puts a value under a {type(key).__name__} into a "
                    f"{type(into).__name__}; dictionaries must have names"
                )
            into[key] = value

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _kinds() -> str:
    return ", ".join(str(dtype) for dtype in STORAGES.values())


def read_names(file: Path) -> dict[str, Stored]:
    """{name: where it lies}. ValueError names the file, the tensor and what is wrong."""
    try:
        with _archive(file) as archive, open(file, "rb") as raw:
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
            f"{file} is not a whole zip file as torch has written since 1.6 ({error}); fetch it again, "
            "or load and save it with a newer torch"
        ) from error
    tensors = {name: tensor for name, tensor in _tensors(file, tree) if not name.endswith(TABLES)}
    return {name: _place(file, name, tensor, places) for name, tensor in tensors.items()}


def _archive(file: Path) -> zipfile.ZipFile:
    """The index of a zip; zipfile raises four more kinds of error for one that is damaged."""
    try:
        return zipfile.ZipFile(file)
    except (ValueError, RuntimeError, OverflowError, struct.error) as error:
        raise zipfile.BadZipFile(error) from error


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
    _check_stored(file, member)
    try:
        return _Names(io.BytesIO(archive.read(member))).load()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{file}: its data.pkl is damaged ({type(error).__name__}: {error})"
        ) from error


_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # of a training's checkpoints


def _tensors(file: Path, tree: Any) -> list[tuple[str, _Tensor]]:
    path = []
    while isinstance(tree, dict):
        found = [(str(name), value) for name, value in tree.items() if isinstance(value, _Tensor)]
        inside = next((key for key in _WRAPPERS if isinstance(tree.get(key), dict)), None)
        if inside is None or len(path) == MAX_WRAPPERS:
            break
        path.append(inside)
        tree = tree[inside]
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds a {type(tree).__name__}, not a dictionary of tensors")
    if not found:
        where = "".join(f" under {key!r}" for key in path)
        keys = ", ".join(shown(key) for key in list(tree)[:6]) or "nothing"
        raise ValueError(f"{file} holds no tensors{where}; its keys are {keys}")
    return found


def _check_stored(file: Path, member: zipfile.ZipInfo) -> None:
    plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
    if not plain or member.compress_size != member.file_size:
        raise ValueError(
            f"{file}: {member.filename} is compressed or encrypted; torch does not write that"
        )


def _data_offset(file: Path, raw, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose lengths may differ from the index's."""
    header = b""
    if are_sizes([member.header_offset]):
        raw.seek(member.header_offset)
        header = raw.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{file}: {member.filename} is damaged")
    _check_stored(file, member)
    return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _place(file: Path, name: str, tensor: _Tensor, places) -> Stored:
    storage = tensor.storage
    if (
        not isinstance(storage, _Storage)
        or not (type(tensor.shape) is type(tensor.strides) is tuple)
        or not len(tensor.shape) == len(tensor.strides) <= MAX_AXES
        or not are_sizes((*tensor.shape, *tensor.strides, tensor.start))
    ):
        raise ValueError(
            f"{file}: {name} must have a storage, a start, a shape and strides of as many axes (at most "
            f"{MAX_AXES}), whole and not negative"
        )
    if storage.dtype not in DTYPES.values():
        raise ValueError(
            f"{file}: {name} is of {storage.dtype}; weights must be {', '.join(map(str, DTYPES.values()))} "
            "(quantised checkpoints are not read)"
        )
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
