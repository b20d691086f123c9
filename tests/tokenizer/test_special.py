import pytest

from llama_jax.tokenizer import byte


def test_specials_come_only_when_asked_for(small):
    bos, eot = small.special["<|begin_of_text|>"], small.special["<|eot_id|>"]
    text = "<|begin_of_text|>ab<|eot_id|><|no_such|>"
    assert max(small.encode(text)) < 259
    assert max(small.encode_batch([text], 1)[0]) < 259
    expected = [bos, 256, eot, *small.encode("<|no_such|>")]
    assert small.encode(text, special=True) == expected
    assert small.decode(expected) == text


def test_text_between_sentencepiece_specials_is_a_text_of_its_own(llama2):
    ids = llama2.encode("<s>Hello world</s><s> x</s><unk>", special=True)
    assert ids == [1, *llama2.encode("Hello world"), 2, 1, *llama2.encode(" x"), 2] + (
        llama2.encode("<unk>")
    )
    assert not {0, 1, 2} & set(llama2.encode("<s>Hello world</s><unk>"))


def test_every_name_gives_its_id(small, tiny):
    for tokenizer, count in ((small, 256), (tiny, 2), (byte.Byte(), 3)):
        assert len(tokenizer.special) == count
        for name, token in tokenizer.special.items():
            assert tokenizer.encode(name, special=True) == [token]
            assert token not in tokenizer.encode(name)


def test_ids_with_specials_equal_those_of_tiktoken(llama3):
    """The oracle is tiktoken's own search for specials."""
    text = "<|begin_of_text|>a<|eot_id|>\n\n<|python_tag|> b<|eot_id||><|reserved_special_token_2|>"
    ids = llama3.encode(text, special=True)
    assert ids == llama3._encoding.encode(text, allowed_special="all")
    names = ("begin_of_text", "eot_id", "python_tag", "reserved_special_token_2")
    special = [llama3.special[f"<|{name}|>"] for name in names]
    assert [i for i in ids if i >= llama3.bos] == special


@pytest.mark.parametrize("text", ["", "no names", "é" * 9000])
def test_without_names_asking_changes_nothing(small, tiny, text):
    for tokenizer in (small, tiny, byte.Byte()):
        assert tokenizer.encode(text, special=True) == tokenizer.encode(text)
