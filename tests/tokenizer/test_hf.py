import base64
import json

import pytest

from llama_jax.tokenizer import bpe, hf
from tests.tokenizer import fuzz

COUNT = 10_000


@pytest.fixture(scope="module", params=["sp", "bpe"])
def exported(request, model_file, tmp_path_factory):
    """Our tokenizer, and transformers' reading of the directory that hf_files describes."""
    transformers = pytest.importorskip("transformers")
    name = {"sp": "llama2", "bpe": "llama3"}[request.param]
    folder = tmp_path_factory.mktemp(name)
    content = model_file(name).read_bytes()
    for file, text in hf.hf_files(request.param, content).items():
        (folder / file).write_bytes(text)
    model = {"model_type": "llama", "transformers_version": transformers.__version__}
    (folder / "config.json").write_text(json.dumps(model))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return request.getfixturevalue(name), theirs


def test_ten_thousand_strings_have_the_ids_of_transformers(exported):
    ours, theirs = exported
    texts = fuzz.strings(COUNT, seed=1)
    expected = theirs(texts)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert [ours.bos, *ours.encode(text)] == ids, ascii(text)
    batch = ours.encode_batch(texts, 2)
    assert [a.tolist() for a in batch] == [ids[1:] for ids in expected]


def test_ten_thousand_strings_come_back(exported):
    ours, theirs = exported
    for text in fuzz.strings(COUNT, seed=2):
        ids = ours.encode(text)
        spaced = text.replace("\u2581", " ") if theirs.eos_token == "</s>" else text
        assert ours.decode(ids) == spaced
    for text in (spaced, "a , b . c ! do n't I 'm"):
        assert theirs.decode(ours.encode(text)) == text


def test_specials_are_found_by_hugging_faces_names(exported):
    ours, theirs = exported
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        ours.bos,
        ours.eos,
        ours.vocab_size,
    )
    assert theirs.unk_token == (None if len(ours.special) == 256 else "<unk>")
    names = hf.SPECIALS if len(ours.special) == 256 else tuple(ours.special)
    assert theirs.convert_tokens_to_ids(list(names)) == list(ours.special.values())


def test_sentencepiece_and_tiktoken_themselves_give_the_same(llama2, llama3, model_file):
    import sentencepiece
    import tiktoken

    texts = fuzz.strings(COUNT, seed=3)
    path = str(model_file("llama2"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=path)
    assert [llama2.encode(t) for t in texts] == theirs.encode(texts)
    lines = model_file("llama3").read_bytes().splitlines()
    pairs = (line.split() for line in lines)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    plain = tiktoken.Encoding("x", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert [llama3.encode(t) for t in texts] == plain.encode_ordinary_batch(texts, num_threads=1)


def test_hugging_faces_names_of_the_specials():
    """As in the tokenizer.json published with Llama 3.1."""
    assert hf.SPECIALS[:12] == (
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
        "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        "<|reserved_special_token_3|>",
    )  # fmt: skip
    assert (len(set(hf.SPECIALS)), hf.SPECIALS[255]) == (256, "<|reserved_special_token_247|>")
    same = [a == b for a, b in zip(hf.SPECIALS, bpe.SPECIALS, strict=True)]
    assert same == [True] * 5 + [False] + [True] * 5 + [False] * 245


def test_merges_are_those_of_transformers_own_converter(model_file):
    converter = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = model_file("llama3")
    vocab, merges = converter.TikTokenConverter(str(path)).extract_vocab_merges_from_model(
        str(path)
    )
    model = hf.ranks_to_hf_json(path.read_bytes())["model"]
    assert model["vocab"] == vocab
    assert model["merges"] == [" ".join(pair) for pair in merges]
    assert len(merges) > 1000


def test_transformers_4_is_told_to_leave_spaces_alone(tiny):
    model = tiny._processor.serialized_model_proto()
    for files in (hf.hf_files("sp", model), hf.hf_files("bpe", ranks())):
        config = json.loads(files["tokenizer_config.json"])
        assert config["clean_up_tokenization_spaces"] is False
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_ranks_come_back_byte_for_byte(model_file):
    content = model_file("llama3").read_bytes()
    assert hf.hf_json_to_ranks(hf.hf_files("bpe", content)["tokenizer.json"]) == content


# Small documents: the rest needs no published file.


def ranks(merges=(b"ab", b" a", b" ab")):
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    return b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens))


