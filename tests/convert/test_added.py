"""Added tokens on their way between formats."""

import base64
import dataclasses
import json
import sys

import pytest

from llama_jax.convert import folder, formats, native
from llama_jax.tokenizer.special import AddedToken
from tests.convert import small

CONFIG = {
    "added_tokens_decoder": {
        "45": {"content": "<|im_end|>", "special": True},
        "46": {"content": "<think>", "special": False, "normalized": False},
    },
    "eos_token": "<|im_end|>",
    "add_bos_token": False,
    "tokenizer_class": "LlamaTokenizer",
}
TOKENS = (AddedToken(45, "<|im_end|>"), AddedToken(46, "<think>", special=False))


@pytest.fixture
def came(tmp_path):
    """A network of 48 ids, 40 of them SentencePiece's, two added and six that only fill up."""
    place = small.hf(tmp_path / "came")
    (place / "tokenizer.model").write_bytes(small.sentencepiece(40))
    (place / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return place


def test_added_tokens_come_from_hugging_face_into_our_folders_and_on(came, tmp_path):
    for source in (
        formats.open_checkpoint(came, "", ""),
        small.convert(came, tmp_path / "native", "native"),
        small.convert(tmp_path / "native", tmp_path / "again", "native"),
    ):
        additions = source.tokenizer.additions
        assert (additions.tokens, additions.eos, additions.adds_bos) == (TOKENS, 45, False)
        tokenizer = source.tokenizer.load()
        assert (tokenizer.eos, tokenizer.prefix, tokenizer.vocab_size) == (45, (), 47)
        assert tokenizer.encode("<think><|im_end|>", special=True) == [46, 45]
        assert tokenizer.decode([46, 45, 47]) == "<think>"


def test_a_folder_of_ours_without_additions_still_loads(came, tmp_path):
    small.convert(came, tmp_path / "native", "native")
    file = tmp_path / "native" / native.MODEL
    said = json.loads(file.read_text())
    del said[native.ADDITIONS]
    file.write_text(json.dumps(said))
    assert native.settings(tmp_path / "native")[2].load().eos == 2


@pytest.mark.parametrize(
    "damage", [{"tokens": [{"id": -1, "content": "a"}]}, {"tokens": [], "spaces": "no"}, 5]
)
def test_damaged_additions_are_named(came, tmp_path, damage):
    small.convert(came, tmp_path / "native", "native")
    file = tmp_path / "native" / native.MODEL
    file.write_text(json.dumps({**json.loads(file.read_text()), native.ADDITIONS: damage}))
    with pytest.raises(ValueError, match="its settings cannot be read"):
        native.settings(tmp_path / "native")


def test_the_files_beside_a_given_tokenizer_are_read_not_the_checkpoints(came, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(small.sentencepiece(40))
    (other / "added_tokens.json").write_text('{"<x>": 44}')
    source = formats.open_checkpoint(came, "", str(other / "tokenizer.model"))
    assert [token.content for token in source.tokenizer.additions.tokens] == ["<x>"]
    assert not set(source.carried) & {"tokenizer_config.json", "tokenizer.model"}


@pytest.mark.parametrize("kind", ["BPE", "UNIGRAM"])
def test_tokenizer_files_of_hugging_face_leave_as_they_came(came, tmp_path, kind):
    """Whatever they are: none has to be made. A fine-tune of such a network could not leave otherwise."""
    (came / "tokenizer.model").write_bytes(small.sentencepiece(40, kind))
    small.convert(came, tmp_path / "native", "native")
    for place in (came, tmp_path / "native"):
        small.convert(place, tmp_path / f"{place.name}_out", "hf")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            out = tmp_path / f"{place.name}_out" / name
            assert out.read_bytes() == (came / name).read_bytes()
        assert not (out.parent / "tokenizer.json").exists()


def test_added_tokens_leave_for_hugging_face_where_its_files_did_not_come(came, tmp_path):
    (came / "tokenizer.model").write_bytes(small.sentencepiece(259))
    tokens = {str(int(i) + 220): token for i, token in CONFIG["added_tokens_decoder"].items()}
    config = CONFIG | {"added_tokens_decoder": tokens}
    (came / "tokenizer_config.json").write_text(json.dumps(config))
    wide = dataclasses.replace(small.MODEL, vocab_size=300)
    source = formats.open_checkpoint(small.hf(came, small.state(wide), vocab_size=300), "", "")
    source = dataclasses.replace(source, carried={})
    folder.convert(source, tmp_path / "out", "hf", None, print, print)
    again = formats.open_checkpoint(tmp_path / "out", "", "")
    made = again.tokenizer.additions
    assert made == source.tokenizer.additions
    assert [token.id for token in made.tokens] == [265, 266]


def test_meta_has_no_place_for_added_tokens(came, tmp_path):
    told = []
    small.convert(came, tmp_path / "meta", "meta", report=told.append)
    assert any("no place for 2 tokens" in line and "<|im_end|>, <think>" in line for line in told)


def test_chat_models_of_llama3_end_turns_in_hugging_face_too(tmp_path):
    """As in the published folders of 3.1 and later: 128001, 128008 and 128009."""
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (tmp_path / "ranks").write_bytes(ranks)
    model = dataclasses.replace(small.MODEL, vocab_size=512)
    came = small.hf(tmp_path / "came", small.state(model), vocab_size=512)
    source = formats.open_checkpoint(came, "", str(tmp_path / "ranks"))
    folder.convert(source, tmp_path / "out", "hf", None, print, print)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "out" / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (256, [257, 264, 265])


@pytest.fixture
def json_alone(tmp_path):
    """A network whose tokenizer is a byte-level tokenizer.json that no ranks can say."""
    library = pytest.importorskip("tokenizers")
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    vocab = {"<|endoftext|>": 0} | {char: i + 1 for i, char in enumerate(sorted(alphabet))}
    tokenizer = library.Tokenizer(library.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    model = dataclasses.replace(small.MODEL, vocab_size=260)
    came = small.hf(tmp_path / "came", small.state(model), vocab_size=260)
    (came / "tokenizer.json").write_text(tokenizer.to_str())
    return came


def test_a_tokenizer_json_alone_comes_in_and_leaves(json_alone, tmp_path):
    for source in (
        formats.open_checkpoint(json_alone, "", ""),
        small.convert(json_alone, tmp_path / "native", "native"),
        small.convert(tmp_path / "native", tmp_path / "out", "hf"),
    ):
        tokenizer = source.tokenizer.load()
        assert (source.tokenizer.kind, tokenizer.eos, tokenizer.prefix) == ("json", 0, ())
        assert tokenizer.decode(tokenizer.encode("a é")) == "a é"
    out = (tmp_path / "out/tokenizer.json").read_bytes()
    assert out == (json_alone / "tokenizer.json").read_bytes()
    told = []
    small.convert(json_alone, tmp_path / "meta", "meta", report=told.append)
    assert any("no place for a tokenizer.json" in line for line in told)
    assert not (tmp_path / "meta/tokenizer.model").exists()


def test_a_tokenizer_json_that_is_given_leaves_for_hugging_face(json_alone, tmp_path):
    (json_alone / "added_tokens.json").write_text('{"<x>": 257}')
    source = formats.open_checkpoint(json_alone, "", str(json_alone / "tokenizer.json"))
    folder.convert(source, tmp_path / "out", "hf", None, print, print)
    again = formats.open_checkpoint(tmp_path / "out", "", "").tokenizer.load()
    assert (again.special["<x>"], again.eos, again.bos) == (257, 0, 0)
    assert 257 in again.encode("a<x>")


def test_a_tokenizer_json_goes_along_where_the_library_is_absent(json_alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    source = formats.open_checkpoint(json_alone, "", "")
    assert source.tokenizer is None
    assert any("pip install 'llama_jax[tokenizers]'" in note for note in source.notes)
