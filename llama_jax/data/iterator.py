"""Batches on the devices: each process loads its own rows of the global batch, ahead of time.

Global batch n is rows n*B .. n*B+B-1 of the order (mixture.py), whatever the number of processes,
so that a run continues exactly from a step number, also on other hardware.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from llama_jax import config
from llama_jax.data import batch as batches
from llama_jax.data import mixture
from llama_jax.data.batch import Batch
from llama_jax.data.prepare import Prepared
from llama_jax.sharding import Layout
from llama_jax.tokenizer import base


class LoadedBatch(NamedTuple):
    """A batch and where its rows come from, those of all processes."""

    batch: Batch
    sources: np.ndarray  # [B], index into prepared.sources
    rows: np.ndarray  # [B], row of that source's training split


def train(
    run: config.Run, prepared: Prepared, layout: Layout, first_step: int
) -> Iterator[LoadedBatch]:
    """The batches of steps first_step .. train.steps-1, as global arrays."""
    import grain

    load = loader(run, prepared, layout.host_rows(run.train.batch_size))
    threads = run.data.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    steps = grain.MapDataset.range(first_step, run.train.steps).map(load)
    for loaded in steps.to_iter_dataset(options):
        yield loaded._replace(batch=_put(loaded.batch, layout, run.train.batch_size))


def abstract(run: config.Run, layout: Layout) -> Batch:
    """Shapes, types and places of a training batch, to compile for before there is one."""
    shape = (run.train.batch_size, run.data.seq_len)
    types = (np.int32, np.int32, np.float32, np.int32, np.int32)  # of Batch
    place = layout.batch("BT")
    return Batch._make(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in types)


def loader(run: config.Run, prepared: Prepared, own: np.ndarray) -> Callable[[int], LoadedBatch]:
    """step -> its global batch, but in numpy and only the rows `own` of it."""
    order = mixture.order_of(run.data, prepared)
    size = run.train.batch_size

    def load(step: int) -> LoadedBatch:
        picks = [order[int(step) * size + i] for i in range(size)]
        sources, rows = np.array(picks, np.int64).T
        return LoadedBatch(_load(run, prepared, "train", [picks[i] for i in own]), sources, rows)

    return load


def first_rows(run: config.Run, prepared: Prepared, rows: int) -> Batch:
    """The first rows of training, in numpy; at most as many as there are different ones."""
    order = mixture.order_of(run.data, prepared)
    most = sum(len(corpus.store.train) for corpus in prepared.sources)
    return _load(run, prepared, "train", [order[i] for i in range(min(rows, most))])


class HeldOut(NamedTuple):
    """A batch of held-out rows, all of one source."""

    source: str
    batch: Batch


def validation(run: config.Run, prepared: Prepared, layout: Layout) -> Iterator[HeldOut]:
    """The held-out rows, source after source, in batches the size of a microbatch.

    The last batch of a source is filled up with rows of weight 0.
    """
    size = run.train.batch_size // run.train.microbatches
    own = layout.host_rows(size)
    for source, real in _validation_batches(run, prepared):
        filled = real + real[-1:] * (size - len(real))
        local = _load(run, prepared, "validation", [filled[i] for i in own])
        counts_B1 = (own < len(real)).astype(np.float32)[:, None]
        local = local._replace(weights_BT=local.weights_BT * counts_B1)
        yield HeldOut(source, _put(local, layout, size))


def validation_here(run: config.Run, prepared: Prepared) -> Iterator[HeldOut]:
    """The same rows, all of them on this host, in numpy."""
    for source, picks in _validation_batches(run, prepared):
        yield HeldOut(source, _load(run, prepared, "validation", picks))


def bytes_per_token(run: config.Run, prepared: Prepared) -> dict[str, float]:
    """Bytes of text a target in each source, over the very targets that validation counts.

    So bits a byte do not depend on which rows are read, nor on how they are packed. Begin and end
    tokens add no bytes; where they are targets their bits count.
    """
    bytes_2V = base.byte_counts(prepared.tokenizer)
    sums = {corpus.name: np.zeros(2) for corpus in prepared.sources}  # bytes, targets
    for source, batch in validation_here(run, prepared):
        counts_BT = batch.weights_BT > 0
        is_first = (batch.tokens_BT == prepared.tokenizer.bos)[counts_BT].astype(int)
        found = bytes_2V[is_first, batch.targets_BT[counts_BT]]
        sums[source] += found.sum(), found.size
    return {source: float(of_text / targets) for source, (of_text, targets) in sums.items()}


def _validation_batches(run, prepared: Prepared) -> Iterator[tuple[str, list[mixture.Pick]]]:
    picks = mixture.validation_picks(prepared, run.eval.rows)
    size = run.train.batch_size // run.train.microbatches
    for number, corpus in enumerate(prepared.sources):
        own = [pick for pick in picks if pick[0] == number]
        for first in range(0, len(own), size):
            yield corpus.name, own[first : first + size]


def _load(run: config.Run, prepared: Prepared, split: str, picks: list[mixture.Pick]) -> Batch:
    sources, rows = np.array(picks, np.int64).T
    parts, places = [], []
    for source in np.unique(sources):
        where = np.flatnonzero(sources == source)
        tokens, segments = getattr(prepared.sources[source].store, split).read(rows[where])
        bos, eos = prepared.tokenizer.bos, prepared.tokenizer.eos
        parts.append(batches.from_rows(tokens, segments, run.data.segments, bos, eos))
        places.append(where)
    back = np.argsort(np.concatenate(places))
    local = Batch(*(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)))
    _check_ids(run, prepared, split, local, picks)
    return local


def _check_ids(run, prepared, split: str, batch: Batch, picks: list[mixture.Pick]) -> None:
    for shift, ids_BT in enumerate((batch.tokens_BT, batch.targets_BT)):
        if ids_BT.max() < run.model.vocab_size:
            continue
        b, t = np.argwhere(ids_BT >= run.model.vocab_size)[0]
        source, row = picks[b]
        corpus = prepared.sources[source]
        raise ValueError(
            f"data.sources.{corpus.name}: row {row} of its {split} split ({corpus.store.folder}) "
            f"has token id {ids_BT[b, t]} at position {t + shift}; ids must be below "
            f"model.vocab_size={run.model.vocab_size}: the rows are damaged or belong to another "
            "tokenizer"
        )


def _put(local: Batch, layout: Layout, rows: int) -> Batch:
    return Batch._make(layout.put(np.asarray(array), "BT", rows) for array in local)
