import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.data import iterator, mixture, prepare
from tests.data.small import data_of, files, quiet, run_of, write_texts

B = 8


def joined(batches):
    """The global batch of what several hosts have loaded, each every so-many-eth row."""
    turns = zip(*batches, strict=True)
    return iterator.Batch(
        *(np.stack(arrays, 1).reshape(-1, arrays[0].shape[1]) for arrays in turns)
    )


def same(a, b):
    for name, x, y in zip(iterator.Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def loaded(run, prepared, hosts, step):
    rows = [np.arange(host, run.train.batch_size, hosts) for host in range(hosts)]
    return [iterator.loader(run, prepared, own)(step) for own in rows]


@pytest.mark.parametrize("segments", ["none", "document"])
def test_any_number_of_hosts_sees_the_same_batches_also_after_a_change(two_sources, segments):
    data, prepared = two_sources
    run = run_of(dataclasses.replace(data, segments=segments), B)
    alone = [loaded(run, prepared, 1, step)[0] for step in range(12)]
    for schedule in ([1, 2, 4, 8], [8, 8, 2, 2], [4, 1, 8, 4]):
        for step in range(12):
            parts = loaded(run, prepared, schedule[step // 3], step)
            same(joined([part.batch for part in parts]), alone[step].batch)
            for part in parts:  # every host can write the audit
                np.testing.assert_array_equal(part.sources, alone[step].sources)
                np.testing.assert_array_equal(part.rows, alone[step].rows)


def test_batches_are_the_rows_that_the_order_names(two_sources):
    data, prepared = two_sources
    run = run_of(data, B)
    order = mixture.order_of(data, prepared)
    for step in (0, 7):
        got = iterator.loader(run, prepared, np.arange(B))(step)
        for b in range(B):
            source, row = order[step * B + b]
            assert (got.sources[b], got.rows[b]) == (source, row)
            tokens = prepared.sources[source].store.train.read([row])[0][0]
            np.testing.assert_array_equal(got.batch.tokens_BT[b], tokens[:-1])
            np.testing.assert_array_equal(got.batch.targets_BT[b], tokens[1:])


def test_training_goes_on_exactly_from_any_step(two_sources, layout):
    data, prepared = two_sources
    run = run_of(data, B, steps=9)
    whole = list(iterator.train(run, prepared, layout, 0))
    assert len(whole) == 9
    for first in (4, 8, 9):
        rest = list(iterator.train(run, prepared, layout, first))
        assert len(rest) == 9 - first
        for a, b in zip(rest, whole[first:], strict=True):
            same(a.batch, b.batch)
            assert a.rows.tolist() == b.rows.tolist()


def test_eight_devices_hold_the_batch_of_one(two_sources, layout):
    data, prepared = two_sources
    run = run_of(data, 2 * B, steps=3)
    eight = sharding.make(config.Mesh(data=2, fsdp=-1), jax.devices()[:8])
    shapes = iterator.abstract(run, eight)
    for a, b in zip(
        iterator.train(run, prepared, layout, 0),
        iterator.train(run, prepared, eight, 0),
        strict=True,
    ):
        same(a.batch, b.batch)
        for array, shape in zip(b.batch, shapes, strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
            assert array.sharding.is_equivalent_to(shape.sharding, 2)
            assert len({str(shard.index) for shard in array.addressable_shards}) == 8


@dataclasses.dataclass(frozen=True)
class Host:
    """The layout of one simulated process among several, whose rows lie apart."""

    host: int
    hosts: int

    def host_rows(self, rows):
        return np.arange(self.host, rows, self.hosts)

    def put(self, local, letters, rows):
        assert letters == "BT"
        assert len(local) == rows // self.hosts
        return local


def test_validation_goes_source_after_source_and_fills_up_the_last_batch_of_each(two_sources):
    data, prepared = two_sources
    run = dataclasses.replace(run_of(data, B, microbatches=2), eval=config.Eval(rows=11))
    alone = list(iterator.validation(run, prepared, Host(0, 1)))
    assert [source for source, _ in alone] == ["long", "long", "short", "short"]
    assert [batch.tokens_BT.shape for _, batch in alone] == [(4, 13)] * 4
    picks = mixture.validation_picks(prepared, 11)
    expected = [prepared.sources[s].store.validation.read([row])[0][0] for s, row in picks]
    tokens = np.concatenate([batch.tokens_BT for _, batch in alone])
    weights = np.concatenate([batch.weights_BT for _, batch in alone])
    assert weights.sum(axis=1).tolist() == [13.0] * 6 + [0.0] * 2 + [13.0] * 5 + [0.0] * 3
    np.testing.assert_array_equal(tokens[weights[:, 0] > 0], np.array(expected)[:, :-1])
    for hosts in (2, 4):
        parts = [list(iterator.validation(run, prepared, Host(h, hosts))) for h in range(hosts)]
        for n, (_, batch) in enumerate(alone):
            same(joined([part[n].batch for part in parts]), batch)
    here = list(iterator.validation_here(run, prepared))
    assert [len(batch.tokens_BT) for _, batch in here] == [4, 2, 4, 1]
    np.testing.assert_array_equal(
        np.concatenate([batch.targets_BT for _, batch in here]), np.array(expected)[:, 1:]
    )


def test_the_first_rows_are_those_that_training_begins_with(two_sources):
    data, prepared = two_sources
    run = run_of(data, B)
    first = iterator.first_rows(run, prepared, B)
    same(first, iterator.loader(run, prepared, np.arange(B))(0).batch)
    total = sum(len(corpus.store.train) for corpus in prepared.sources)
    assert len(iterator.first_rows(run, prepared, 10**9).tokens_BT) == total


def test_bytes_a_token_are_of_the_targets_that_count(tmp_path):
    folder = write_texts(tmp_path / "t", 30, lines=2)

    def found(packing, segments):
        data = data_of(
            tmp_path, files(folder), seq_len=300, packing=packing, segments=segments,
            validation_fraction=0.3,
        )  # fmt: skip
        prepared = prepare.prepare(data, 259, quiet)
        run = dataclasses.replace(run_of(data, 4), eval=config.Eval(rows=10**6))
        store = prepared.sources[0].store
        return iterator.bytes_per_token(run, prepared)["corpus"], store

    value, store = found("concat", "none")
    tokens = store.validation.read(range(len(store.validation)))[0][:, 1:]
    assert value == (tokens < 256).sum() / tokens.size
    figures = store.meta.splits["validation"]
    assert value > figures.bytes / figures.tokens, "the first begin token is no target"
    value, store = found("best_fit", "none")  # no document is longer than a row
    figures = store.meta.splits["validation"]
    assert figures.documents > figures.rows > 1
    assert value == figures.bytes / (figures.tokens - figures.rows)
    value, _ = found("best_fit", "document")
    assert value == figures.bytes / (figures.tokens - figures.documents)


def test_padding_has_no_weight_and_every_real_target_has_one(tmp_path):
    folder = write_texts(tmp_path / "t", 30, lines=2)
    fields = {"seq_len": 300, "packing": "best_fit", "validation_fraction": 0.3}
    for segments in ("none", "document"):
        data = data_of(tmp_path, files(folder), segments=segments, **fields)
        prepared = prepare.prepare(data, 259, quiet)
        (corpus,) = prepared.sources
        rows = len(corpus.store.train)
        batch = iterator.loader(run_of(data, rows), prepared, np.arange(rows))(0).batch
        figures = corpus.store.meta.splits["train"]
        assert figures.padding > 0
        counted = figures.tokens - (rows if segments == "none" else figures.documents)
        assert batch.weights_BT.sum() == counted
        assert not batch.weights_BT[batch.targets_BT == prepared.tokenizer.pad].any()
        if segments == "document":
            starts = batch.tokens_BT == prepared.tokenizer.bos
            assert (batch.positions_BT[starts] == 0).all()
            assert not batch.weights_BT[batch.targets_BT == prepared.tokenizer.bos].any()


def test_an_id_beyond_the_vocabulary_is_named(two_sources):
    data, prepared = two_sources
    run = run_of(data, batch_size=1)
    small = dataclasses.replace(run, model=config.Model(vocab_size=257))  # without eos, 257
    places = set()
    for step in range(200):
        got = iterator.loader(run, prepared, np.arange(1))(step)
        ids = np.append(got.batch.tokens_BT[0], got.batch.targets_BT[0, -1])
        if (ids < 257).all():
            iterator.loader(small, prepared, np.arange(1))(step)
            continue
        place = int(np.argmax(ids >= 257))
        places.add("target" if place == len(ids) - 1 else "token")
        name = prepared.sources[got.sources[0]].name
        message = (
            rf"data.sources.{name}: row {got.rows[0]} of its train split \(.*\) has token id 257 "
            rf"at position {place}; ids must be below model.vocab_size=257"
        )
        with pytest.raises(ValueError, match=message):
            iterator.loader(small, prepared, np.arange(1))(step)
    assert places == {"target", "token"}
    with pytest.raises(ValueError, match="ids must be below"):
        list(iterator.train(small, prepared, Host(0, 1), 0))


def test_opening_is_quick_to_import():
    """What takes long (TFDS, SentencePiece, tiktoken, parquet) waits until it is needed."""
    import subprocess
    import sys

    names = ("tensorflow_datasets", "sentencepiece", "tiktoken", "pyarrow", "grain")
    code = f"import sys, llama_jax.data.iterator\nprint([m for m in sys.modules if m in {names}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr
