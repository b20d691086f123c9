import concurrent.futures
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from llama_jax import config
from llama_jax.data import prepare, rows, source
from llama_jax.tokenizer import base, in_folder
from llama_jax.tokenizer.added import Additions
from llama_jax.tokenizer.special import AddedToken
from tests.convert import small
from tests.data.small import data_of, files, quiet, write_texts


def words_of(prepared, corpus, split):
    """The text of a split, from its rows."""
    of = getattr(prepared.sources[corpus].store, split)
    tokens, segments = of.read(range(len(of)))
    if segments is None:
        stream = np.concatenate([tokens[0, :1], tokens[:, 1:].ravel()])
    else:
        stream = tokens[segments > 0]
    return prepared.tokenizer.decode(stream)


def test_rows_hold_the_text_of_their_split_and_the_figures_are_right(tmp_path):
    folder = write_texts(tmp_path / "t", 30)
    data = data_of(tmp_path, files(folder), seq_len=17, validation_fraction=0.2)
    lines = []
    prepared = prepare.prepare(data, 259, lines.append)
    (corpus,) = prepared.sources
    text = source.open_text(data.sources[0], 0.2, str(tmp_path))
    for split, documents in (("train", 24), ("validation", 6)):
        expected = "".join(piece.text for piece in text.read(split))
        figures = corpus.store.meta.splits[split]
        kept = words_of(prepared, 0, split)
        assert expected.startswith(kept.rstrip("\ufffd"))
        assert figures.documents == documents
        assert figures.bytes == len(expected.encode())
        assert figures.tokens == len(expected.encode()) + 2 * documents
        assert figures.rows == (figures.tokens - 1) // 17
        assert figures.dropped == (figures.tokens - 1) % 17
    assert prepared.validation_tokens == corpus.store.meta.splits["validation"].tokens
    assert prepared.train_bytes == corpus.store.meta.splits["train"].bytes
    assert any("24 documents" in line and f"{figures.rows}" for line in lines)


def test_the_second_time_nothing_is_tokenised_or_said(tmp_path, monkeypatch):
    data = data_of(tmp_path, files(write_texts(tmp_path / "t", 30)))
    first = prepare.prepare(data, 259, quiet)
    monkeypatch.setattr(type(first.tokenizer), "encode_batch", None)
    monkeypatch.setattr(rows, "write", None)
    lines = []
    second = prepare.prepare(data, 259, lines.append)
    assert lines == []
    assert second.fingerprint == first.fingerprint
    assert second.sources[0].store.folder == first.sources[0].store.folder


def test_whatever_decides_the_rows_changes_their_fingerprint_and_nothing_else_does(tmp_path):
    folder = write_texts(tmp_path / "t", 30)
    data = data_of(tmp_path, files(folder))
    change = dataclasses.replace

    def fingerprint(data):
        return prepare.prepare(data, 259, quiet).fingerprint

    before = fingerprint(data)
    os.utime(folder / "doc03.txt", (1, 1))
    same = change(data, seed=9, segments="document", threads=1, cache=str(tmp_path / "other"))
    assert fingerprint(data) == fingerprint(same) == before
    others = [
        change(data, seq_len=14),
        change(data, packing="best_fit"),
        change(data, validation_fraction=0.3),
        change(data, sources=(files(folder, "renamed"),)),
        change(data, sources=(files(folder, pattern="doc1*.txt"),)),
    ]
    prints = {before, *map(fingerprint, others)}
    sp_data = change(data, tokenizer=config.TokenizerConfig("sp"))
    prints |= {prepare.prepare(sp_data, size, quiet).fingerprint for size in (283, 284)}
    (folder / "doc03.txt").write_text("other text\n" * 9)
    prints.add(fingerprint(data))
    assert len(prints) == len(others) + 4


