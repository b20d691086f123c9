import io
import itertools
import struct

import pytest

from llama_jax.tokenizer import llama2c, sp
from tests.tokenizer import fuzz


def record(piece, score=0.0):
    return struct.pack("<fi", score, len(piece)) + piece


def file(extra=((b" a", -1.0), (b"b", -3.0), (b" ", -2.0)), raw_bytes=False):
    names = [bytes([i]) if raw_bytes else b"<0x%02X>" % i for i in range(256)]
    head = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces = [*head, *((n, 0.0) for n in names), *extra]
    return struct.pack("<i", 6) + b"".join(record(*p) for p in pieces)


def read(content):
    """(piece, score) of the file, straight from its description."""
    at, pieces = 4, []
    while at < len(content):
        score, size = struct.unpack_from("<fi", content, at)
        pieces.append((content[at + 8 : at + 8 + size], score))
        at += 8 + size
    return pieces


def oracle(text, pieces):
    """llama2.c's rule: characters, then again and again the adjacent pair of the best score."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokens = []
    for char in (" " if text else "") + text:
        raw = char.encode()
        tokens += [ids[raw]] if raw in ids else [3 + byte for byte in raw]
    while True:
        pairs = [pieces[a][0] + pieces[b][0] for a, b in itertools.pairwise(tokens)]
        known = [(-pieces[ids[pair]][1], i) for i, pair in enumerate(pairs) if pair in ids]
        if not known:
            return tokens
        _, i = min(known)
        tokens[i : i + 2] = [ids[pairs[i]]]


@pytest.fixture(scope="module")
def stories(shared):
    return shared("checkpoints/stories260K/tok512.bin").read_bytes()


def load(content, tmp_path):
    path = tmp_path / "tok.model"
    path.write_bytes(llama2c.llama2c_to_sp(content))
    return sp.load(str(path))


def test_ids_are_those_of_llama2_c(stories, shared, tmp_path):
    tokenizer, pieces = load(stories, tmp_path), read(stories)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (512, 1, 2)
    texts = shared("text/canterbury/alice29.txt").read_text()[:20_000].split("\n\n")
    for text in [
        *texts,
        *(t for t in fuzz.strings(300, seed=8) if "\u2581" not in t and "<" not in t),
    ]:
        ids = tokenizer.encode(text)
        assert ids == oracle(text, pieces), repr(text)
        assert tokenizer.decode(ids) == text


def test_bytes_may_be_names_or_raw(tmp_path):
    named, raw = (llama2c.llama2c_to_sp(file(raw_bytes=r)) for r in (False, True))
    assert named == raw
    tokenizer = load(file(), tmp_path)
    assert tokenizer.encode("a a\nb") == [259, 259, 3 + 10, 260]
    assert tokenizer.token_bytes(3 + 10) == b"\n"
    assert tokenizer.special == {"<s>": 1, "</s>": 2}


def test_it_needs_nothing_but_the_file_of_the_original_weights(model_file, tmp_path):
    """A file made from Meta's model by the rule of llama2.c's exporter gives Meta's ids."""
    import sentencepiece

    path = model_file("llama2")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = [theirs.id_to_piece(i).replace("\u2581", " ").encode() for i in range(len(theirs))]
    names[1:3] = b"\n<s>\n", b"\n</s>\n"
    content = struct.pack("<i", max(map(len, names)))
    content += b"".join(record(name, theirs.get_score(i)) for i, name in enumerate(names))
    ours = load(content, tmp_path)
    assert ours.fingerprint == sp.load(str(path)).fingerprint
    texts = fuzz.strings(500, seed=9)
    assert [ours.encode(t) for t in texts] == theirs.encode(texts)


def test_a_model_of_characters_has_no_bytes(tmp_path):
    """Made by the rule of llama2.c's exporter from a SentencePiece model trained on characters."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be, or not to be", "that is the question"]), vocab_size=21,
        model_writer=model, model_type="char", normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = [theirs.id_to_piece(i).replace("\u2581", " ").encode() for i in range(len(theirs))]
    names[1:3] = b"\n<s>\n", b"\n</s>\n"
    content = struct.pack("<i", max(map(len, names)))
    content += b"".join(record(name, theirs.get_score(i)) for i, name in enumerate(names))
    ours = load(content, tmp_path)
    assert ours.vocab_size == len(theirs) < 259
    for text in ("to be, not that", "", " the  question", "a\nb", "é", "日日 to é"):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_a_damaged_file_is_refused():
    good = file()
    cases = {
        b"": "0 bytes are no file",
        good[:2]: "2 bytes are no file",
        good[:-1]: r"piece 261 at byte 3\d\d\d of 3\d\d\d is not",
        good[:-5]: "piece 261 at byte .* truncated",
        good[
            : 4 + 13 + 13 + 14 + 14
        ]: "4 pieces, but unknown, begin, end and 256 bytes alone are 259",
        struct.pack("<i", 9) + good[4:]: "longest piece has 6 bytes, its header says 9",
        struct.pack("<i", 5) + good[4:]: r"not \(score, length 1..5, bytes\)",
        file(extra=((b"q", -1.0), (b"q", -2.0))): "pieces 259 and 260 are both 'q'",
        file(extra=((b"\xff", -1.0),)): r"piece 259, b'\\xff', is not UTF-8",
        file(extra=((b"q", float("nan")),)): "piece 259 at byte",
        good[: 4 + 13 + 13 + 14]: "3 pieces, but unknown, begin, end and a piece alone are 4",
        good.replace(b"<0x41>", b"<0x42>", 1): r"piece 68 is b'<0x42>', it must be '<0x41>'",
        good.replace(b"\n<s>\n", b"\n<S>\n"): r"piece 1 is .* must be '\\n<s>\\n'",
        b"\x0e" * 5000: "is not .score, length",
    }
    for content, message in cases.items():
        with pytest.raises(ValueError, match=message):
            llama2c.llama2c_to_sp(content)
