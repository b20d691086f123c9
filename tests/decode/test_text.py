import pytest

from llama_jax.decode.text import GeneratedText
from llama_jax.tokenizer import byte

END = 999


def said(tokens, *stop, most=100):
    text = GeneratedText(byte.Byte(), [], {END}, stop, most)
    shown = []
    for token in tokens:
        shown.append(text.feed(token))
        if text.end:
            break
    return text, shown


def test_a_stop_that_comes_in_parts_is_never_shown():
    text, shown = said(b"one END two", " END")
    assert shown == ["o", "n", "e", "", "", "", ""]
    assert (text.text, text.end) == ("one", "stop")


def test_what_only_looked_like_a_stop_is_shown_when_that_is_known():
    text, shown = said([*b"a ENx END", END], " END")
    assert "".join(shown) == text.text == "a ENx"
    assert shown[4] == " ENx"


def test_the_first_of_several_stops_ends_the_text():
    assert said(b"abcdef", "ef", "cd")[0].text == "ab"


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_end_token_is_no_text_and_half_a_character_becomes_its_replacement(stop):
    text, shown = said([*"é".encode(), 0xC3, END], *stop)
    assert shown[:2] == ["", "é"]
    assert text.text == "é\ufffd"
    assert (text.end, text.last, text.tokens) == ("stop", [END], [*"é".encode(), 0xC3])


def test_the_length_counts_tokens():
    text, shown = said(b"abcdef", most=3)
    assert (text.text, text.end, len(shown)) == ("abc", "length", 3)
    text, _ = said(b"ab EN", " END", most=5)
    assert text.text == "ab EN", "the beginning of a stop that did not come"


def test_cut_gives_what_waits():
    text, shown = said(b"ab EN", " END")
    assert "".join(shown) == "ab"
    assert text.cut() == " EN"
    assert (text.text, text.end) == ("ab EN", "interrupted")
