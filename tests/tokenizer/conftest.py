"""Tokenizers of Llama 2's and Llama 3's kind: Meta's own where they are, smaller ones of ours elsewhere.

Where a test compares with published ids it asks for Meta's, and is skipped without.
"""

import base64
import io

import pytest

from llama_jax import config
from llama_jax.tokenizer import base

KINDS = {"llama2": "sp", "llama3": "bpe"}


@pytest.fixture(scope="session")
def model_file(shared):
    """name -> the file of a tokenizer of that kind, Meta's if it is on this machine."""

    def find(name: str):
        try:
            return shared(f"tokenizers/{name}/tokenizer.model")
        except pytest.skip.Exception:
            return shared(f"tokenizers/small/{name}.model")

    return find


def _load(name: str, path):
    return base.load(config.TokenizerConfig(KINDS[name], str(path)))


@pytest.fixture(scope="session")
def llama2(model_file):
    return _load("llama2", model_file("llama2"))


@pytest.fixture(scope="session")
def llama3(model_file):
    return _load("llama3", model_file("llama3"))


@pytest.fixture(scope="session")
def metas_llama2(shared):
    return _load("llama2", shared("tokenizers/llama2/tokenizer.model"))


@pytest.fixture(scope="session")
def metas_llama3(shared):
    return _load("llama3", shared("tokenizers/llama3/tokenizer.model"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Llama 3's kind with three merges: ids 0..258, then 256 specials."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b" a", b" ab"]
    path = tmp_path_factory.mktemp("bpe") / "ranks"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return base.load(config.TokenizerConfig("bpe", str(path)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """LLaMA 2's kind, trained on a few lines."""
    from llama_jax.tokenizer import sp

    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    words = ["rope", "norm", "gate", "llama", "query", "", "", "value", "é", "日", "12", "a,b"]
    sp.train([" ".join(words[i % 7 :] + words[: i % 5]) for i in range(90)], 300, str(path), 1)
    return sp.load(str(path))


@pytest.fixture(scope="session")
def user_defined(tmp_path_factory):
    """A SentencePiece model that has the marks of ChatML itself, as Yi's."""
    import sentencepiece

    from llama_jax.tokenizer import sp

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["rope norm gate"] * 9), model_writer=model, vocab_size=276,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("user") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return sp.load(str(file))
