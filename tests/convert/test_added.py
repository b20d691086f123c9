"""Added tokens on their way between formats."""

import json

import pytest

from llama_jax.convert import formats, native
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
        tokenizer = formats.loaded(source.tokenizer)
        assert (tokenizer.eos, tokenizer.prefix, tokenizer.vocab_size) == (45, (), 47)
        assert tokenizer.encode("<think><|im_end|>", special=True) == [46, 45]
        assert tokenizer.decode([46, 45, 47]) == "<think>"


def test_a_folder_of_ours_without_additions_still_loads(came, tmp_path):
    small.convert(came, tmp_path / "native", "native")
    file = tmp_path / "native" / native.MODEL
    said = json.loads(file.read_text())
    del said[native.ADDITIONS]
    file.write_text(json.dumps(said))
    assert formats.loaded(native.settings(tmp_path / "native")[2]).eos == 2


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
