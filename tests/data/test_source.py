import json
import os
import sys

import pytest

from llama_jax import config
from llama_jax.data import source
from tests.data.small import files, write_texts


def texts(text, split):
    out = []
    for piece in text.read(split):
        if piece.first:
            out.append("")
        out[-1] += piece.text
    return out


def opened(of, tmp_path, fraction=0.2):
    return source.open_text(of, fraction, str(tmp_path / "cache"))


def records(folder, count, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    contents = [f"record {i} of {name}" for i in range(count)]
    lines = [json.dumps({"text": text}) + "\n" for text in contents]
    (folder / name).write_text("".join(lines))
    return contents


def test_the_standard_library_without_tests(tmp_path):
    text = opened(config.Source(), tmp_path, 0.05)
    train, held_out = (texts(text, split) for split in source.SPLITS)
    total = len(train) + len(held_out)
    assert total > 500
    assert len(held_out) == round(total * 0.05)
    assert not set(held_out) & set(train)
    assert text.python == ".".join(map(str, sys.version_info[:3]))
    with open(os.__file__) as f:
        assert f.read() in train + held_out
    import test.support

    with open(test.support.__file__) as f:
        assert f.read() not in train + held_out


def test_many_files_are_split_by_name(tmp_path):
    folder = write_texts(tmp_path / "t", 45)
    train, held_out = (texts(opened(files(folder), tmp_path), s) for s in source.SPLITS)
    assert (len(train), len(held_out)) == (36, 9)
    everything = sorted(f.read_text() for f in folder.iterdir())
    assert sorted(train + held_out) == everything
    # Whatever they say and wherever they lie.
    moved = tmp_path / "elsewhere"
    os.rename(folder, moved)
    assert texts(opened(files(moved), tmp_path), "validation") == held_out


def test_few_files_are_cut_instead(tmp_path):
    folder = write_texts(tmp_path / "t", 19, lines=40)
    text = opened(files(folder), tmp_path)
    train, held_out = (texts(text, split) for split in source.SPLITS)
    assert len(train) == len(held_out) == 19
    for a, b, file in zip(train, held_out, sorted(folder.iterdir()), strict=True):
        assert a + b == file.read_text()
        assert a.endswith("\n")
        assert 0.2 <= len(b.encode()) / file.stat().st_size < 0.25


def test_records_are_split_by_what_they_say(tmp_path):
    contents = records(tmp_path / "r", 3000)
    of = files(tmp_path / "r", pattern="*.jsonl")
    train, held_out = (texts(opened(of, tmp_path), split) for split in source.SPLITS)
    assert sorted(train + held_out) == sorted(contents)
    assert 540 < len(held_out) < 660
    records(tmp_path / "r", 1500)  # the same texts, fewer
    assert set(texts(opened(of, tmp_path), "validation")) <= set(held_out)


def test_kinds_of_files_mix(tmp_path):
    folder = write_texts(tmp_path / "t", 3)
    contents = records(folder, 300)
    text = opened(files(folder, pattern="**/*"), tmp_path)
    train, held_out = (texts(text, split) for split in source.SPLITS)
    assert len(train) + len(held_out) == 300 + 3 + 3
    assert set(contents) < set(train + held_out)


def test_the_fingerprint_is_of_names_and_contents_alone(tmp_path):
    folder = write_texts(tmp_path / "t", 22)
    of = files(folder)
    before = opened(of, tmp_path).fingerprint
    os.utime(folder / "doc03.txt", (1, 1))
    assert opened(of, tmp_path).fingerprint == before
    os.rename(folder, tmp_path / "u")
    assert opened(files(tmp_path / "u"), tmp_path).fingerprint == before
    file = tmp_path / "u/doc03.txt"
    content = file.read_text()
    file.write_text(content.replace("norm", "mron"))
    changed = opened(files(tmp_path / "u"), tmp_path).fingerprint
    assert changed != before
    file.write_text(content)
    assert opened(files(tmp_path / "u"), tmp_path).fingerprint == before
    file.rename(tmp_path / "u/other.txt")
    assert opened(files(tmp_path / "u"), tmp_path).fingerprint not in (before, changed)


def test_the_field_matters_to_records_only(tmp_path):
    records(tmp_path / "r", 4)
    prints = {
        opened(files(tmp_path / "r", pattern="*", text_field=f), tmp_path).fingerprint for f in "ab"
    }
    assert len(prints) == 2
    folder = write_texts(tmp_path / "t", 4)
    assert len({opened(files(folder, text_field=f), tmp_path).fingerprint for f in "ab"}) == 1


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "t", 22)
    before = opened(files(folder), tmp_path).fingerprint
    monkeypatch.setattr(source.hashlib, "file_digest", None)
    assert opened(files(folder), tmp_path).fingerprint == before
    os.utime(folder / "doc03.txt", (1, 1))
    with pytest.raises(TypeError):
        opened(files(folder), tmp_path)