def test_a_tokenizer_is_trained_on_the_training_split_kept_beside_the_rows_and_reused(
    tmp_path, monkeypatch
):
    data = data_of(
        tmp_path, files(write_texts(tmp_path / "t", 30)), tokenizer=config.TokenizerConfig()
    )
    seen = []
    train = prepare.sp.train

    def spy(lines, *args):
        lines = list(lines)
        seen.append(lines)
        train(lines, *args)

    monkeypatch.setattr(prepare.sp, "train", spy)
    prepared = prepare.prepare(data, 290, quiet)
    assert prepared.tokenizer.vocab_size == 290
    text = source.open_text(data.sources[0], data.validation_fraction, str(tmp_path))
    expected = [line for piece in text.read("train") for line in piece.text.splitlines()]
    assert [line for line in seen[0] if line] == expected
    beside = base.load(prepared.tokenizer_config)
    assert beside.fingerprint == prepared.tokenizer.fingerprint
    assert os.path.dirname(prepared.tokenizer_config.path) == prepared.sources[0].store.folder
    assert prepare.prepare(data, 290, quiet).fingerprint == prepared.fingerprint
    assert prepare.prepare(dataclasses.replace(data, seq_len=9), 290, quiet)
    assert len(seen) == 1

    given = dataclasses.replace(data, tokenizer=prepared.tokenizer_config)
    assert prepare.prepare(given, 290, quiet).fingerprint == prepared.fingerprint
    message = (
        r"model.vocab_size=291 but the tokenizer \(.*\) has 290 tokens; set model.vocab_size=290"
    )
    with pytest.raises(ValueError, match=message):
        prepare.prepare(given, 291, quiet)


def test_rows_have_the_tokens_that_a_checkpoint_adds(tmp_path):
    """Special ones, which no text has, change the fingerprint of the rows and not that of the tokenizer."""
    text = files(write_texts(tmp_path / "t", 30))

    def prepared(name, additions, vocab_size=300, sources=(text,)):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        (place / "tokenizer.model").write_bytes(small.sentencepiece(259))
        said = {} if additions is None else {"tokenizer_additions": in_folder.to_dict(additions)}
        (place / "model.json").write_text(json.dumps(said))
        data = data_of(tmp_path, *sources, tokenizer=config.TokenizerConfig("folder", str(place)))
        return prepare.prepare(data, vocab_size, quiet)

    end = Additions((AddedToken(270, "<|im_end|>"),), eos=270)
    plain, other = prepared("plain", None), prepared("other", end)
    assert plain.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert plain.fingerprint != other.fingerprint
    ids = [set(one.sources[0].store.train.read(range(20))[0].ravel()) for one in (plain, other)]
    assert [(2 in of, 270 in of) for of in ids] == [(True, False), (False, True)]
    store = other.sources[0].store.folder
    made = config.Source("corpus", "rows", store)
    given = data_of(tmp_path, made, tokenizer=config.TokenizerConfig())
    assert prepare.prepare(given, 300, quiet).tokenizer.eos == 270
    with pytest.raises(ValueError, match=rf"kind='folder' and data.tokenizer.path='{store}'"):
        prepared("plain", None, sources=(made,))
    with pytest.raises(ValueError, match=r"set model.vocab_size=271"):
        prepared("other", end, vocab_size=270)
    found = Additions((AddedToken(271, "norm", special=False),))
    third = prepared("third", found)
    assert 271 in set(third.sources[0].store.train.read(range(20))[0].ravel())


def test_a_vocabulary_that_differs_from_the_tokenizers_is_refused(tmp_path):
    data = data_of(tmp_path, files(write_texts(tmp_path / "t", 3)))
    message = r"model.vocab_size=32000 but the tokenizer \(byte\) has 259 .* model.vocab_size=259"
    with pytest.raises(ValueError, match=message):
        prepare.prepare(data, 32000, quiet)


