import random

import numpy as np
import pytest

from llama_jax.tokenizer import byte, sp, stream
from tests.tokenizer import fuzz


@pytest.fixture(params=["byte", "small", "tiny", "llama2", "llama3"])
def tokenizer(request):
    return byte.Byte() if request.param == "byte" else request.getfixturevalue(request.param)


def texts(tokenizer, ids):
    decoder = stream.Stream(tokenizer)
    return [decoder.feed(i) for i in ids] + [decoder.finish()]


def test_parts_of_a_text_join_to_it_and_none_is_half_a_character(tokenizer):
    for text in fuzz.strings(300, seed=5):
        text = text.replace("\u2581", "")  # SentencePiece's own space
        ids = tokenizer.encode(text)
        parts = texts(tokenizer, ids)
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)
        assert parts[-1] == ""


def test_any_ids_give_what_decode_gives(tokenizer):
    rng = random.Random(3)
    halves = [i for i in range(260) if tokenizer.token_bytes(i) >= b"\x80"]
    for _ in range(1500):
        sources = (range(tokenizer.vocab_size), range(259), halves)
        ids = [rng.choice(rng.choice(sources)) for _ in range(rng.randint(0, 9))]
        assert "".join(texts(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_a_character_comes_out_with_its_last_byte():
    assert texts(byte.Byte(), "aé\U0001f642".encode()) == list("a") + ["", "é", *[""] * 3] + [
        "\U0001f642",
        "",
    ]


def test_bytes_that_are_no_character_become_replacements():
    assert texts(byte.Byte(), b"\xe6\x97a\xe6") == ["", "", "\ufffda", "", "\ufffd"]


def test_the_first_space_alone_is_dropped(metas_llama2):
    llama2 = metas_llama2
    assert texts(llama2, llama2.encode("Hello  big world"))[:3] == ["Hello", " ", " big"]
    assert texts(llama2, [1, *llama2.encode(" x"), 2]) == ["", "", " x", "", ""]


def test_specials_read_as_decode_has_them(small):
    turn = small.special["<|eot_id|>"]
    assert texts(small, [97, turn]) == ["a", "<|eot_id|>", ""]


def test_after_finish_a_new_text_begins(llama2):
    decoder = stream.Stream(llama2)
    for _ in range(2):
        ids = llama2.encode("two words")
        assert "".join(decoder.feed(i) for i in ids) == "two words"
        assert decoder.feed(3 + 0xE6) == ""
        assert decoder.finish() == "\ufffd"


def test_token_bytes_join_to_the_utf8_of_the_text(tokenizer):
    for text in fuzz.strings(100, seed=6):
        text = text.replace("\u2581", "")
        raw = b"".join(tokenizer.token_bytes(i) for i in np.array(tokenizer.encode(text), np.int32))
        dummy = isinstance(tokenizer, sp.SentencePiece) and text != ""
        assert raw.decode() == " " * dummy + text