def test_a_damaged_memory_of_hashes_is_made_again(tmp_path):
    folder = write_texts(tmp_path / "t", 22)
    before = opened(files(folder), tmp_path).fingerprint
    (memo,) = (tmp_path / "cache/hashes").iterdir()
    memo.write_text(memo.read_text()[:50])
    assert opened(files(folder), tmp_path).fingerprint == before
    json.loads(memo.read_text())


def test_a_home_and_deep_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "t/deep/er", 2)
    write_texts(tmp_path / "t", 1)
    of = config.Source(name="home", kind="files", path="~/t/**/*.txt")
    assert len(texts(opened(of, tmp_path), "train")) == 3
    of = config.Source(name="one", kind="files", path="~/t/doc00.txt")
    assert len(texts(opened(of, tmp_path), "train")) == 1


def test_any_name_of_a_file_will_do(tmp_path):
    """Brackets, which globs read, and bytes that are no UTF-8."""
    folder = write_texts(tmp_path / "t", 2)
    os.rename(folder / "doc00.txt", folder / "a [1].txt")
    of = config.Source(name="one", kind="files", path=f"{folder}/a [1].txt")
    assert len(texts(opened(of, tmp_path), "train")) == 1
    os.rename(os.fsencode(folder / "doc01.txt"), os.fsencode(folder) + b"/\xff.txt")
    assert len(texts(opened(files(folder), tmp_path), "train")) == 2


def test_what_is_wrong_with_a_path_is_said(tmp_path):
    folder = write_texts(tmp_path / "t", 3)

    def message(path, error):
        of = config.Source(name="own", kind="files", path=path)
        with pytest.raises(ValueError, match=error):
            opened(of, tmp_path)

    message(
        f"{folder}/*.md", r"data.sources.own.path='.*md' matches no file; .*/t holds doc00.txt,"
    )
    message(f"{tmp_path}/no/where/*.txt", r"matches no file; .* holds t$")
    message(str(folder), r"is a folder; name its files: '.*/t/\*\*/\*.txt'")
    (folder / "empty.txt").write_text("")
    message(f"{folder}/*.txt", r"empty.txt is empty \(0 bytes\); leave it out")
    (folder / "empty.txt").unlink()
    (folder / "a.pdf").write_text("x")
    message(f"{folder}/*", r"a.pdf is of no supported kind")
    (folder / "a.pdf").unlink()
    (folder / "link.txt").symlink_to(folder / "gone")
    message(f"{folder}/*", r"link.txt cannot be read: No such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    folder = write_texts(tmp_path / "t", 3)
    (folder / "doc01.txt").chmod(0)
    with pytest.raises(ValueError, match=r"doc01.txt cannot be read: Permission denied"):
        opened(files(folder), tmp_path)


def test_a_cache_that_cannot_be_written_costs_hashing_only(tmp_path):
    folder = write_texts(tmp_path / "t", 3)
    (tmp_path / "cache").write_text("a file, not a folder")
    assert opened(files(folder), tmp_path).fingerprint
