import json

import pytest

from llama_jax.convert import carried


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "huggingface").mkdir()

    def make(**files):
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / "huggingface" / name.replace("__", ".")).write_text(text)
        return tmp_path

    return make


def test_a_folder_without_them_says_nothing(tmp_path):
    assert carried.end_ids(tmp_path) == frozenset()
    assert carried.chat_template(tmp_path) == ""
    assert carried.token_names(tmp_path) == {}


def test_ends_are_those_of_both_files(folder):
    made = folder(
        generation_config__json={"eos_token_id": [4, 300]}, config__json={"eos_token_id": 2}
    )
    assert carried.end_ids(made) == {2, 4, 300}
    assert carried.end_ids(folder(config__json={"eos_token_id": None})) == {4, 300}
    assert carried.end_ids(folder(config__json={"eos_token_id": -1})) == {4, 300}


@pytest.mark.parametrize("wrong", ["</s>", [2, "x"], 2.5, True, {"a": 1}])
def test_ends_must_be_numbers(folder, wrong):
    with pytest.raises(ValueError, match=r"config.json: eos_token_id=.* must be a token's number"):
        carried.end_ids(folder(config__json={"eos_token_id": wrong}))


def test_templates_are_found_as_transformers_finds_them(folder):
    """Null is none; of several the default one; a file of its own comes first."""
    assert carried.chat_template(folder(tokenizer_config__json={"chat_template": None})) == ""
    assert carried.chat_template(folder(chat_template__json={"chat_template": "b"})) == "b"
    several = [{"name": "rag", "template": "c"}, {"name": "default", "template": "d"}]
    assert carried.chat_template(folder(tokenizer_config__json={"chat_template": several})) == "d"
    assert carried.chat_template(folder(tokenizer_config__json={"chat_template": "e"})) == "e"
    assert carried.chat_template(folder(chat_template__jinja="f")) == "f"


def test_damaged_files_are_named(folder):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template=3 must be a text"):
        carried.chat_template(folder(tokenizer_config__json={"chat_template": 3}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        carried.chat_template(folder(tokenizer_config__json="{"))


def test_names_of_tokens_come_as_texts_or_objects(folder):
    made = folder(
        special_tokens_map__json={"bos_token": "<b>", "unk_token": {"content": "<u>"}},
        tokenizer_config__json={
            "eos_token": {"content": "<e>", "lstrip": False},
            "bos_token": None,
        },
    )
    assert carried.token_names(made) == {"bos_token": "", "unk_token": "<u>", "eos_token": "<e>"}
