import json
import random

import pytest

from llama_jax import config
from llama_jax.tokenizer import base, sp

WORDS = (
    "norm",
    "rope",
    "query",
    "key",
    "value",
    "gate",
    "loss",
    "step",
    "42",
    "7",
    "batch",
    "mesh",
    "grad",
    "scan",
    "tree",
    "naïve",
    "☃",
)


def lines(count, seed=3):
    words = random.Random(seed)
    return [
        " ".join(words.choices(WORDS, k=9)) + ("\tx = 1" if i % 5 else "") for i in range(count)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    sp.train(lines(700), 320, str(path), 1)
    return path


@pytest.fixture
def llama(metas_llama2):
    return metas_llama2


def test_llama_ids_equal_those_of_transformers(llama, shared):
    texts = shared("tokenizers/vectors/ggml-vocab-llama-spm.gguf.inp").read_text()
    ids = shared("tokenizers/vectors/ggml-vocab-llama-spm.gguf.out").read_text().splitlines()
    texts = texts.split("\n__ggml_vocab_test__\n")[:-1]  # the file ends in one
    assert len(texts) == len(ids) >= 46
    for text, expected in zip(texts, ids, strict=True):
        assert llama.encode(text) == [int(i) for i in expected.split()], repr(text)


def test_llama_ids_equal_those_of_llama2_c(llama, shared):
    vectors = json.loads(shared("tokenizers/vectors/llama2_llama2c_test_c.json").read_text())
    assert len(vectors["cases"]) > 3
    for case in vectors["cases"]:
        assert [llama.bos, *llama.encode(case["text"])] == case["ids"]


def test_llama_specials(llama):
    assert (llama.vocab_size, llama.bos, llama.eos, llama.pad) == (32000, 1, 2, 2)
    for text in ("<s>", "</s>", "<unk>", "a<s>b</s>"):
        assert not {0, 1, 2} & set(llama.encode(text))
        assert llama.decode(llama.encode(text)) == text


def test_a_long_text_encoded_in_parts_gives_the_same_ids(llama2, shared):
    text = shared("text/canterbury/alice29.txt").read_text()
    text = text[:60_000] + "\n\n  \n" + " x" * 3000 + "\n\n\n" * 3000 + text[60_000:90_000]
    whole, empty, short = llama2.encode_batch([text, "", "a\nb"], 2)
    assert whole.tolist() == llama2.encode(text) == llama2._processor.encode(text)
    assert (empty.tolist(), short.tolist()) == ([], llama2.encode("a\nb"))
    assert llama2.decode(whole) == text


@pytest.mark.parametrize("which", ["trained", "published"])
def test_cuts_never_change_the_ids(which, trained, model_file):
    """Newlines, words, runs of spaces, a visible space of the text's own, words longer than a part."""
    import sentencepiece

    path = trained if which == "trained" else model_file("llama2")
    tokenizer, raw = sp.load(str(path)), sentencepiece.SentencePieceProcessor(str(path))
    rng = random.Random(5)
    kinds = [" ", "  ", "\n", "\n ", "\t", " \u2581", "\u2581", "rope", "the ", "é", "☃", "w" * 300]
    for choices in (kinds, kinds[:1] + kinds[7:9], kinds[7:], kinds[:4], ["\u2581 a"]):
        for _ in range(3):
            text = "".join(rng.choices(choices, k=sp.PART_CHARS))  # several parts each
            assert tokenizer.encode(text) == raw.encode(text)
            assert tokenizer.encode_batch([text, "x"], 2)[0].tolist() == raw.encode(text)


def test_training_depends_on_the_text_alone(trained, tmp_path):
    for threads in (1, 2):
        again = tmp_path / f"again-{threads}.model"
        sp.train(lines(700), 320, str(again), threads)
        assert sp.load(str(again)).fingerprint == sp.load(str(trained)).fingerprint
    other = tmp_path / "other.model"
    sp.train(lines(700, seed=4), 320, str(other), 1)
    assert sp.load(str(other)).fingerprint != sp.load(str(trained)).fingerprint


def test_trained_with_the_settings_stored_in_the_published_model(trained, shared):
    """The oracle is the trainer_spec and normalizer_spec inside Meta's own file."""
    from sentencepiece import sentencepiece_model_pb2

    def specs(path):
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(path.read_bytes())
        return model

    ours, theirs = specs(trained), specs(shared("tokenizers/llama2/tokenizer.model"))
    own_text = {"input", "model_prefix", "input_format", "vocab_size", "num_threads"}
    defaulted = {"self_test_sample_size", "train_extremely_large_corpus"}
    for field in theirs.trainer_spec.DESCRIPTOR.fields:
        if field.name not in own_text | defaulted:
            pair = [getattr(m.trainer_spec, field.name) for m in (ours, theirs)]
            assert pair[0] == pair[1], field.name
    for field in ("name", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(ours.normalizer_spec, field) == getattr(theirs.normalizer_spec, field), field


def test_digits_split_and_unknown_characters_become_bytes(trained):
    tokenizer = sp.load(str(trained))
    processor = tokenizer._processor
    assert processor.encode("4271", out_type=str)[-4:] == list("4271")
    assert processor.encode("日", out_type=str)[-3:] == ["<0xE6>", "<0x97>", "<0xA5>"]
    text = "  query\n\tkey 日本 \n\n value  "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_are_split_within_the_trainers_limit_and_nothing_is_lost():
    line = ("é" * 5 + " word") * 900 + "日" * 3000
    parts = list(sp._sentences([line, "", "short"]))
    assert "".join(parts[:-1]) == line
    assert parts[-1] == "short"
    assert max(len(part.encode()) for part in parts) <= sp.MAX_SENTENCE_BYTES
    assert len(parts) - 1 <= 2 * len(line.encode()) / sp.MAX_SENTENCE_BYTES


def test_a_text_too_small_says_the_largest_vocabulary(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(ValueError, match=r"5000 pieces is too large .* at most (\d+)") as error:
        sp.train(lines(50), 5000, str(path), 1)
    largest = int(str(error.value).split("at most ")[1].split(":")[0])
    sp.train(lines(50), largest, str(path), 1)
    assert sp.load(str(path)).vocab_size == largest


def test_a_vocabulary_below_the_characters_says_the_least(tmp_path):
    with pytest.raises(ValueError, match=r"30 pieces is too small .* take 2\d\d"):
        sp.train(lines(50), 30, str(tmp_path / "t.model"), 1)
    assert not list(tmp_path.iterdir())


def test_no_text_says_so(tmp_path):
    with pytest.raises(ValueError, match="training text is empty"):
        sp.train([], 300, str(tmp_path / "t.model"), 1)


def test_an_error_while_reading_is_not_swallowed_by_the_trainer(tmp_path):
    def broken():
        yield from lines(20)
        raise ValueError("x.txt is not text: NUL at byte 7")

    with pytest.raises(ValueError, match="NUL at byte 7"):
        sp.train(broken(), 300, str(tmp_path / "t.model"), 1)


def test_a_file_that_is_missing_or_no_model_is_named(tmp_path, trained):
    cases = {
        "absent.model": (None, "absent.model' cannot be read: No such file"),
        "cut.model": (trained.read_bytes()[:1000], r"cut.model' \(1000 bytes\) is not a Sentence"),
        "empty.model": (b"", r"empty.model' \(0 bytes\) is not a SentencePiece model"),
        "text.model": (b"just text, really\n" * 9, r"text.model' .* is not a SentencePiece model"),
        "ranks.model": (b"IQ== 0\nIg== 1\n", "set data.tokenizer.kind='bpe'"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            base.load(config.TokenizerConfig("sp", str(tmp_path / name)))
