import gzip
import json
import os

import numpy as np
import pytest

from llama_jax.data import documents


def write(path, content):
    path.write_bytes(content)
    return str(path)


def lines(*texts, field="text"):
    return b"".join(
        json.dumps({field: text, "id": i}).encode() + b"\n" for i, text in enumerate(texts)
    )


def read(path, field="text"):
    return list(documents.records(path, field))


def whole(path):
    return list(documents.plain(path, 0, os.path.getsize(path)))


TEXTS = ("one\ntwo", "naïve 日本", "x" * 5000, "end")


def zstd(content):
    import zstandard

    return zstandard.compress(content)


@pytest.mark.parametrize(
    "ending", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "json.zst"]
)
def test_json_lines_give_one_document_a_record(tmp_path, ending):
    content = lines(*TEXTS, "") + b"\n" + lines("after")[:-1]
    pack = {"gz": gzip.compress, "zst": zstd}.get(ending.split(".")[-1], bytes)
    assert read(write(tmp_path / f"a.{ending}", pack(content))) == [*TEXTS, "", "after"]


def test_compressed_files_may_have_several_members(tmp_path):
    a, b = lines("one", "two"), lines("three")
    for ending, pack in (("gz", gzip.compress), ("zst", zstd)):
        path = write(tmp_path / f"a.jsonl.{ending}", pack(a[:20]) + pack(a[20:]) + pack(b))
        assert read(path) == ["one", "two", "three"]


def test_parquet_gives_one_document_a_record(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": [*TEXTS, None, "", "last"], "n": range(7)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"), "body") == [*TEXTS, "", "", "last"]
    with pytest.raises(ValueError, match=r"parquet has no field 'text' but 'body', 'n'; set"):
        read(str(tmp_path / "a.parquet"))
    cut = write(tmp_path / "cut.parquet", (tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.parquet is truncated or no parquet file"):
        read(cut, "body")


def test_null_is_an_empty_text_in_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == ["a", "", "b"]
    content = b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n'
    assert read(write(tmp_path / "a.jsonl", content)) == ["a", "", "b"]


def test_parquet_strings_that_are_not_utf8_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    offsets, text = np.array([0, 2, 4], np.int32), b"ab\xff\xfe"
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(text)]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet record 2 is not UTF-8 text: byte 0xff at"):
        read(str(tmp_path / "a.parquet"))


def test_zstd_windows_of_any_width_are_read(tmp_path):
    """`zstd --long=31`; the file is small, but its header asks for a window of 2 GiB."""
    import zstandard

    for log in (28, 31):
        wide = zstandard.ZstdCompressionParameters(window_log=log)
        stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        packed = stream.compress(lines("one", "two")) + stream.flush()
        assert zstandard.get_frame_parameters(packed).window_size == 1 << log
        assert read(write(tmp_path / "a.jsonl.zst", packed)) == ["one", "two"]


def test_an_array_says_how_records_are_made_of_it(tmp_path):
    array = "one record a line is wanted; jq -c '.\\[\\]' makes that of an array"
    for content in (b'[\n {"text": "a"}\n]', b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]'):
        with pytest.raises(ValueError, match=f"a.json line 1 is .*; {array}"):
            read(write(tmp_path / "a.json", content))
    with pytest.raises(
        ValueError, match=r"a.json line 1 is not JSON: .*one record a line is wanted$"
    ):
        read(write(tmp_path / "a.json", b'{\n "text": "a"}\n'))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone \xef\xbb\xbf two\n")
    assert [piece.text for piece in whole(path)] == ["one \ufeff two\n"]
    assert read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines("one"))) == ["one"]


def test_wrong_records_are_named_with_their_line(tmp_path):
    cases = {
        b'{"text": "a"}\n\n{"text": \n': r"a.jsonl line 3 is not JSON: .* at column",
        b'{"text": "a"}\n[1]\n': r"a.jsonl line 2 is list, not an object",
        b'{"text": "a"}\n{"body": 1, "id": 2}\n': r"line 2 has no field 'text' but 'body', 'id'",
        b'{"text": "a"}\n{"text": 7}\n': r"line 2: field 'text' is int, not text",
        b'{"text": "a"}\n{"text": "\xff"}\n': r"line 2 is not UTF-8 text: byte 0xff at offset 10",
        b'{"text": "a"}\n{"text": "b"': r"a.jsonl line 2 is not JSON",
        b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}": r"a.jsonl line 2 cannot be read: .* digits",
        b'{"text": ' + b"[" * 100_000: r"a.jsonl line 1 cannot be read: .* recursion depth",
    }
    for content, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path / "a.jsonl", content))


def test_truncated_and_damaged_archives_are_named_with_the_byte(tmp_path):
    content = lines(*(os.urandom(40).hex() for _ in range(2000)))
    for ending, pack in (("gz", gzip.compress), ("zst", zstd)):
        good = pack(content)
        for size in (len(good) - 1, len(good) // 2, 3):
            cut = write(tmp_path / f"cut.jsonl.{ending}", good[:size])
            with pytest.raises(
                ValueError, match=rf"cut.jsonl.{ending} is truncated .* byte {size}"
            ):
                read(cut)
        bad = write(
            tmp_path / f"bad.jsonl.{ending}", good[: len(good) // 2] + b"\0" * 99 + good[-500:]
        )
        with pytest.raises(
            ValueError, match=rf"bad.jsonl.{ending} is truncated or damaged near byte"
        ):
            read(bad)
        other = write(tmp_path / f"other.jsonl.{ending}", content)
        with pytest.raises(ValueError, match=rf"other.jsonl.{ending} is truncated or damaged"):
            read(other)


def test_half_a_surrogate_pair_does_not_break_utf8(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude42"}\n')
    assert read(path) == ["a? b", "🙂"]


def test_a_file_of_another_kind_names_the_kinds_there_are(tmp_path):
    with pytest.raises(
        ValueError, match=r"a.doc is of no supported kind; use one of .txt, .md, .py,"
    ):
        documents.suffix("a.doc")
    assert [documents.is_plain(f"a{e}") for e in (".txt", ".md", ".py", ".parquet")] == [1, 1, 1, 0]


def test_binary_files_are_named_with_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 64)
    text = "naïve ☃ line\n".encode() * 40
    cases = {
        text + b"\0" + text: rf"NUL at byte {len(text)}",
        text + b"ok\xff\xfe": rf"byte 0xff at offset {len(text) + 2}",
        text[:-1] + b"\xe2\x98": rf"byte 0xe2 at offset {len(text) - 1} \(unexpected end",
        text[:62] + b"\xe2\x98X" + text: r"byte 0xe2 at offset 62",
    }
    for content, message in cases.items():
        with pytest.raises(ValueError, match=message):
            whole(write(tmp_path / "a.txt", content))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent.txt cannot be read: No such file"):
        list(documents.plain(str(tmp_path / "absent.txt"), 0, 9))
    with pytest.raises(ValueError, match=r"absent.jsonl cannot be read: No such file"):
        read(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"absent.parquet cannot be read"):
        read(str(tmp_path / "absent.parquet"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder.txt cannot be read: Is a directory"):
        list(documents.plain(str(tmp_path / "folder.txt"), 0, 9))


def test_long_documents_come_in_pieces_that_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 100)
    for text in (
        "naïve line of words\n" * 60,
        "words without any line end " * 60,
        "日本語" * 300,
        "short",
        "\n" * 500,
    ):
        path = write(tmp_path / "a.txt", text.encode())
        for pieces in (whole(path), list(documents.pieces(text))):
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
            assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            assert max(len(piece.text) for piece in pieces) <= 200
            if len(text) > 200:
                assert len(pieces) > 2


def test_a_file_is_cut_at_a_line_near_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 256)
    content = "".join(f"line {i} naïve\n" for i in range(200)).encode()
    path = write(tmp_path / "a.txt", content)
    at = documents.cut(path, len(content), 0.1)
    assert content[at - 1 : at] == b"\n"
    assert 0 <= len(content) - at - len(content) * 0.1 < 20
    single = "☃".encode() * 300
    at = documents.cut(write(tmp_path / "b.txt", single), len(single), 0.1)
    assert 0 <= len(single) - at - 90 < 3
    assert single[at:].decode() + single[:at].decode() == "☃" * 300


def test_a_cut_is_at_a_line_only_where_one_is_near(tmp_path):
    """A title and one line of 100,000 words: the only line end is not where a twentieth begins."""
    content = b"a title\n" + b"word " * 100_000
    at = documents.cut(write(tmp_path / "a.txt", content), len(content), 0.05)
    assert content[at - 1 : at] == b" "
    assert 0 <= len(content) - at - int(0.05 * len(content)) < 8
    content = b"a title\n" + "☃".encode() * 1000
    at = documents.cut(write(tmp_path / "a.txt", content), len(content), 0.05)
    assert 0 <= len(content) - at - int(0.05 * len(content)) < 4
    content[at:].decode()
