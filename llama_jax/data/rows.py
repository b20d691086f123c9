"""Stores of fixed rows: ArrayRecord shards with the metadata of TFDS, and a meta.json of ours.

A folder is complete or absent: it is written under another name and renamed. TFDS opens it
(`tfds.builder_from_directory(folder).as_data_source("train")`); here it is read without TFDS, whose
import alone takes half a second.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.data import example
from llama_jax.data.pack import PackedRow

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
DATASET = "rows"
SHARD_BYTES = 1 << 29
# Rows are read one by one: groups of 64 read 6 times slower. zstd, the default, makes uint16 rows
# of 256 tokens 0.92 and of 2048 tokens 0.59 of their size; they read at 0.81 and 0.94 of the rate.
OPTIONS = "group_size:1"
UNFINISHED = ".unfinished-"  # begins the names of folders that are being written
DAY = 24 * 3600.0  # seconds


@dataclasses.dataclass(frozen=True)
class Split:
    """Figures of one split. Tokens: all of its text, with begin and end tokens."""

    rows: int
    tokens: int
    bytes: int  # of UTF-8
    documents: int
    dropped: int  # tokens behind the last whole row
    padding: int  # tokens of padding in the rows
    shards: dict[str, int]  # file name -> bytes


@dataclasses.dataclass(frozen=True)
class StoreMetadata:
    """What the rows are made of; meta.json."""

    seq_len: int
    packing: str
    vocab_size: int
    tokenizer_kind: str
    tokenizer: str  # fingerprint
    bos: int
    text: str  # fingerprint
    python: str  # whose standard library the text is; "" for other text
    splits: dict[str, Split]


class Rows:
    """Random access to the rows of one split. Safe to read from several threads."""

    def __init__(self, folder: str, split: str, meta: StoreMetadata):
        info = _json(os.path.join(folder, "dataset_info.json"))
        lengths = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}[split]
        self._files = [
            os.path.join(folder, _shard(split, number, len(lengths)))
            for number in range(len(lengths))
        ]
        self._starts = np.cumsum([0, *lengths])
        self._readers: list[Any] = [None] * len(lengths)
        self._dtypes = _dtypes(folder, meta)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [n, seq_len+1] and stored segments of these rows."""
        wanted = np.asarray(indices)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        records = [b""] * len(wanted)
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            rows = (wanted[where] - self._starts[shard]).tolist()
            try:
                found = self._reader(shard).read(rows)
            except (
                RuntimeError,
                IndexError,
            ) as error:  # a checksum that does not agree; a short file
                file = self._files[shard]
                raise ValueError(
                    f"{file} is damaged: {error}; delete {os.path.dirname(file)} to prepare again"
                ) from error
            for at, record in zip(where, found, strict=True):
                records[at] = record
        features = [example.decode(record) for record in records]
        tokens, *segments = (
            np.stack([np.frombuffer(f[name], self._dtypes[name]) for f in features])
            for name in ("tokens", "segments")
            if name in self._dtypes
        )
        return tokens, segments[0] if segments else None

    def _reader(self, shard: int):
        if self._readers[shard] is None:
            # Two threads may both open it; the last one stays, the other is collected.
            # No read-ahead: the order is random.
            self._readers[shard] = _array_record().ArrayRecordReader(
                self._files[shard], "readahead_buffer_size:0", file_reader_buffer_size=32768
            )
        return self._readers[shard]


@dataclasses.dataclass(frozen=True)
class Store:
    folder: str
    meta: StoreMetadata
    train: Rows
    validation: Rows


def load(folder: str) -> Store:
    """Open a folder of rows. ValueError names what is missing or damaged."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder of rows: no such folder")
    values = _json(os.path.join(folder, "meta.json"))
    try:
        splits = {name: Split(**split) for name, split in values.pop("splits").items()}
        meta = StoreMetadata(**values, splits=splits)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}/meta.json is not that of a folder of rows: {error}") from error
    for split in meta.splits.values():
        for name, size in split.shards.items():
            path = os.path.join(folder, name)
            actual = os.path.getsize(path) if os.path.exists(path) else -1
            if actual != size:
                found = "is missing" if actual < 0 else f"has {actual} bytes"
                raise ValueError(
                    f"{path} {found}, {size} were written; delete {folder} to prepare again"
                )
    try:
        return Store(folder, meta, Rows(folder, "train", meta), Rows(folder, "validation", meta))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: dataset_info.json or features.json lacks {error}") from error


@contextlib.contextmanager
def folder(final: str) -> Iterator[str]:
    """A new folder that becomes `final` on leaving, unless an error or another process is first."""
    parent = os.path.dirname(final)
    try:
        os.makedirs(parent, exist_ok=True)
        _sweep(parent)
        new = tempfile.mkdtemp(prefix=UNFINISHED, dir=parent)
    except OSError as error:
        raise ValueError(
            f"data.cache cannot hold rows: {parent}: {error.strerror}; set data.cache to a folder "
            "that can be written"
        ) from error
    try:
        yield new
        os.chmod(new, 0o755)
        try:
            os.rename(new, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(new)  # another process has finished the same rows
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _sweep(parent: str) -> None:
    """Remove what processes that were killed left unfinished: nothing in it has changed for a day."""
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if not name.startswith(UNFINISHED):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just finished it
            parts = [path, *(entry.path for entry in os.scandir(path))]
            if time.time() - max(os.stat(part).st_mtime for part in parts) > DAY:
                shutil.rmtree(path, ignore_errors=True)


def write(folder: str, split: str, rows: Iterable[PackedRow], vocab_size: int) -> dict[str, int]:
    """Write the rows of a split. Returns {shard: its rows}, in order."""
    array_record_module = _array_record()
    shards, writer, size = [], None, 0
    for row in rows:
        record = example.encode(
            {
                name: np.ascontiguousarray(value, dtype).tobytes()
                for name, value, dtype in (
                    ("tokens", row.tokens, token_dtype(vocab_size)),
                    ("segments", row.segments, np.uint16),
                )
                if value is not None
            }
        )
        if writer is None or size > SHARD_BYTES:
            if writer:
                writer.close()
            path = os.path.join(folder, f"{split}-{len(shards)}")
            writer, size = array_record_module.ArrayRecordWriter(path, OPTIONS), 0
            shards.append([path, 0])
        writer.write(record)
        size += len(record)
        shards[-1][1] += 1
    if writer:
        writer.close()
    named = {_shard(split, number, len(shards)): count for number, (_, count) in enumerate(shards)}
    for (path, _), name in zip(shards, named, strict=True):
        os.rename(path, os.path.join(folder, name))
    return named


def describe(
    folder: str, shards: dict[str, dict[str, int]], segments: bool, meta: StoreMetadata
) -> None:
    """Write the metadata, TFDS's and ours. `shards`: split -> what `write` returned."""
    import tensorflow_datasets as tfds

    def tensor(dtype):
        return tfds.features.Tensor(shape=(meta.seq_len + 1,), dtype=dtype, encoding="bytes")

    data_dir: Any = folder  # the annotation of TFDS has no text
    features = {"tokens": tensor(token_dtype(meta.vocab_size))}
    if segments:
        features["segments"] = tensor(np.uint16)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        check_data=False,
        filename_template=TEMPLATE,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(counts.values()),
                num_bytes=sum(meta.splits[split].shards.values()),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=data_dir,
                    dataset_name=DATASET,
                    split=split,
                    filetype_suffix="array_record",
                    template=TEMPLATE,
                ),
            )
            for split, counts in shards.items()
        ],
    )
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(dataclasses.asdict(meta), f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _array_record() -> Any:
    """The library's binary module, which has no annotations."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    return array_record_module


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _shard(split: str, number: int, count: int) -> str:
    return f"{DATASET}-{split}.array_record-{number:05}-of-{count:05}"


def _json(path: str):
    try:
        with open(path) as f:
            return json.load(f)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; a folder of rows is what llama_jax.data.prepare wrote"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _dtypes(folder: str, meta: StoreMetadata) -> dict[str, np.dtype]:
    """The type of each feature; ValueError unless all are rows of seq_len+1, stored as bytes."""
    path = os.path.join(folder, "features.json")
    features = _json(path)["featuresDict"]["features"]
    dtypes = {}
    for name, feature in features.items():
        tensor = feature.get("tensor", {})
        shape = [int(n) for n in tensor.get("shape", {}).get("dimensions", [])]
        if shape != [meta.seq_len + 1] or tensor.get("encoding") != "bytes":
            raise ValueError(
                f"{path}: feature {name!r} must be a tensor of {meta.seq_len + 1} with encoding "
                f"'bytes', not {shape} with {tensor.get('encoding')!r}"
            )
        dtypes[name] = np.dtype(tensor["dtype"]).newbyteorder("<")
    if "tokens" not in dtypes:
        raise ValueError(f"{path} has no feature 'tokens' but {', '.join(dtypes)}")
    return dtypes
