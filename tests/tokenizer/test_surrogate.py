import pytest

from llama_jax import config
from llama_jax.tokenizer import base


@pytest.fixture(params=["byte", "small", "tiny"])
def tokenizer(request):
    if request.param == "byte":
        return base.load(config.TokenizerConfig("byte"))
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\udc00c", "é \udfff\ud800", "x" * 9000 + "\ud800"])
def test_a_lone_surrogate_is_refused_with_its_place(tokenizer, text):
    place = next(i for i, char in enumerate(text) if 0xD800 <= ord(char) < 0xE000)
    message = rf"text\[{place}\]=U\+{ord(text[place]):04X} is a lone surrogate"
    for encode in (
        tokenizer.encode,
        lambda t: tokenizer.encode(t, special=True),
        lambda t: tokenizer.encode_batch(["fine", t], 1),
    ):
        with pytest.raises(ValueError, match=message):
            encode(text)


def test_a_pair_of_surrogates_in_json_is_a_character(tokenizer):
    import json

    text = json.loads('"\\ud83d\\ude42"')
    assert tokenizer.decode(tokenizer.encode(text)) == "\U0001f642"
