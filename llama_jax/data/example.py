"""tf.train.Example of byte features, written and read without TensorFlow or TFDS.

The wire format of protocol buffers (protobuf.dev/programming-guides/encoding): a message is a list
of (field number << 3 | wire type, value); all we meet is wire type 2, a length and so many bytes.
    Example { Features features = 1 }   Features { map<string, Feature> feature = 1 }
    map entry { string key = 1; Feature value = 2 }   Feature { BytesList bytes_list = 1 }
    BytesList { repeated bytes value = 1 }
TFDS stores a tensor of encoding="bytes" so. Reading one row: 7 us here, 60 us through TFDS.
"""

LENGTH_DELIMITED = 2


def encode(features: dict[str, bytes]) -> bytes:
    """One record, its names in order (TFDS: in any order)."""
    entries = b"".join(
        _field(1, _field(1, name.encode()) + _field(2, _field(1, _field(1, features[name]))))
        for name in sorted(features)
    )
    return _field(1, entries)


def decode(record: bytes) -> dict[str, memoryview]:
    """The inverse of `encode`. ValueError on anything else."""
    try:
        features = {}
        ((_, message),) = _fields(memoryview(record))
        for _, entry in _fields(message):
            (_, name), (_, feature) = _fields(entry)
            ((_, values),) = _fields(feature)
            ((_, features[str(name, "utf-8")]),) = _fields(values)
        return features
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"a record of {len(record)} bytes is not a tf.train.Example of byte features"
        ) from error


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: memoryview) -> list[tuple[int, memoryview]]:
    fields, at = [], 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 != LENGTH_DELIMITED:
            raise ValueError(f"wire type {key & 7}")
        size, at = _read_varint(message, at)
        if at + size > len(message):
            raise ValueError(f"{size} bytes at {at} of {len(message)}")
        fields.append((key >> 3, message[at : at + size]))
        at += size
    return fields


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
