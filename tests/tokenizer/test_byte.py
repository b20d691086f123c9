from llama_jax import config
from llama_jax.tokenizer import base

TEXT = "A line.\n\tnaïve 日本語 🙂\r\n"


def test_ids_are_the_bytes_of_utf8():
    tokenizer = base.load(config.TokenizerConfig("byte"))
    assert tokenizer.encode(TEXT) == list(TEXT.encode("utf-8"))
    batch = tokenizer.encode_batch([TEXT, "", "b"], 2)
    assert [ids.tolist() for ids in batch] == [list(TEXT.encode()), [], [98]]
    assert {ids.dtype.name for ids in batch} == {"int32"}


def test_specials_follow_the_bytes_and_decode_to_nothing():
    tokenizer = base.load(config.TokenizerConfig("byte"))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (
        259,
        256,
        257,
        258,
    )
    assert tokenizer.decode([256, *TEXT.encode(), 257, 258]) == TEXT


def test_half_a_character_decodes_to_a_replacement():
    assert base.load(config.TokenizerConfig("byte")).decode(list("é".encode())[:1]) == "\ufffd"
