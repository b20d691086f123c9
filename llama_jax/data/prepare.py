"""From a `config.Data` to stores of rows: read, tokenise, pack, write; once, then from the cache.

The cache key is the fingerprint of all that decides the rows: text, tokenizer, packing, row length,
validation fraction. The tokenizer lies beside the rows, so that a folder of rows is complete.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.data import pack, rows, source
from llama_jax.data.documents import Piece
from llama_jax.tokenizer import base, in_folder, sp
from llama_jax.tokenizer.added import NONE, Additions
from llama_jax.tokenizer.base import Tokenizer

FORMAT = 2  # of the rows; raise it when the same text gives other rows
CHUNK_CHARS = 1 << 22  # tokenised at a time
MODEL_FILE = in_folder.FILE  # beside the rows


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One source, prepared."""

    name: str
    weight: float
    store: rows.Store


@dataclasses.dataclass(frozen=True)
class Prepared:
    tokenizer: Tokenizer
    tokenizer_config: (
        config.TokenizerConfig
    )  # loads it again, from beside the rows, with the additions
    additions: Additions  # of a checkpoint
    sources: tuple[Corpus, ...]
    fingerprint: str  # of every source's rows

    @property
    def train_tokens(self) -> int:
        """Of the split's text, begin and end tokens included; so are validation_tokens."""
        return self._total("train", "tokens")

    @property
    def train_bytes(self) -> int:
        return self._total("train", "bytes")

    @property
    def validation_tokens(self) -> int:
        return self._total("validation", "tokens")

    @property
    def validation_bytes(self) -> int:
        return self._total("validation", "bytes")

    def _total(self, split: str, figure: str) -> int:
        return sum(getattr(corpus.store.meta.splits[split], figure) for corpus in self.sources)


def prepare(data: config.Data, vocab_size: int, report: Callable[[str], None] = print) -> Prepared:
    """The rows of every source, from the cache where they are there. `report` gets what is done."""
    cache = os.path.abspath(os.path.expanduser(data.cache))
    stores = {s.name: _open_rows(s, data) for s in data.sources if s.kind == "rows"}
    texts = [
        source.open_text(s, data.validation_fraction, cache)
        for s in data.sources
        if s.kind != "rows"
    ]
    choice = _tokenizer(data, texts, list(stores.values()), vocab_size, cache, report)
    file, additions = choice, NONE
    if choice.kind == "folder":
        file, additions = in_folder.read(choice.path)
    tokenizer = base.load(file, additions)
    # A checkpoint's embedding may have more rows than its tokenizer has tokens.
    fits = tokenizer.vocab_size <= vocab_size and choice.kind == "folder"
    if tokenizer.vocab_size != vocab_size and not fits:
        raise ValueError(
            f"model.vocab_size={vocab_size} but the tokenizer ({choice.path or choice.kind}) has "
            f"{tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}, or, to begin with "
            "a model that has more, data.tokenizer.kind='folder' and data.tokenizer.path to its folder"
        )
    for name, store in stores.items():
        if store.meta.tokenizer != tokenizer.fingerprint or (
            in_folder.additions(store.folder) != additions
            and _ends(base.load(_beside(store))) != _ends(tokenizer)
        ):
            raise ValueError(
                f"data.sources.{name}.path={store.folder!r} was made with another tokenizer "
                f"({store.meta.tokenizer_kind}, {store.meta.vocab_size} tokens) than "
                f"{choice.path or choice.kind}; set data.tokenizer.kind="
                f"{_beside(store).kind!r} and data.tokenizer.path={_beside(store).path!r}"
            )
    for text in texts:
        stores[text.name] = _rows(text, data, tokenizer, file, additions, cache, report)
    corpora = tuple(Corpus(s.name, s.weight, stores[s.name]) for s in data.sources)
    identity: list[Any] = [[c.name, _identity(c.store.meta)] for c in corpora]
    if additions != NONE:
        identity.append(in_folder.to_dict(additions))
    first = corpora[0].store
    beside = config.TokenizerConfig(first.meta.tokenizer_kind, _model_path(first))
    return Prepared(tokenizer, beside, additions, corpora, _sha(identity))