def test_small_ranks_come_back_from_both_spellings_of_merges():
    document = hf.ranks_to_hf_json(ranks())
    assert document["model"]["merges"] == ["a b", "\u0120 a", "\u0120 ab", "\u0120a b"]
    assert hf.hf_json_to_ranks(json.dumps(document)) == ranks()
    document["model"]["merges"] = [m.split(" ") for m in document["model"]["merges"]]
    assert hf.hf_json_to_ranks(json.dumps(document).encode()) == ranks()


def test_the_names_of_llama_3_0_are_taken_too():
    document = hf.ranks_to_hf_json(ranks())
    for i in (4, 5, 8, 10):
        document["added_tokens"][i]["content"] = f"<|reserved_special_token_{i}x|>"
    assert hf.hf_json_to_ranks(json.dumps(document)) == ranks()


def edited(change):
    document = hf.ranks_to_hf_json(ranks())
    change(document)
    return json.dumps(document)


def split(document):
    return document["pre_tokenizer"]["pretokenizers"][0]["pattern"]


WRONG = {
    "not JSON": (lambda: "{", "is not a BPE tokenizer of Hugging Face"),
    "a list": (lambda: "[]", "is not a BPE tokenizer of Hugging Face"),
    "not UTF-8": (lambda: b'{"\xff', "is not a BPE tokenizer of Hugging Face"),
    "deep": (
        lambda: '{"a":' * 100_000,
        "is not a BPE tokenizer of Hugging Face: maximum recursion",
    ),
    "no pattern": (
        lambda: edited(lambda d: d["pre_tokenizer"]["pretokenizers"][0].pop("pattern")),
        "of Hugging Face: 'pattern'",
    ),
    "no type": (
        lambda: edited(lambda d: d["pre_tokenizer"]["pretokenizers"][0].pop("type")),
        "of Hugging Face: 'type'",
    ),
    "a step alone": (lambda: edited(lambda d: d.update(pre_tokenizer={"x": 1})), "Face: 'type'"),
    "a word for steps": (lambda: edited(lambda d: d.update(pre_tokenizer="x")), "of Hugging Face"),
    "a pattern that is a word": (
        lambda: edited(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern="x")),
        "of Hugging Face: 'str' object",
    ),
    "mixed ids": (lambda: edited(lambda d: d["model"]["vocab"].update(ab="x")), "of Hugging Face"),
    "ids that are lists": (
        lambda: edited(lambda d: d["added_tokens"][0].update(id=[])),
        "of Hugging Face: unhashable",
    ),
    "added by number": (lambda: edited(lambda d: d.update(added_tokens=5)), "of Hugging Face"),
    "merges of numbers": (lambda: edited(lambda d: d["model"].update(merges=[5])), "Hugging Face"),
    "a vocabulary as a list": (lambda: edited(lambda d: d["model"].update(vocab=["a"])), "Face"),
    "no merges": (lambda: edited(lambda d: d["model"].pop("merges")), "of Hugging Face: 'merges'"),
    "unigram": (lambda: edited(lambda d: d["model"].update(type="Unigram")), "type='Unigram'"),
    "whole": (lambda: edited(lambda d: d.update(pre_tokenizer=None)), "no byte-level BPE"),
    "pattern": (lambda: edited(lambda d: split(d).update(Regex="x")), r"splits by \['x'\]"),
    "no bytes": (
        lambda: edited(lambda d: d["pre_tokenizer"]["pretokenizers"].pop()),
        "and then to bytes",
    ),
    "merging": (lambda: edited(lambda d: d["model"].update(ignore_merges=False)), "ignore_merges"),
    "a gap": (lambda: edited(lambda d: d["model"]["vocab"].update(ab=999)), "ids of model.vocab"),
    "255": (lambda: edited(lambda d: d["added_tokens"].pop()), "its 255 added tokens has id 514"),
    "order": (lambda: edited(lambda d: d["model"]["merges"].reverse()), "in the order of their"),
    "stray": (
        lambda: edited(lambda d: d["model"]["merges"].append("q q")),
        "in the order of their",
    ),
    "letter": (
        lambda: edited(lambda d: d["model"].update(vocab=_renamed(d, "ab", "\u65e5"), merges=[])),
        "outside of the byte alphabet",
    ),
    "byte": (
        lambda: edited(lambda d: d["model"].update(vocab=_renamed(d, "z", "zz"), merges=[])),
        "lacks byte 122",
    ),
}


