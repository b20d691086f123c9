"""What Hugging Face's small files say of a tokenizer. The oracle, where it is one: transformers' reading."""

import base64
import itertools
import json

import pytest

from llama_jax.tokenizer import hf, hf_added
from llama_jax.tokenizer.added import Additions, Extended
from llama_jax.tokenizer.byte import Byte
from llama_jax.tokenizer.special import AddedToken

IM_END = {"content": "<|im_end|>", "special": True}


def files(**others) -> dict[str, bytes]:
    return {f"{name}.json": json.dumps(value).encode() for name, value in others.items()}


def tokens(found: Additions) -> list[tuple[int, str, bool]]:
    return [(token.id, token.content, token.special) for token in found.tokens]


def test_tokens_of_the_older_files_are_special_where_another_file_says_so(tiny):
    """As of Alpaca's and Vicuna's time: added_tokens.json has names and ids alone."""
    found, notes = hf_added.read(
        files(
            added_tokens={"<|im_end|>": 300, "[PAD]": 301, "<word>": 302, "<s>": 1},
            special_tokens_map={
                "pad_token": "[PAD]",
                "additional_special_tokens": ["<|im_end|>"],
                "bos_token": {"content": "<s>"},
            },
        ),
        tiny,
        320,
    )
    assert tokens(found) == [
        (300, "<|im_end|>", True),
        (301, "[PAD]", True),
        (302, "<word>", False),
    ]
    assert (found.bos, found.eos, found.pad) == (-1, -1, 301)
    assert [token.normalized for token in found.tokens] == [False, False, True]
    assert found.adds_bos
    assert not notes


def test_the_config_overrides_the_flags_of_tokenizer_json(tiny):
    found, _ = hf_added.read(
        files(
            tokenizer={
                "added_tokens": [{"id": 300, "content": "<|im_end|>", "special": False}],
                "post_processor": hf.sp_to_hf_json(tiny._processor.serialized_model_proto())[
                    "post_processor"
                ],
            },
            tokenizer_config={
                "added_tokens_decoder": {"300": IM_END, "1": {"content": "<s>", "special": True}},
                "eos_token": {"content": "<|im_end|>"},
                "bos_token": "<s>",
            },
        ),
        tiny,
        301,
    )
    assert tokens(found) == [(300, "<|im_end|>", True)]
    assert (found.bos, found.eos, found.adds_bos) == (-1, 300, True)


@pytest.mark.parametrize(
    ("others", "adds"),
    [
        ({}, True),
        ({"tokenizer_config": {"add_bos_token": False}}, False),
        ({"tokenizer_config": {"add_bos_token": True}}, True),
        ({"tokenizer_config": {"bos_token": None}}, False),
        ({"tokenizer": {"post_processor": None}}, False),
        ({"tokenizer": {"post_processor": {"type": "ByteLevel"}}}, False),
        (
            {
                "tokenizer": {"post_processor": None},
                "tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"},
            },
            True,
        ),
        (
            {
                "tokenizer": {
                    "post_processor": {
                        "processors": [
                            {"type": "ByteLevel"},
                            {
                                "single": [
                                    {"SpecialToken": {"id": "<s>"}},
                                    {"Sequence": {"id": "A"}},
                                ]
                            },
                        ]
                    }
                }
            },
            True,
        ),
    ],
)
def test_whether_texts_begin_with_bos(tiny, others, adds):
    found, _ = hf_added.read(files(**others), tiny, 300)
    assert found.adds_bos is adds


def test_reserved_names_say_nothing_new(small):
    """Llama 3.0 reserves what 3.1 names, Hugging Face counts the reserved ones otherwise."""
    documents = hf.ranks_to_hf_json(
        b"\n".join(hf.base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))
    )["added_tokens"]
    older = [
        {**token, "id": token["id"] + 3, "content": f"<|reserved_special_token_{i}|>"}
        for i, token in enumerate(documents)
        if i not in (0, 1, 6, 7, 9)
    ]
    for added in (older, [{**token, "id": token["id"] + 3} for token in documents]):
        found, _ = hf_added.read(files(tokenizer={"added_tokens": added}), small, 515)
        assert found.tokens == ()


def test_tokens_beyond_the_vocabulary_are_left_out_and_named(tiny):
    found, notes = hf_added.read(files(added_tokens={"<pad>": 300, "<x>": 299}), tiny, 300)
    assert tokens(found) == [(299, "<x>", False)]
    assert notes == ("added tokens beyond the vocabulary of 300 are left out: '<pad>' (300)",)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"added_tokens": [1]}, "added_tokens.json: it must be an object"),
        ({"added_tokens": {"a": "x"}}, r"added_tokens.json: .* an id of 0 or more; 'x' has 'a'"),
        ({"added_tokens": {"a": -1}}, "'-1' has 'a'"),
        ({"added_tokens": {"": 3}}, "'3' has ''"),
        ({"tokenizer": {"added_tokens": {"a": 1}}}, "added_tokens must be a list"),
        ({"tokenizer": {"added_tokens": ["a"]}}, "added_tokens must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, "'7' has 'None'"),
    ],
)
def test_files_of_another_shape_are_named(tiny, others, message):
    with pytest.raises(ValueError, match=message):
        hf_added.read(files(**others), tiny, 400)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        hf_added.read({"tokenizer_config.json": b"{"}, tiny, 400)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_chatml_on_llama2_are_those_of_transformers(tiny, tmp_path, legacy):
    transformers = pytest.importorskip("transformers")
    model = tiny._processor.serialized_model_proto()
    for name, content in hf.hf_files("sp", model).items():
        (tmp_path / name).write_bytes(content)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    for i, name in enumerate(("<|im_start|>", "<|im_end|>")):
        document["added_tokens"].append(
            {**document["added_tokens"][0], "id": 300 + i, "content": name}
        )
    if not legacy:
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    carried = {name: (tmp_path / name).read_bytes() for name in hf_added.FILES[:2]}
    ours = Extended(tiny, hf_added.read(carried, tiny, 304)[0])
    text = "<|im_start|>user\nrope norm<|im_end|>\n<|im_start|>assistant\n"
    expected = theirs(text)["input_ids"]
    assert [*ours.prefix, *ours.encode(text, special=True)] == expected
    assert ours.special["<|im_end|>"] == 301
    assert AddedToken(301, "<|im_end|>") in hf_added.read(carried, tiny, 304)[0].tokens


