"""The documents in one file, and what can be wrong with it.

Plain text is one document a file; JSON Lines and parquet hold one document a record. A record whose
text is null or empty gives an empty document, which who reads them counts and leaves out. A long
document comes in pieces, so that memory stays bounded whatever the file. Every complaint is a
ValueError that names the file and the byte offset, line or record.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 20  # bytes read at a time, and about the characters of a piece
LINE = 1 << 12  # bytes of a line, usually at most

# Where a document may be cut without changing its tokens: behind a newline, else before a space.
# The piece that follows is encoded behind a newline whose own ids are dropped (see prepare.py).
_LINE_END = re.compile(r"\n(?=\S)")
_SPACE = re.compile(r"(?<=\S) (?=\S)")


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    first: bool
    last: bool


def suffix(path: str) -> str:
    """The ending that says how a file is read; ValueError names the supported ones."""
    for ending in READERS:
        if path.endswith(ending):
            return ending
    raise ValueError(f"{path} is of no supported kind; use one of {', '.join(READERS)}")


def is_plain(path: str) -> bool:
    """Whether the whole file is one document."""
    return READERS[suffix(path)] is plain


def records(path: str, field: str) -> Iterator[str]:
    """The text of each record of a file of records, "" where it has none."""
    try:
        yield from READERS[suffix(path)](path, field)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def pieces(text: str) -> Iterator[Piece]:
    """A document already in memory, in pieces of about BLOCK characters."""
    start = 0
    while len(text) - start > 2 * BLOCK:
        end = start + _cut(text[start : start + BLOCK])
        yield Piece(text[start:end], start == 0, False)
        start = end
    yield Piece(text[start:], start == 0, True)


def plain(path: str, start: int, stop: int) -> Iterator[Piece]:
    """Bytes start..stop of a text file as one document, in pieces."""
    held, first = "", True
    for text in _decoded(path, start, stop):
        held += text
        while len(held) > 2 * BLOCK:
            end = _cut(held[:BLOCK])
            yield Piece(held[:end], first, False)
            held, first = held[end:], False
    yield Piece(held, first, True)


def cut(path: str, size: int, fraction: float) -> int:
    """Where the last `fraction` of a text file begins: the byte offset of a line, else of a word.

    A line counts where it begins at most max(LINE, the size of the last part) bytes too early and leaves
    half of the others: a file may be a title and one long line.
    """
    wanted = size - max(int(size * fraction), 1)
    begin = max(wanted - min(max(size - wanted, LINE), BLOCK), wanted // 2)
    with open(path, "rb") as file:
        file.seek(begin)
        block = file.read(wanted - begin + 1)
    for end in (b"\n", b" "):
        if behind := block.rfind(end, 0, -1) + 1:
            return begin + behind
    while wanted > begin and block[wanted - begin] & 0xC0 == 0x80:  # not inside a character
        wanted -= 1
    return wanted


def _decoded(path: str, start: int, stop: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = start
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while at < stop:
                block = file.read(min(BLOCK, stop - at))
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block or at + len(block) == stop)
                except UnicodeDecodeError as error:
                    raise ValueError(_not_utf8(path, at - pending + error.start, error)) from error
                if "\0" in text:
                    raise ValueError(
                        f"{path} is not text: NUL at byte {at + block.index(0)}; "
                        "leave it out of the glob"
                    )
                if not block:
                    raise ValueError(
                        f"{path} ends at byte {at} of {stop}: it shrank while being read"
                    )
                # A byte order mark at the beginning is no text.
                yield text.removeprefix("\ufeff") if at == 0 else text
                at += len(block)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> str:
    return (
        f"{where} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {offset} "
        f"({error.reason}); convert it or leave it out"
    )


def _cut(text: str) -> int:
    for pattern in (_LINE_END, _SPACE):
        cuts = list(pattern.finditer(text, len(text) // 2))
        if cuts:
            return cuts[-1].end() if pattern is _LINE_END else cuts[-1].start()
    return len(text)


def json_lines(path: str, field: str) -> Iterator[str]:
    opener = next((OPENERS[end] for end in OPENERS if path.endswith(end)), _open_plain)
    for number, line in enumerate(_lines(path, opener), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(where, error.start, error)) from error
        except json.JSONDecodeError as error:
            wrong = f"is not JSON: {error.msg} at column {error.colno}"
            raise ValueError(f"{where} {wrong}; {_one_a_line(line)}") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits; deep nesting
            raise ValueError(f"{where} cannot be read: {error}") from error
        if not isinstance(record, dict):
            wrong = f"is {type(record).__name__}, not an object"
            raise ValueError(f"{where} {wrong}; {_one_a_line(line)}")
        yield text_of(record, field, where)


def _one_a_line(line: bytes) -> str:
    is_array = line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"[")
    array = "; jq -c '.[]' makes that of an array" if is_array else ""
    return f"one record a line is wanted{array}"


def parquet(path: str, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(_no_field(field, names, path))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path} record {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:  # parquet does not check its strings
                        raise ValueError(_not_utf8(where, error.start, error)) from error
                    yield text_of({field: text}, field, where)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is truncated or no parquet file: {error}") from error


def text_of(record: dict, field: str, where: str) -> str:
    """A record's text, "" for null; bytes, as TFDS and some parquet files have them, are UTF-8."""
    if field not in record:
        raise ValueError(_no_field(field, record, where))
    text = record[field]
    if text is None:
        return ""
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(where, error.start, error)) from error
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    # JSON can spell half a surrogate pair, which has no UTF-8.
    return text if text.isascii() else text.encode(errors="replace").decode()


def _no_field(field: str, names, where: str) -> str:
    return (
        f"{where} has no field {field!r} but {', '.join(map(repr, names)) or 'none'}; "
        "set text_field of the source to one of them"
    )


def _lines(path: str, opener: Callable[[BinaryIO], Iterator[bytes]]) -> Iterator[bytes]:
    held = []
    with open(path, "rb") as file:
        blocks = opener(file)
        while True:
            try:
                block = next(blocks, None)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path} is truncated or damaged near byte {file.tell()}: {error}"
                ) from error
            if block is None:
                break
            *complete, rest = block.split(b"\n")
            for line in complete:
                yield b"".join([*held, line])
                held = []
            held.append(rest)
    yield b"".join(held)


def _open_plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _open_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unzipped:
        while block := unzipped.read(BLOCK):
            yield block


def _open_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frames one after another. zstandard's own reader takes a cut-off frame for the end."""
    import zstandard

    # The window of `zstd --long=31`, the widest; the decoder's own limit is 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while block := file.read(BLOCK):
        while block:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the last zstandard frame is incomplete")


OPENERS = {".gz": _open_gzip, ".zst": _open_zstd}
READERS = {
    ".txt": plain,
    ".md": plain,
    ".py": plain,
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".jsonl.zst": json_lines,
    # The public C4 and Dolma files are JSON Lines under these names.
    ".json": json_lines,
    ".json.gz": json_lines,
    ".json.zst": json_lines,
    ".parquet": parquet,
}
