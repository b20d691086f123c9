"""The text of a `config.Source`: its documents, their split, its fingerprint.

The split depends on what a document is called (files: the relative path) or says (records: the
content), never on order or time. Of files the share with the smallest hashes is validation, at
least one; of records those whose hash lies below the share.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from llama_jax import config
from llama_jax.data import documents
from llama_jax.data.documents import Piece

SPLITS = ("train", "validation")
FEW = 20  # text files; below this many each one is cut instead
LEFT_OUT = (
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
)


@dataclasses.dataclass(frozen=True)
class SourceText:
    """A source's documents. `size` is about how many bytes there are to read; 0: not known."""

    name: str
    fingerprint: str
    size: int
    python: str  # whose standard library; "" for other text
    read: Callable[[str], Iterator[Piece]]  # of a split


def open_text(source: config.Source, validation_fraction: float, cache: str) -> SourceText:
    """The text of a source. Files are hashed once; `cache` remembers while they are unchanged."""
    return OPENERS[source.kind](source, validation_fraction, cache)


def _stdlib(source: config.Source, fraction: float, cache: str) -> SourceText:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        # os.walk goes on into what `folders` then holds.
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # what os.walk enters
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in files if os.path.getsize(file)]
    if not files:
        raise ValueError(
            f"data.sources.{source.name}.kind='stdlib' finds no .py files in {root}; "
            "set kind 'files' and a path"
        )
    text = _of_files(source, root, sorted(files), fraction, cache)
    return dataclasses.replace(text, python=platform.python_version())


def _files(source: config.Source, fraction: float, cache: str) -> SourceText:
    place = f"data.sources.{source.name}.path={source.path!r}"
    pattern = os.path.abspath(os.path.expanduser(source.path))
    if os.path.isdir(pattern):
        raise ValueError(
            f"{place} is a folder; name its files: {os.path.join(source.path, '**/*.txt')!r}"
        )
    if os.path.isfile(pattern):  # whatever is in its name
        files, root = [pattern], os.path.dirname(pattern)
    else:
        found = sorted(glob.glob(pattern, recursive=True))
        files = [file for file in found if not os.path.isdir(file)]
        root = os.path.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0])
    if not files:
        raise ValueError(f"{place} matches no file; {_nearest(pattern)}")
    return _of_files(source, root, files, fraction, cache)


def _nearest(pattern: str) -> str:
    folder = os.path.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0])
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    names = sorted(os.listdir(folder))
    return f"{folder} holds {', '.join(names[:5]) or 'nothing'}{', ...' if names[5:] else ''}"


def _of_files(source, root: str, files: list[str], fraction: float, cache: str) -> SourceText:
    sizes = {file: _size(file) for file in files}
    hashes = _hashes(files, cache)
    relative = {file: os.path.relpath(file, root).replace(os.sep, "/") for file in files}
    plain = [file for file in files if documents.is_plain(file)]
    few = source.kind == "files" and len(plain) < FEW
    by_hash = sorted(plain, key=lambda file: hashlib.sha256(os.fsencode(relative[file])).digest())
    held_out = set() if few else set(by_hash[: max(1, round(fraction * len(plain)))])

    def read(split: str) -> Iterator[Piece]:
        for file in files:
            if file not in plain_set:
                for text in documents.records(file, source.text_field):
                    if _record_split(text, fraction) == split:
                        yield from documents.pieces(text)
            elif few:
                at = documents.cut(file, sizes[file], fraction)
                span = (0, at) if split == "train" else (at, sizes[file])
                yield from documents.plain(file, *span) if span[0] < span[1] else ()
            elif (file in held_out) == (split == "validation"):
                yield from documents.plain(file, 0, sizes[file])

    plain_set = set(plain)
    identity = [source.kind, *(f"{relative[file]} {hashes[file]}" for file in files)]
    if len(plain) < len(files):
        identity.append(source.text_field)
    known = all(file in plain_set or file.endswith((".jsonl", ".json")) for file in files)
    return SourceText(source.name, _sha(identity), sum(sizes.values()) if known else 0, "", read)


def _size(file: str) -> int:
    documents.suffix(file)
    try:
        size = os.path.getsize(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not size:
        raise ValueError(f"{file} is empty (0 bytes); leave it out of the glob")
    return size


def _record_split(text: str, fraction: float) -> str:
    part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if part < fraction else "train"


def _tfds(source: config.Source, fraction: float, cache: str) -> SourceText:
    import tensorflow_datasets as tfds

    place = f"data.sources.{source.name}.path={source.path!r}"
    try:
        builder = tfds.builder(source.path)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"{place} is no TFDS data set known here: {str(error).splitlines()[0]}; data sets on "
            "disk are found below TFDS_DATA_DIR"
        ) from error
    try:
        data: Any = tfds.data_source(source.path)
    except NotImplementedError as error:  # prepared as tfrecord, which has no random access
        raise ValueError(f"{place}: {error}; prepare it with file_format='array_record'") from error
    if "train" not in data:
        raise ValueError(f"{place} has no split 'train' but {', '.join(data)}")
    records = data["train"]
    splits = builder.info.splits["train"]
    identity = [
        *("tfds", builder.info.full_name, source.text_field),
        *(str(splits.num_examples), str(splits.num_bytes)),
    ]

    def read(split: str) -> Iterator[Piece]:
        for index in range(len(records)):
            where = f"{place} record {index}"
            text = documents.text_of(records[index], source.text_field, where)
            if _record_split(text, fraction) == split:
                yield from documents.pieces(text)

    return SourceText(source.name, _sha(identity), splits.num_bytes, "", read)


def _sha(lines: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()  # names may be no UTF-8


def _hashes(files: list[str], cache: str) -> dict[str, str]:
    """sha256 of each file, remembered in `cache` by path, size and time of change."""
    memo = os.path.join(cache, "hashes", _sha(files)[:32] + ".json")
    try:
        with open(memo) as f:
            known = json.load(f)
    except (OSError, ValueError):  # absent, or cut off by a crash: hash again
        known = {}
    new = {}
    for file in files:
        try:
            stat = os.stat(file)
            key = [stat.st_size, stat.st_mtime_ns]
            if known.get(file, [])[:2] == key:
                new[file] = known[file]
                continue
            with open(file, "rb") as f:
                new[file] = [*key, hashlib.file_digest(f, "sha256").hexdigest()]
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if new != known:
        with contextlib.suppress(OSError):  # a cache that cannot be written: hash again next time
            os.makedirs(os.path.dirname(memo), exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(memo), delete=False) as f:
                json.dump(new, f)
            os.replace(f.name, memo)
    return {file: digest for file, (_, _, digest) in new.items()}


OPENERS = {"stdlib": _stdlib, "files": _files, "tfds": _tfds}
