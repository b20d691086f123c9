"""The safetensors format: a length, a JSON header, bytes. Read with every offset checked; written in place.

The format's own description: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape,
data_offsets}}, then the data, without holes. We read and write it ourselves because tensors go through
in pieces, and because a wrong header must be named, not only refused.
"""

import collections
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert.json_file import shown
from llama_jax.convert.stored import DTYPES, MAX_AXES, TABLES, Stored, are_sizes, size

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation


def read_header(file: Path) -> dict[str, Stored]:
    """{name: where it lies}. ValueError names the file, the tensor and what is wrong."""
    length = size(file)
    with open(file, "rb") as f:
        start = f.read(8)
        count = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < count <= min(MAX_HEADER, length - 8):
            raise ValueError(
                f"{file} ({length:,} bytes) is not safetensors, or is cut off: its header should be "
                f"{count:,} bytes long"
            )
        raw = f.read(count)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its header is not JSON of tensors ({error})") from error
    header.pop("__metadata__", None)
    found = {name: _entry(file, name, entry, 8 + count) for name, entry in header.items()}
    _check_places(file, found, 8 + count, length)
    return {name: tensor for name, tensor in found.items() if not name.endswith(TABLES)}


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"{next(key for key, n in counts.items() if n > 1)!r} is there twice")
    return found


def _entry(file: Path, name: str, entry, data: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = (
            isinstance(dtype, str) and len(shape) <= MAX_AXES and are_sizes((*shape, begin, end))
        )
    except (KeyError, TypeError, ValueError):
        raise _unreadable(file, name, entry) from None
    if not whole:
        raise _unreadable(file, name, entry)
    if name.endswith(TABLES):
        return Stored(file, name, np.dtype(np.uint8), (max(end - begin, 0),), data + begin)
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: {name} has dtype {dtype}; weights must be {', '.join(DTYPES)} (quantised "
            "checkpoints are not read)"
        )
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{file}: {name} of shape {list(shape)} and dtype {dtype} needs "
            f"{math.prod(shape) * DTYPES[dtype].itemsize:,} bytes, but its data_offsets "
            f"[{begin}, {end}] hold {end - begin:,}"
        )
    return Stored(file, name, DTYPES[dtype], shape, data + begin)


def _unreadable(file: Path, name: str, entry: Any) -> ValueError:
    return ValueError(
        f"{file}: {name} must have a dtype, a shape of at most {MAX_AXES} axes and two data_offsets "
        f"that are whole and not negative; it has {shown(entry)}"
    )


def _check_places(file: Path, found: dict[str, Stored], data: int, length: int) -> None:
    """The tensors lie one behind the other and end with the file."""
    for tensor in found.values():
        if tensor.offset + tensor.nbytes > length:
            raise ValueError(
                f"{file}: {tensor.name} ends at byte {tensor.offset + tensor.nbytes:,}, but the file has "
                f"{length:,}; it is cut off or damaged: fetch it again"
            )
    at, before = data, "the header"
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            what = "overlaps" if tensor.offset < at else "leaves a hole behind"
            raise ValueError(f"{file}: the data_offsets of {tensor.name} {what} {before}")
        at, before = tensor.offset + tensor.nbytes, tensor.name
    if at != length:
        raise ValueError(
            f"{file}: {before} ends at byte {at:,}, but the file has {length:,}; it is damaged: "
            "fetch it again"
        )


def plan(tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file, the byte where each tensor begins, the size of the file."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    places = {name: start + header[name]["data_offsets"][0] for name in tensors}
    return struct.pack("<Q", len(raw)) + raw, places, start + at
