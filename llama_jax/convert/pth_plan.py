"""Torch's .pth files, written in place and without torch.

Every size is known before the first byte, so each member of the zip has its place from the start and a
tensor can be written a piece at a time, or a second time after an interruption. The layout (members,
64-byte alignment, pickle of protocol 2) is what torch.save writes; torch.load with weights_only reads it.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

from llama_jax.convert.pth import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


class Member(NamedTuple):
    name: str
    start: int  # of its header
    data: int  # of its bytes
    nbytes: int


class Plan(NamedTuple):
    small: dict[Member, bytes]  # members whose content is known now
    tensors: dict[str, Member]
    end: int  # of the last member: where the index begins


ALIGN = 64  # torch maps storages from multiples of it
_ROOT = "archive/"


def plan(tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], same: dict[str, str]) -> Plan:
    """Where everything lies. `same` gives a name the tensor of another, as tied matrices are."""
    small, placed, at = {}, {}, 0
    for name, content in (
        ("data.pkl", _pickle(tensors, same)),
        ("byteorder", b"little"),
        ("version", b"3\n"),
    ):
        member = _member(name, at, len(content))
        small[member] = content
        at = member.data + member.nbytes
    for key, (name, (dtype, shape)) in enumerate(tensors.items()):
        member = _member(f"data/{key}", at, math.prod(shape) * dtype.itemsize)
        placed[name] = member
        at = member.data + member.nbytes
    return Plan(small, placed, at)


def _member(name: str, start: int, nbytes: int) -> Member:
    header = 30 + len(_ROOT + name) + 20 + 4  # with the extra field of large files, and padding
    data = -(-(start + header) // ALIGN) * ALIGN
    return Member(_ROOT + name, start, data, nbytes)


def header(member: Member, crc: int) -> bytes:
    """The header in front of a member's bytes, padded to where they begin."""
    name = member.name.encode()
    large = struct.pack("<HHQQ", 1, 16, member.nbytes, member.nbytes)
    padding = member.data - member.start - 30 - len(name) - len(large)
    extra = large + struct.pack("<HH", 0x4246, padding - 4) + b"Z" * (padding - 4)
    sizes = (0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
    fixed = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 0x21, crc, *sizes)
    return fixed + name + extra


def index(members: dict[Member, int], end: int) -> bytes:
    """The zip's index, which follows the last member. members: {member: its crc}."""
    rows = b""
    for member, crc in members.items():
        name = member.name.encode()
        large = struct.pack("<HHQQQ", 1, 24, member.nbytes, member.nbytes, member.start)
        rows += struct.pack(
            "<IHHHHHHIIIHHHHHII",
            *(0x02014B50, 45, 45, 0, 0, 0, 0x21, crc, 0xFFFFFFFF, 0xFFFFFFFF),
            *(len(name), len(large), 0, 0, 0, 0, 0xFFFFFFFF),
        )
        rows += name + large
    count = len(members)
    large_end = struct.pack(
        "<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(rows), end
    )
    locator = struct.pack("<IIQI", 0x07064B50, 0, end + len(rows), 1)
    last = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, *[min(count, 0xFFFF)] * 2, 0xFFFFFFFF, 0xFFFFFFFF, 0
    )
    return rows + large_end + locator + last


def _pickle(tensors, same: dict[str, str]) -> bytes:
    """A dictionary of tensors as torch.save pickles it: protocol 2, opcodes by hand, since pickling a
    name of torch would need torch."""
    keys = {name: key for key, name in enumerate(tensors)}
    out = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for name, source in {**{name: name for name in tensors}, **same}.items():
        dtype, shape = tensors[source]
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        out += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [_text("storage"), f"ctorch\n{_STORAGE_OF[dtype]}\n".encode()]
        out += [_text(str(keys[source])), _text("cpu"), _whole(math.prod(shape)), b"tQ", _whole(0)]
        out += [b"(", *map(_whole, shape), b"t(", *map(_whole, strides), b"t\x89"]
        out += [b"ccollections\nOrderedDict\n)RtR"]
    return b"".join([*out, b"u."])


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
