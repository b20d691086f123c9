"""A tokenizer.json that is neither SentencePiece's nor Llama 3's, against transformers' reading of it."""

import json
import sys

import pytest

from llama_jax import config
from llama_jax.tokenizer import base, hf, hf_added
from llama_jax.tokenizer.hf_json import Json
from llama_jax.tokenizer.stream import Stream
from tests.tokenizer import fuzz

tokenizers = pytest.importorskip("tokenizers")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "bos_token": None,
}


@pytest.fixture(scope="module")
def content():
    """Byte-level BPE as GPT-2's and SmolLM2's: digits apart, specials first, one added token in texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["rope norm gate llama query value 12 é 日"] * 5, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def theirs(content, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def texts():
    return [*fuzz.strings(300, seed=5), "rope<think>norm <think>", "a<|im_end|>b", ""]


def test_ids_and_texts_are_those_of_transformers(content, theirs):
    ours = Json(content)
    for text in texts():
        expected = theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ours.encode_batch([text], 1)[0].tolist() == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        assert ours.encode(text, special=True) == theirs(text)["input_ids"]
    assert ours.special == {
        name: theirs.convert_tokens_to_ids(name) for name in [*SPECIALS, "<think>"]
    }
    assert ours.user_defined == {theirs.convert_tokens_to_ids("<think>")}
    assert ours.vocab_size == len(theirs)
    assert (ours.prefix, ours.bos, ours.eos) == ((), 0, 0)  # as GPT-2


def test_streams_of_ids_are_decoded_whole(content, llama2_alone):
    for ours in (Json(content), llama2_alone):
        for text in (*texts(), "日本 é "):
            ids = [*ours.encode(text, special=True), 99_999]
            stream = Stream(ours)
            assert "".join([*map(stream.feed, ids), stream.finish()]) == ours.decode(ids)


@pytest.fixture(scope="module")
def llama2_alone(tiny):
    """Llama 2's tokenizer.json without a tokenizer.model, as some derivatives come."""
    return Json(json.dumps(hf.sp_to_hf_json(tiny._processor.serialized_model_proto())).encode())


def test_llama2_in_a_tokenizer_json_alone_gives_sentencepieces_ids(tiny, llama2_alone):
    assert (llama2_alone.bos, llama2_alone.eos, llama2_alone.prefix) == (1, 2, (1,))
    for text in (*fuzz.strings(300, seed=6), "rope norm"):
        assert llama2_alone.encode(text) == tiny.encode(text), ascii(text)
        assert llama2_alone.encode_inner(text) == tiny.encode_inner(text), ascii(text)
        assert llama2_alone.decode(tiny.encode(text)) == tiny.decode(tiny.encode(text))
    for token in range(3, 300):
        assert llama2_alone.token_bytes(token) == tiny.token_bytes(token)


def test_bytes_of_tokens_are_those_of_the_text(content):
    ours = Json(content)
    for text in texts():
        raw = b"".join(ours.token_bytes(i) for i in ours.encode(text))
        assert raw == text.encode()
    assert ours.token_bytes(ours.special["<|im_end|>"]) == ours.token_bytes(99_999) == b""


def test_the_files_beside_it_say_where_a_text_begins_and_ends(content):
    files = {"tokenizer.json": content, "tokenizer_config.json": json.dumps(CONFIG).encode()}
    found, notes = hf_added.read(files, Json(content), 400)
    assert (found.tokens, found.eos, found.adds_bos, notes) == ((), 2, False, ())


def test_a_file_that_is_no_tokenizer(tmp_path):
    for text, words in (("{}", "is not a tokenizer.json"), ("[", "is not a tokenizer.json")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            base.load(config.TokenizerConfig("json", str(tmp_path / "tokenizer.json")))
    with pytest.raises(ValueError, match="cannot be read"):
        base.load(config.TokenizerConfig("json", str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"must name the tokenizer\.json of kind 'json'"):
        config.TokenizerConfig("json")


def test_the_library_is_asked_for_where_it_is_absent(tmp_path, content, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"pip install 'llama_jax\[tokenizers\]'"):
        base.load(config.TokenizerConfig("json", str(tmp_path / "tokenizer.json")))
