import dataclasses
import json
import os
import re
import time

import numpy as np
import pytest

from llama_jax.data import pack, rows

LENGTH = 6


def store(folder, counts=None, vocab_size=500, segments=False, final=None):
    """A store of random rows, and the rows."""
    rng = np.random.default_rng(0)
    counts = counts or {"train": 37, "validation": 5}
    written = {
        split: [
            pack.PackedRow(
                rng.integers(0, vocab_size, LENGTH + 1),
                np.sort(rng.integers(0, 4, LENGTH + 1)) if segments else None,
            )
            for _ in range(count)
        ]
        for split, count in counts.items()
    }
    final = str(final or folder / "rows")
    with rows.folder(final) as new:
        shards = {s: rows.write(new, s, iter(r), vocab_size) for s, r in written.items()}
        splits = {
            split: rows.Split(
                rows=counts[split],
                tokens=1,
                bytes=2,
                documents=3,
                dropped=4,
                padding=5,
                shards={name: (folder / new / name).stat().st_size for name in shards[split]},
            )
            for split in counts
        }
        meta = rows.StoreMetadata(
            seq_len=LENGTH,
            packing="concat",
            vocab_size=vocab_size,
            tokenizer_kind="byte",
            tokenizer="t",
            bos=1,
            text="x",
            python="",
            splits=splits,
        )
        rows.describe(new, shards, segments, meta)
    return final, written


def check(of, written, indices):
    tokens, segments = of.read(indices)
    np.testing.assert_array_equal(tokens, [written[i].tokens for i in indices])
    if segments is not None:
        np.testing.assert_array_equal(segments, [written[i].segments for i in indices])
    return tokens, segments


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
@pytest.mark.parametrize("segments", [False, True])
def test_rows_come_back_as_written_here_and_through_tfds(tmp_path, vocab_size, dtype, segments):
    import tensorflow_datasets as tfds

    folder, written = store(tmp_path, vocab_size=vocab_size, segments=segments)
    opened = rows.load(folder)
    assert (len(opened.train), len(opened.validation)) == (37, 5)
    tokens, stored = check(opened.train, written["train"], [36, 0, 7, 7])
    assert tokens.dtype == dtype
    assert (stored is not None) == segments
    check(opened.validation, written["validation"], range(5))

    theirs = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(theirs) == 37
    for i in (0, 19, 36):
        assert sorted(theirs[i]) == (["segments", "tokens"] if segments else ["tokens"])
        np.testing.assert_array_equal(theirs[i]["tokens"], written["train"][i].tokens)
        assert theirs[i]["tokens"].dtype == dtype
        if segments:
            np.testing.assert_array_equal(theirs[i]["segments"], written["train"][i].segments)


def test_large_splits_are_written_in_shards(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(rows, "SHARD_BYTES", 300)
    folder, written = store(tmp_path)
    opened = rows.load(folder)
    assert len(opened.meta.splits["train"].shards) > 2
    check(opened.train, written["train"], [36, 20, 0, 35, 1, 12, 11])
    check(opened.train, written["train"], range(37))
    theirs = tfds.builder_from_directory(folder).as_data_source("train")
    np.testing.assert_array_equal(
        [row["tokens"] for row in theirs], [row.tokens for row in written["train"]]
    )


def test_an_error_leaves_nothing_behind(tmp_path):
    def fail():
        with rows.folder(str(tmp_path / "rows")) as new:
            (tmp_path / new / "shard").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_second_to_finish_keeps_what_the_first_has_made(tmp_path):
    final = tmp_path / "rows"
    with rows.folder(str(final)) as slow:
        (tmp_path / slow / "who").write_text("slow")
        with rows.folder(str(final)) as fast:
            (tmp_path / fast / "who").write_text("fast")
    assert (final / "who").read_text() == "fast"
    assert [f.name for f in tmp_path.iterdir()] == ["rows"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "cache").write_text("a file")
    message = r"data.cache cannot hold rows: .*cache/rows: Not a directory; set data.cache"
    with pytest.raises(ValueError, match=message), rows.folder(str(tmp_path / "cache/rows/x")):
        pass


def test_what_is_missing_or_damaged_is_named(tmp_path):
    folder, _ = store(tmp_path)

    def message(error):
        with pytest.raises(ValueError, match=error):
            rows.load(folder)

    def spoilt(name, content):
        path = tmp_path / "rows" / name
        good = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content(good))
        return path, good

    shard = "rows-train.array_record-00000-of-00001"
    for name, content, error in (
        (
            shard,
            lambda good: good[:-9],
            rf"{shard} has \d+ bytes, \d+ were written; delete .*rows to",
        ),
        (shard, None, rf"{shard} is missing, \d+ were written"),
        ("meta.json", None, r"meta.json: No such file .*; a folder of rows is what"),
        ("meta.json", lambda good: good[:-9], r"meta.json is damaged: "),
        ("meta.json", lambda good: b'{"splits": {}}', r"meta.json is not that of a folder of rows"),
        ("features.json", None, r"features.json: No such file"),
        ("dataset_info.json", lambda good: b"", r"dataset_info.json is damaged"),
        (
            "dataset_info.json",
            lambda good: good.replace(b'"validation"', b'"test"'),
            r"rows: dataset_info.json or features.json lacks 'validation'",
        ),
    ):
        path, good = spoilt(name, content)
        message(error)
        path.write_bytes(good)
    rows.load(folder)

    for old, new, error in (
        (
            '"7"',
            '"8"',
            r"'tokens' must be a tensor of 7 with encoding 'bytes', not \[8\] with 'bytes'",
        ),
        ('"bytes"', '"none"', r"'tokens' must be a tensor of 7 .* not \[7\] with 'none'"),
        ('"tokens"', '"ids"', r"features.json has no feature 'tokens' but ids"),
    ):
        content = (tmp_path / "rows/features.json").read_text().replace(old, new).encode()
        path, good = spoilt("features.json", lambda good, content=content: content)
        message(error)
        path.write_bytes(good)
    with pytest.raises(ValueError, match=r"absent is not a folder of rows: no such folder"):
        rows.load(str(tmp_path / "absent"))


def test_a_damaged_row_names_its_file(tmp_path):
    folder, _ = store(tmp_path)
    shard = tmp_path / "rows" / "rows-train.array_record-00000-of-00001"
    damaged = bytearray(shard.read_bytes())
    damaged[1000] ^= 255
    shard.write_bytes(damaged)
    opened = rows.load(folder)
    message = rf"{shard} is damaged: .*mismatch.*; delete {folder} to prepare again"
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        opened.train.read(range(len(opened.train)))


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name, hours in (("old", 25), ("new", 23), ("busy", 25)):
        folder = tmp_path / f".unfinished-{name}"
        folder.mkdir()
        (folder / "shard").write_text("half")
        then = time.time() - hours * 3600
        if name != "busy":
            os.utime(folder / "shard", (then, then))
        os.utime(folder, (then, then))
    with rows.folder(str(tmp_path / "rows")) as new:
        left = {name.removeprefix(".unfinished-") for name in os.listdir(tmp_path)}
        assert left == {"new", "busy", os.path.basename(new).removeprefix(".unfinished-")}


def test_meta_is_plain_json(tmp_path):
    folder, _ = store(tmp_path)
    with open(f"{folder}/meta.json") as f:
        assert json.load(f) == dataclasses.asdict(rows.load(folder).meta)