def _renamed(document, old, new):
    return {new if token == old else token: i for token, i in document["model"]["vocab"].items()}


@pytest.mark.parametrize("case", WRONG)
def test_another_models_document_is_refused(case):
    content, message = WRONG[case]
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        hf.hf_json_to_ranks(content())


def test_a_sentencepiece_document_points_to_its_model(tiny):
    document = json.dumps(hf.sp_to_hf_json(tiny._processor.serialized_model_proto()))
    with pytest.raises(ValueError, match=r"use the tokenizer.model beside it"):
        hf.hf_json_to_ranks(document)


def test_a_trained_model_gives_its_ids_through_the_tokenizers_library(tiny):
    tokenizers = pytest.importorskip("tokenizers")
    files = hf.hf_files("sp", tiny._processor.serialized_model_proto())
    assert files["tokenizer.model"] == tiny._processor.serialized_model_proto()
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True
    for text in [*fuzz.strings(1000, seed=4), "rope norm gate  query", " llama", "a,b,a,b 12"]:
        assert theirs.encode(text).ids == [1, *tiny.encode(text)], ascii(text)


def test_a_model_without_bytes_gives_its_ids_through_the_tokenizers_library(tiny):
    """What no piece spells is one unknown token, however long, in both."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as proto

    tokenizers = pytest.importorskip("tokenizers")
    model = proto.ModelProto()
    model.ParseFromString(tiny._processor.serialized_model_proto())
    del model.pieces[3:259]
    model.trainer_spec.byte_fallback = False
    content = model.SerializeToString()
    ours = SentencePieceProcessor(model_proto=content)
    theirs = tokenizers.Tokenizer.from_str(hf.hf_files("sp", content)["tokenizer.json"].decode())
    for text in ("rope norm", "rope\t\n", "\u0416\u0416 rope \u0416", "a,\u0416b 12"):
        assert theirs.encode(text).ids == [1, *ours.encode(text)], ascii(text)


def test_models_with_other_settings_are_refused(tiny):
    from sentencepiece import sentencepiece_model_pb2 as proto

    changes = {
        "model_type=UNIGRAM must be BPE": lambda m: setattr(
            m.trainer_spec, "model_type", proto.TrainerSpec.UNIGRAM
        ),
        "normalizer 'nmt_nfkc' must be 'identity'": lambda m: m.normalizer_spec.MergeFrom(
            proto.NormalizerSpec(name="nmt_nfkc", precompiled_charsmap=b"x")
        ),
        "add_dummy_prefix=False must be true": lambda m: setattr(
            m.normalizer_spec, "add_dummy_prefix", False
        ),
        "escape_whitespaces=False must be true": lambda m: setattr(
            m.normalizer_spec, "escape_whitespaces", False
        ),
        "remove_extra_whitespaces=True must be false": lambda m: setattr(
            m.normalizer_spec, "remove_extra_whitespaces", True
        ),
        "must be neither unused nor user-defined with a space": lambda m: setattr(
            m.pieces[270], "type", proto.ModelProto.SentencePiece.USER_DEFINED
        ),
    }
    for rule, change in changes.items():
        model = proto.ModelProto()
        model.ParseFromString(tiny._processor.serialized_model_proto())
        change(model)
        with pytest.raises(ValueError, match=f"{rule} for a tokenizer.json"):
            hf.hf_files("sp", model.SerializeToString())
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        hf.hf_files("sp", b"text that is none")
    with pytest.raises(ValueError, match="kind='byte' has no Hugging Face form"):
        hf.hf_files("byte", b"")