def test_rows_made_before_are_a_source_and_must_fit(tmp_path):
    text = files(write_texts(tmp_path / "t", 30))
    data = data_of(tmp_path, text, tokenizer=config.TokenizerConfig())
    first = prepare.prepare(data, 290, quiet)
    shutil.copytree(first.sources[0].store.folder, tmp_path / "made")
    made = config.Source(name="made", kind="rows", path=str(tmp_path / "made"))
    again = dataclasses.replace(data, sources=(made,), cache=str(tmp_path / "unused"))
    prepared = prepare.prepare(again, 290, quiet)
    assert prepared.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert prepared.tokenizer_config.path == str(tmp_path / "made" / prepare.MODEL_FILE)
    assert words_of(prepared, 0, "train") == words_of(first, 0, "train")
    both = prepare.prepare(dataclasses.replace(data, sources=(made, text)), 290, quiet)
    assert words_of(both, 0, "train") == words_of(both, 1, "train")

    def message(error, vocab_size=290, **fields):
        with pytest.raises(ValueError, match=error):
            prepare.prepare(dataclasses.replace(again, **fields), vocab_size, quiet)

    message(
        r"data.seq_len=9 but the rows of data.sources.made .* predict 13 .*; set .*=13", seq_len=9
    )
    message(r"data.packing='best_fit' has no effect on the rows of .*made", packing="best_fit")
    message(
        r"data.sources.gone.path='rows/gone': there is no such folder of rows; .* from text: "
        r"--config.data.sources.gone.kind=files --config.data.sources.gone.path=",
        sources=(config.Source("gone", "rows", "rows/gone"),),
    )
    message(r"vocab_size=777 but the tokenizer \(.*made/tokenizer.model\) has 290", 777)
    byte = config.TokenizerConfig("byte")
    message(
        r"made with another tokenizer \(sp, 290 tokens\) than byte; "
        r"set data.tokenizer.kind='sp' and data.tokenizer.path='.*made/tokenizer.model'",
        259,
        tokenizer=byte,
    )


def test_too_little_text_for_a_row_says_so(tmp_path):
    folder = write_texts(tmp_path / "t", 3)
    data = data_of(tmp_path, files(folder), seq_len=4000)
    message = (
        r"data.sources.corpus: its train split has 3 documents, \d+ tokens, and data.seq_len=4000"
    )
    with pytest.raises(ValueError, match=message):
        prepare.prepare(data, 259, quiet)
    data = data_of(tmp_path, files(folder), seq_len=200, validation_fraction=0.01)
    with pytest.raises(
        ValueError, match=r"its validation split .* or raise data.validation_fraction"
    ):
        prepare.prepare(data, 259, quiet)
    assert os.listdir(tmp_path / "cache/rows") == []


def test_records_without_text_are_left_out_and_counted_once(tmp_path):
    texts = [None if i % 3 == 0 else "" if i % 3 == 1 else f"record {i}" for i in range(300)]
    lines_of = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines_of))
    said = []
    data = data_of(tmp_path, files(tmp_path, pattern="a.jsonl"), validation_fraction=0.2)
    prepared = prepare.prepare(data, 259, said.append)
    splits = prepared.sources[0].store.meta.splits
    assert splits["train"].documents + splits["validation"].documents == 100
    assert [line for line in said if "left out" in line] == [
        line for line in said if line.endswith("; 200 without text left out")
    ]
    assert sum("left out" in line for line in said) == 1
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 9)
    with pytest.raises(
        ValueError, match="train split has 0 documents and 9 without text, 0 tokens"
    ):
        prepare.prepare(data, 259, quiet)


def test_best_fit_rows_hold_all_the_text(tmp_path):
    data = data_of(
        tmp_path, files(write_texts(tmp_path / "t", 30)), seq_len=400, packing="best_fit"
    )
    prepared = prepare.prepare(data, 259, quiet)
    figures = prepared.sources[0].store.meta.splits["train"]
    assert figures.dropped == 0
    assert figures.padding > 0
    assert len(words_of(prepared, 0, "train").encode()) == figures.bytes
    text = source.open_text(data.sources[0], data.validation_fraction, str(tmp_path))
    kept = words_of(prepared, 0, "train")
    assert all(piece.text in kept for piece in text.read("train"))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_long_document_in_pieces_gives_the_same_rows(tmp_path, monkeypatch, packing):
    folder = write_texts(tmp_path / "t", 2, lines=300)
    data = data_of(tmp_path, files(folder), seq_len=50, packing=packing)
    data = dataclasses.replace(data, tokenizer=config.TokenizerConfig())
    whole = prepare.prepare(data, 290, quiet)
    monkeypatch.setattr("llama_jax.data.documents.BLOCK", 512)
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 3000)
    pieces = prepare.prepare(dataclasses.replace(data, cache=str(tmp_path / "c2")), 290, quiet)
    assert pieces.tokenizer.fingerprint == whole.tokenizer.fingerprint
    for split in source.SPLITS:
        a, b = (getattr(p.sources[0].store, split) for p in (whole, pieces))
        np.testing.assert_array_equal(a.read(range(len(a)))[0], b.read(range(len(b)))[0])
    assert pieces.fingerprint == whole.fingerprint