def _ends(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """What rows hold besides texts. The fingerprint is of texts alone."""
    return tokenizer.bos, tokenizer.eos, tokenizer.pad


def training_lines(texts: list[source.SourceText]) -> Iterator[str]:
    """The lines of the training split, for training a tokenizer."""
    for text in texts:
        for piece in text.read("train"):
            yield from piece.text.split("\n")


def _identity(meta: rows.StoreMetadata) -> dict:
    """What the rows hold, whatever size this version of ArrayRecord makes of them."""
    splits = {name: dataclasses.replace(split, shards={}) for name, split in meta.splits.items()}
    return dataclasses.asdict(dataclasses.replace(meta, splits=splits))


def _open_rows(of: config.Source, data: config.Data) -> rows.Store:
    place, folder = f"data.sources.{of.name}", os.path.abspath(os.path.expanduser(of.path))
    if not os.path.isdir(folder):
        raise ValueError(
            f"{place}.path={of.path!r}: there is no such folder of rows; rows are made on the way from "
            f"text: --config.{place}.kind=files --config.{place}.path='FOLDER/*.jsonl'; "
            f"--config.{place}.weight=0 leaves the source out"
        )
    try:
        store = rows.load(folder)
    except ValueError as error:
        raise ValueError(f"data.sources.{of.name}.path={of.path!r}: {error}") from error
    if store.meta.seq_len != data.seq_len:
        raise ValueError(
            f"data.seq_len={data.seq_len} but the rows of data.sources.{of.name} ({of.path}) "
            f"predict {store.meta.seq_len} tokens; set data.seq_len={store.meta.seq_len}"
        )
    if store.meta.packing != data.packing:
        raise ValueError(
            f"data.packing={data.packing!r} has no effect on the rows of data.sources.{of.name} "
            f"({of.path}); set data.packing={store.meta.packing!r}, as they were made"
        )
    return store


def _tokenizer(
    data: config.Data, texts, stores, vocab_size: int, cache: str, report
) -> config.TokenizerConfig:
    """The tokenizer that is named, else the one beside given rows, else one trained now."""
    if data.tokenizer.kind != "sp" or data.tokenizer.path:
        return data.tokenizer
    if stores:
        return _beside(stores[0])
    key = _sha([FORMAT, [t.fingerprint for t in texts], data.validation_fraction, vocab_size])
    path = os.path.join(cache, "tokenizers", key[:32] + ".model")
    if not os.path.exists(path):
        report(f"training a SentencePiece tokenizer of {vocab_size} pieces")
        try:
            sp.train(training_lines(texts), vocab_size, path, os.cpu_count() or 1)
        except OSError as error:
            raise ValueError(f"data.cache={data.cache!r} cannot be written: {error}") from error
    return config.TokenizerConfig("sp", path)


def _rows(
    text: source.SourceText, data: config.Data, tokenizer, file, additions: Additions, cache, report
) -> rows.Store:
    recipe = [data.packing, data.seq_len, data.validation_fraction]
    if additions != NONE:  # the fingerprint says nothing of special ones
        recipe.append(in_folder.to_dict(additions))
    key = _sha([FORMAT, text.fingerprint, tokenizer.fingerprint, *recipe])
    final = os.path.join(cache, "rows", key[:32])
    if not os.path.exists(final):
        report(f"{text.name}: tokenising and packing into rows of {data.seq_len} tokens")
        with rows.folder(final) as folder:
            _build(folder, text, data, tokenizer, file, report)
            if additions != NONE:
                with open(os.path.join(folder, in_folder.ADDITIONS), "w") as opened:
                    json.dump(in_folder.to_dict(additions), opened)
        report(f"{text.name}: wrote {final}")
    return rows.load(final)


def _build(
    folder: str, text: source.SourceText, data: config.Data, tokenizer, file, report
) -> None:
    import tqdm

    splits, shards = {}, {}
    on_terminal = sys.stderr.isatty()
    with tqdm.tqdm(
        desc=text.name, total=text.size or None, unit="B", unit_scale=True, disable=not on_terminal
    ) as bar:
        for split in source.SPLITS:
            tokenised = _Tokenised(text.read(split), tokenizer, bar.update)
            packed = _Returning(
                pack.PACKINGS[data.packing](
                    tokenised.ids(), data.seq_len, tokenizer.bos, tokenizer.pad
                )
            )
            shards[split] = rows.write(folder, split, packed, tokenizer.vocab_size)
            dropped, padding = packed.returned
            if not shards[split]:
                raise ValueError(_too_short(text.name, split, tokenised, data))
            sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in shards[split]}
            splits[split] = rows.Split(
                rows=sum(shards[split].values()),
                tokens=tokenised.tokens,
                bytes=tokenised.bytes,
                documents=tokenised.documents,
                dropped=dropped,
                padding=padding,
                shards=sizes,
            )
            empty = f"; {tokenised.empty} without text left out" if tokenised.empty else ""
            report(
                f"{text.name}: {split}: {tokenised.documents} documents, {tokenised.bytes} bytes, "
                f"{tokenised.tokens} tokens in {splits[split].rows} rows; "
                f"{dropped} tokens dropped at the end, {padding} of padding{empty}"
            )
    if file.path:
        shutil.copyfile(os.path.expanduser(file.path), os.path.join(folder, MODEL_FILE))
    meta = rows.StoreMetadata(
        seq_len=data.seq_len,
        packing=data.packing,
        vocab_size=tokenizer.vocab_size,
        tokenizer_kind=file.kind,
        tokenizer=tokenizer.fingerprint,
        bos=tokenizer.bos,
        text=text.fingerprint,
        python=text.python,
        splits=splits,
    )
    rows.describe(folder, shards, data.packing == "best_fit", meta)


class _Tokenised:
    """Pieces of text to ids, with counts of what passed. Empty documents are left out."""

    def __init__(self, pieces, tokenizer: Tokenizer, progress: Callable[[int], object]):
        self.documents = self.empty = self.bytes = self.tokens = 0
        self._pieces, self._tokenizer, self._progress = pieces, tokenizer, progress
        # A piece inside a document is encoded behind a newline, whose ids are then dropped.
        self._newline = tokenizer.encode("\n")

    def ids(self) -> Iterator[np.ndarray]:
        for chunk in _chunks(self._with_text()):
            texts = [piece.text if piece.first else "\n" + piece.text for piece in chunk]
            encoded = self._tokenizer.encode_batch(texts, os.cpu_count() or 1)
            for piece, ids in zip(chunk, encoded, strict=True):
                if not piece.first and ids[: len(self._newline)].tolist() == self._newline:
                    ids = ids[len(self._newline) :]
                opens = [self._tokenizer.bos] if piece.first else []
                closes = [self._tokenizer.eos] if piece.last else []
                ids = np.concatenate([opens, ids, closes]).astype(np.int32)
                self.documents += piece.last
                self.tokens += len(ids)
                yield ids
            size = sum(len(piece.text.encode()) for piece in chunk)
            self.bytes += size
            self._progress(size)

    def _with_text(self) -> Iterator[Piece]:
        for piece in self._pieces:
            if piece.text:
                yield piece
            else:
                self.empty += 1


def _chunks(pieces) -> Iterator[list]:
    chunk, chars = [], 0
    for piece in pieces:
        chunk.append(piece)
        chars += len(piece.text)
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


class _Returning:
    """An iterator over a generator that keeps what the generator returns."""

    def __init__(self, generator):
        self._generator = generator

    def __iter__(self):
        self.returned = yield from self._generator


def _too_short(name: str, split: str, tokenised: _Tokenised, data: config.Data) -> str:
    empty = f" and {tokenised.empty} without text" if tokenised.empty else ""
    advice = "give more text or lower data.seq_len"
    if split == "validation":
        advice += " or raise data.validation_fraction"
    return (
        f"data.sources.{name}: its {split} split has {tokenised.documents} documents{empty}, "
        f"{tokenised.tokens} tokens, and data.seq_len={data.seq_len} needs at least "
        f"{data.seq_len + 1} for one row; {advice}"
    )


def _beside(store: rows.Store) -> config.TokenizerConfig:
    """The tokenizer that rows were made with."""
    if in_folder.additions(store.folder) != NONE:
        return config.TokenizerConfig("folder", store.folder)
    return config.TokenizerConfig(store.meta.tokenizer_kind, _model_path(store))


def _model_path(store: rows.Store) -> str:
    return "" if store.meta.tokenizer_kind == "byte" else os.path.join(store.folder, MODEL_FILE)


def _sha(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
