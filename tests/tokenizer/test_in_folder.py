"""The tokenizer that a folder of a model holds."""

import json

import pytest

from llama_jax import config
from llama_jax.tokenizer import base, in_folder
from llama_jax.tokenizer.added import NONE, Additions
from llama_jax.tokenizer.special import AddedToken
from tests.convert import small

ADDED = Additions((AddedToken(45, "<|im_end|>"), AddedToken(46, "<x>", special=False)), eos=45)


def folder(tmp_path, **files):
    (tmp_path / "tokenizer.model").write_bytes(small.sentencepiece(40))
    for name, said in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    return tmp_path


@pytest.mark.parametrize(
    "files",
    [
        {"model": {"tokenizer_additions": in_folder.to_dict(ADDED)}},
        {"run": {}, "tokenizer_additions": in_folder.to_dict(ADDED)},
        {"meta": {}, "tokenizer_additions": in_folder.to_dict(ADDED)},
    ],
)
def test_additions_of_models_runs_and_rows_are_read(tmp_path, files):
    place = folder(tmp_path, **files)
    own, additions = in_folder.read(str(place))
    assert (own, additions) == (config.TokenizerConfig("sp", f"{place}/tokenizer.model"), ADDED)
    loaded = base.load(config.TokenizerConfig("folder", str(place)))
    assert (loaded.eos, loaded.vocab_size) == (45, 47)
    assert 46 in loaded.encode("<x>")


def test_without_additions_it_is_the_file(tmp_path):
    assert in_folder.read(str(folder(tmp_path, model={})))[1] == NONE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"must be a folder that experiments.convert wrote, or the workdir of a run$"),
        ({"config": {}}, r"must be a folder that experiments.convert wrote"),
        ({"run": {}, "tokenizer_additions": 3}, r"tokenizer_additions.json cannot be read"),
        ({"run": {}, "tokenizer_additions": {}}, r"tokenizer_additions.json cannot be read"),
        ({"model": []}, r"model.json cannot be read"),
    ],
)
def test_what_is_no_folder_of_a_tokenizer_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        in_folder.read(str(folder(tmp_path, **files)))


def test_the_byte_tokenizer_has_no_file(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds no tokenizer.model; .* data.tokenizer.kind='byte'"
    ):
        base.load(config.TokenizerConfig("folder", str(tmp_path)))


def test_a_folder_under_another_kind_is_told_the_kind(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; set data.tokenizer.kind='folder'"):
        base.load(config.TokenizerConfig("sp", str(folder(tmp_path, model={}))))
