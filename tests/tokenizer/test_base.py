import subprocess
import sys

import pytest

from llama_jax import config
from llama_jax.tokenizer import base


def test_every_kind_of_the_config_has_a_slot():
    for kind in base.KINDS:
        config.Tokenizer(kind, "" if kind == "byte" else "x")
    with pytest.raises(ValueError, match=r"data.tokenizer.kind='bytes' .* nearest: 'byte'"):
        config.Tokenizer("bytes")


def test_no_jax_and_no_tokenizer_library_until_needed():
    code = "import sys, llama_jax.tokenizer.base\nprint([m for m in sys.modules if m in %r])"
    names = ("jax", "sentencepiece", "tiktoken", "grain", "tensorflow_datasets")
    out = subprocess.run([sys.executable, "-c", code % (names,)], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr
