import base64
import json
import random

import pytest

from llama_jax import config
from llama_jax.tokenizer import base, bpe


@pytest.fixture
def llama(metas_llama3):
    return metas_llama3


def ranks(path, merges=()):
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    content = b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens))
    path.write_bytes(content)
    return path


def test_llama_ids_equal_those_of_transformers(llama, shared):
    texts = shared("tokenizers/vectors/ggml-vocab-llama-bpe.gguf.inp").read_text()
    ids = shared("tokenizers/vectors/ggml-vocab-llama-bpe.gguf.out").read_text().splitlines()
    texts = texts.split("\n__ggml_vocab_test__\n")[:-1]  # the file ends in one
    assert len(texts) == len(ids) >= 46
    for text, expected in zip(texts, ids, strict=True):
        assert llama.encode(text) == [int(i) for i in expected.split()], repr(text)
        assert llama.decode(llama.encode(text)) == text
    batch = llama.encode_batch(texts, 3)
    assert [a.tolist() for a in batch] == [llama.encode(text) for text in texts]


def test_llama_ids_equal_metas_own_test(llama, shared):
    vectors = json.loads(shared("tokenizers/vectors/llama3_meta_test_tokenizer.json").read_text())
    for case in vectors["encode"]:
        assert [llama.bos, *llama.encode(case["text"]), llama.eos] == case["ids"]
    for case in vectors["decode"]:
        assert llama.decode(case["ids"]) == case["text"]
    message = vectors["encode_message"][0]
    begin, end, turn = (
        llama.special[f"<|{n}|>"] for n in ("start_header_id", "end_header_id", "eot_id")
    )
    ids = [begin, *llama.encode(message["role"]), end, *llama.encode("\n\n")]
    assert [*ids, *llama.encode(message["content"]), turn] == message["ids"]


def test_llama_specials_are_where_meta_has_them(llama):
    assert (llama.vocab_size, llama.bos, llama.eos, llama.pad) == (128256, 128000, 128001, 128004)
    assert len(llama.special) == 256
    assert llama.special["<|eom_id|>"] == 128008
    assert llama.special["<|python_tag|>"] == 128010
    assert llama.special["<|reserved_special_token_2|>"] == 128011
    assert llama.special["<|reserved_special_token_246|>"] == 128255


def test_text_that_spells_a_special_token_stays_text(small):
    for name in ("<|begin_of_text|>", "<|eot_id|>", "a<|end_of_text|>b"):
        ids = small.encode(name)
        assert max(ids) < 259
        assert small.decode(ids) == name


def test_long_inputs_are_cut_as_meta_cuts_them():
    """The oracle counts character by character, as Meta's tokenizer does."""

    def oracle(text):
        out = []
        for block in (text[i : i + 400_000] for i in range(0, len(text), 400_000)):
            start, run, space = 0, 0, block[0].isspace()
            for i, char in enumerate(block):
                if char.isspace() != space:
                    run, space = 1, char.isspace()
                elif run == 25_000:
                    out.append(block[start:i])
                    start, run = i, 1
                else:
                    run += 1
            out.append(block[start:])
        return out

    text = "a b " * 500 + "x" * 25_001 + " " * 50_001 + "y" * 50_000 + "\n" + "z" * 275_000
    assert bpe._parts(text) == oracle(text)
    assert len(bpe._parts(text)) == 16
    assert bpe._parts("") == []
    rng = random.Random(2)
    for run in (24_999, 25_000, 25_001, 25_002):
        for char in "x ":
            text = (
                "a " * rng.randint(0, 13_000) + rng.choice(("a", " ", "")) + char * run + " b" * 9
            )
            assert bpe._parts(text) == oracle(text)


def test_a_very_long_word_takes_linear_time_and_comes_back(small):
    text = "ab" * 100_000 + " " * 100_000
    (ids,) = small.encode_batch([text], 1)
    assert small.decode(ids) == text


def test_a_wrong_file_is_named_with_its_line(tmp_path):
    good = ranks(tmp_path / "good").read_bytes().splitlines(keepends=True)
    cases = {
        "absent": (None, "absent' cannot be read: No such file"),
        "binary": ([b"\n\x0a\x05<unk>\x15"], "line 1: .* is not .base64 rank."),
        "gap": (good[:77] + good[78:], "line 78: rank 78 .* must be 77"),
        "twice": ([*good, b"AA== 256\n"], "line 257: rank 256 .* its bytes new"),
        "cut": (good[:200], r"\(200 ranks\) lacks byte 200"),
        "half": ([*good[:-1], b"/w="], "line 256: b'/w=' is not"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(b"".join(content))
        with pytest.raises(ValueError, match=message):
            base.load(config.TokenizerConfig("bpe", str(tmp_path / name)))
