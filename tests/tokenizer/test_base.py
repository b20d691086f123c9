import subprocess
import sys
import time

import pytest

from llama_jax import config
from llama_jax.tokenizer import base


def test_every_kind_of_the_config_has_a_slot():
    for kind in base.KINDS:
        config.TokenizerConfig(kind, "" if kind == "byte" else "x")
    with pytest.raises(ValueError, match=r"data.tokenizer.kind='bytes' .* nearest: 'byte'"):
        config.TokenizerConfig("bytes")


def test_no_jax_and_no_tokenizer_library_until_needed():
    code = "import sys, llama_jax.tokenizer.base\nprint([m for m in sys.modules if m in %r])"
    names = ("jax", "sentencepiece", "tiktoken", "grain", "tensorflow_datasets")
    out = subprocess.run([sys.executable, "-c", code % (names,)], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


SHAPES = {
    "words": "It was a bright cold day in April, 13 naïve clocks; ",
    "spaces": " " * 50,
    "one word": "a" * 50,
    "lines": "x = 1\n\n",
    "emoji": "\U0001f642" * 12,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_twice_the_text_takes_less_than_thrice_the_time(request, kind, shape):
    tokenizer = request.getfixturevalue(kind)

    def seconds(chars, encode):
        text = SHAPES[shape] * (chars // len(SHAPES[shape]))
        start = time.process_time()
        ids = encode(text)
        spent = time.process_time() - start
        assert tokenizer.decode(ids) == text
        return spent

    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text], 1)[0]):
        # What disturbs a measurement comes and goes; twice the text at four times the time would stay.
        tries = (seconds(120_000, encode) / seconds(60_000, encode) for _ in range(10))
        assert min(tries) < 3


@pytest.mark.parametrize("kind", ["tiny", "small", "llama2", "llama3"])
def test_byte_counts_of_a_texts_tokens_add_up_to_its_bytes(request, kind):
    tokenizer = request.getfixturevalue(kind)
    inside, first = base.byte_counts(tokenizer)
    for text in ("rope norm", " ab  naïve 日本 \n\n x", "\tllama"):
        begin, *rest = tokenizer.encode(text)
        assert first[begin] + inside[rest].sum() == len(text.encode())
    assert not inside[list(tokenizer.special.values())].any()