def test_two_processes_at_once_end_well(tmp_path):
    data = data_of(
        tmp_path, files(write_texts(tmp_path / "t", 30)), tokenizer=config.TokenizerConfig()
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare.prepare(data, 290, quiet), range(4)))
    assert len({prepared.fingerprint for prepared in made}) == 1
    assert len(os.listdir(tmp_path / "cache/rows")) == 1
    assert words_of(made[0], 0, "train") == words_of(made[3], 0, "train")


KILLED = """
import os, sys
from llama_jax.data import prepare, rows
from tests.data.small import data_of, files
from pathlib import Path
rows.describe = lambda *args: os._exit(9)
prepare.prepare(data_of(Path(sys.argv[1]), files(Path(sys.argv[1]) / "t")), 259)
"""


def test_a_killed_prepare_leaves_nothing_that_looks_complete(tmp_path, request):
    data = data_of(tmp_path, files(write_texts(tmp_path / "t", 30)))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=request.config.rootpath,
        capture_output=True,
    )
    assert killed.returncode == 9, killed.stderr
    assert [name[0] for name in os.listdir(tmp_path / "cache/rows")] == ["."]
    prepared = prepare.prepare(data, 259, quiet)
    assert len(prepared.sources[0].store.train) > 100


TFDS = """
import os, sys
from llama_jax import config
from llama_jax.data import prepare
for name, field in (("tiny_text:1.0.0", "body"), ("tiny_text", "text"), ("no_such_text", "body")):
    of = config.Source(name="t", kind="tfds", path=name, text_field=field)
    data = config.Data(sources=(of,), seq_len=7, tokenizer=config.TokenizerConfig("byte"),
                       validation_fraction=0.3, cache=sys.argv[1])
    try:
        prepared = prepare.prepare(data, 259, lambda line: None)
    except ValueError as error:
        print("error:", error)
        continue
    assert "tensorflow" not in sys.modules
    for split in ("train", "validation"):
        print(prepared.sources[0].store.meta.splits[split].documents,
              prepared.sources[0].store.meta.splits[split].bytes)
"""


def tfds_text(folder, bodies):
    """A TFDS text data set on disk, as tfds.core.GeneratorBasedBuilder leaves it."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "n": np.int64})
    path = str(folder / "tiny_text-train.array_record-00000-of-00001")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for n, body in enumerate(bodies):
        writer.write(features.serialize_example({"body": body, "n": n}))
    writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    sharded = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name="tiny_text",
        split="train",
        filetype_suffix="array_record",
        template=template,
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(bodies)], num_bytes=9, filename_template=sharded
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        check_data=False,
        filename_template=template,
    )


def test_a_tfds_text_data_set_is_a_source(tmp_path, request):
    bodies = [f"naïve body {i}" for i in range(60)]
    tfds_text(tmp_path / "tfds/tiny_text/1.0.0", bodies)
    out = subprocess.run(
        [sys.executable, "-c", TFDS, str(tmp_path / "cache")],
        cwd=request.config.rootpath,
        env={**os.environ, "TFDS_DATA_DIR": str(tmp_path / "tfds")},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    train, held_out, field, absent = out.stdout.splitlines()
    counts = np.array([train.split(), held_out.split()], int)
    assert counts.sum(axis=0).tolist() == [60, len("".join(bodies).encode())]
    assert 5 < counts[1, 0] < 35
    assert "path='tiny_text' record 0 has no field 'text' but 'body', 'n'" in field
    assert "path='no_such_text' is no TFDS data set known here" in absent