@pytest.fixture
def theirs(tmp_path):
    """Files -> what transformers makes of them."""
    transformers = pytest.importorskip("transformers")

    def load(files: dict[str, bytes]):
        for name, content in {"config.json": b'{"model_type": "llama"}', **files}.items():
            (tmp_path / name).write_bytes(content)
        return transformers.AutoTokenizer.from_pretrained(tmp_path)

    return load


CHATML = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "eos_token": "<|im_end|>",
    "pad_token": "<unk>",
}


@pytest.mark.parametrize("said", [CHATML, {}], ids=["as Yi-Chat's", "no settings"])
def test_ids_around_user_defined_pieces_are_those_of_transformers(user_defined, theirs, said):
    """SentencePiece puts its space before a text that begins with one, LlamaTokenizer does not."""
    beside = files(tokenizer_config=said)
    library = theirs(
        {"tokenizer.model": user_defined._processor.serialized_model_proto(), **beside}
    )
    additions, _ = hf_added.read(beside, user_defined, 300)
    ours = Extended(user_defined, additions)
    words = ("<|im_start|>", "rope norm", "<|im_end|>", "\n", " gate", "é")
    for text in map("".join, itertools.product(words, repeat=3)):
        if not text.startswith(" "):  # where transformers drops a space that SentencePiece keeps
            expected = library(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text) == expected, text
            assert ours.encode(text, special=True) == expected, text
    if said:
        assert (ours.eos, ours.pad) == (library.eos_token_id, library.pad_token_id)
        assert ours.prefix == tuple(library("")["input_ids"]) == ()
    text = "<|im_start|>user\nrope<|im_end|>"
    assert (user_defined.encode(text) == ours.encode(text)) is (not said)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("spaces", ["every", "first"])
def test_user_defined_pieces_leave_and_come_back(user_defined, theirs, spaces):
    """Listed in tokenizer.json, as in published Yi-Chat's, whose normaliser prepends to every part."""
    names = ("<|im_start|>", "<|im_end|>")
    pieces = (AddedToken(user_defined.special[name], name, special=False) for name in names)
    additions = Additions(tuple(pieces), spaces=spaces)
    made = hf.hf_files("sp", user_defined._processor.serialized_model_proto(), additions)
    library, ours = theirs(made), Extended(user_defined, additions)
    assert hf_added.read(made, user_defined, 300) == (additions, ())
    for text in ("<|im_end|>rope <|im_start|>gate", "rope<|im_end|>\n<|im_end|>", "norm"):
        assert [*ours.prefix, *ours.encode(text)] == library(text)["input_ids"], text


def test_without_files_beside_it_sentencepiece_decides(user_defined):
    assert hf_added.read({}, user_defined, 300) == (Additions(), ())


def test_special_tokens_without_an_id_have_those_of_transformers(tiny, small, theirs):
    """Of the vocabulary, else the next free one: roles first, in transformers' order, then lists."""
    roles = {"pad_token": "[PAD]", "eos_token": "<|im_end|>", "additional_special_tokens": ["<x>"]}
    known = {
        "mask_token": "rope",
        "cls_token": {"__type": "AddedToken", "content": "<c>", "lstrip": True},
    }
    for base, vocabulary in (
        (tiny, {"tokenizer.model": tiny._processor.serialized_model_proto()}),
        (small, {"tokenizer.json": hf._dump(hf.ranks_to_hf_json(ranks(small)))}),
    ):
        said = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **known}
        library = theirs({**vocabulary, **files(tokenizer_config=said)})
        found, notes = hf_added.read(files(tokenizer_config=said), base, 700)
        assert not notes
        named = {token.content: token for token in found.tokens}
        for name in ("[PAD]", "<|im_end|>", "<x>", "rope", "<c>"):
            assert named[name].id == library.convert_tokens_to_ids(name), name
            assert named[name].special
        assert named["<c>"].lstrip
        assert (found.eos, found.pad) == (library.eos_token_id, library.pad_token_id)


def ranks(base) -> bytes:
    tokens = [base64.b64encode(base.token_bytes(i)) for i in range(base.bos)]
    return b"".join(b"%s %d\n" % (token, i) for i, token in enumerate(tokens))


def test_names_are_looked_up_in_the_vocabulary(tiny, small, user_defined):
    """As Hugging Face spells them; a pad token may be an ordinary one, as Llama 3's "!"."""
    assert [tiny.id_of(name) for name in ("<unk>", "<s>", "no such")] == [0, 1, -1]
    assert tiny.decode([tiny.encode("rope")[0], tiny.id_of("\u2581")]) == "rope "
    assert [small.id_of(name) for name in ("!", "Ġab", "<|eot_id|>", "é", "日", " ab")] == [
        *(33, 258, small.special["<|eot_id|>"], 0xE9, -1, -1)
    ]
    assert Byte().id_of("<eos>") == 257
    assert Byte().id_of("!") == -1
    pad = hf_added.read(files(tokenizer_config={"pad_token": "!"}), small, 700)[0]
    assert pad.pad == 33
