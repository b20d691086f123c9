"""Published tokenizers, where they are, and a small one of each kind."""

import base64

import pytest

from llama_jax import config
from llama_jax.tokenizer import base


def _published(shared, kind: str, name: str):
    return base.load(config.Tokenizer(kind, str(shared(f"tokenizers/{name}/tokenizer.model"))))


@pytest.fixture(scope="session")
def llama2(shared):
    return _published(shared, "sp", "llama2")


@pytest.fixture(scope="session")
def llama3(shared):
    return _published(shared, "bpe", "llama3")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Llama 3's kind with three merges: ids 0..258, then 256 specials."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b" a", b" ab"]
    path = tmp_path_factory.mktemp("bpe") / "ranks"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return base.load(config.Tokenizer("bpe", str(path)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """LLaMA 2's kind, trained on a few lines."""
    from llama_jax.tokenizer import sp

    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    words = ["rope", "norm", "gate", "llama", "query", "", "", "value", "é", "日", "12", "a,b"]
    sp.train([" ".join(words[i % 7 :] + words[: i % 5]) for i in range(90)], 300, str(path), 1)
    return sp.load(str(path))
