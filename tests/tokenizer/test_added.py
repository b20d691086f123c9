"""Added tokens against Hugging Face's `tokenizers`, which reads the same tokens and flags."""

import base64
import dataclasses
import json

import pytest

from llama_jax.tokenizer import byte, hf, hf_added
from llama_jax.tokenizer.added import Additions, Extended
from llama_jax.tokenizer.special import AddedToken
from llama_jax.tokenizer.stream import Stream

# Behind a vocabulary of 300 pieces: a special one, and others that texts hold.
TOKENS = (
    AddedToken(300, "<|im_end|>"),
    AddedToken(301, "<think>", special=False),
    AddedToken(302, "<think>er", special=False),
    AddedToken(303, "[A]", special=False, lstrip=True, rstrip=True),
    AddedToken(304, "rope", special=False, single_word=True),
)
TEXTS = (
    "rope <think> norm<think>er gate", "<think><think>x", " [A]  llama [A]\n", "europe rope, rope",
    "", " ", "a<|im_end|>b", "<think> ", "日<think>é",
)  # fmt: skip


def theirs(ours, additions: Additions, metaspace: bool):
    """The same tokenizer in `tokenizers`."""
    library = pytest.importorskip("tokenizers")
    document = hf.sp_to_hf_json(ours._processor.serialized_model_proto())
    document["added_tokens"] += [dataclasses.asdict(token) for token in additions.tokens]
    if metaspace:
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
    tokenizer = library.Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = True  # their names are text, as here
    return tokenizer


@pytest.mark.parametrize("spaces", ["every", "first"])
def test_added_tokens_are_found_as_hugging_face_finds_them(tiny, spaces):
    additions = Additions(TOKENS, spaces=spaces)
    ours, library = Extended(tiny, additions), theirs(tiny, additions, spaces == "first")
    # Metaspace drops the first of two spaces that begin a text; SentencePiece does not.
    texts = TEXTS if spaces == "every" else [text for text in TEXTS if text != " "]
    for text in texts:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text
        assert ours.encode_batch([text], 1)[0].tolist() == expected, text
    library.encode_special_tokens = False
    for text in texts:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == expected, text


def test_a_normalised_added_token_takes_the_space_before_it(tiny):
    tokens = [dataclasses.replace(token, normalized=not token.special) for token in TOKENS[:2]]
    additions = Additions(tuple(tokens))
    ours, library = Extended(tiny, additions), theirs(tiny, additions, False)
    for text in (*TEXTS, "a <think> b", "a<think> b"):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text


def test_ids_decode_as_in_hugging_face_and_come_in_a_stream(tiny):
    additions = Additions(TOKENS)
    ours, library = Extended(tiny, additions), theirs(tiny, additions, False)
    b = tiny.encode("é")[-1]
    for ids in (
        [i for text in TEXTS for i in ours.encode(text)], [301, *tiny.encode("rope norm")],
        [999, *tiny.encode("rope"), 999], [*tiny.encode("rope"), 300, *tiny.encode("rope")],
        [300, *tiny.encode("rope")], [*tiny.encode("日")[:-1], 301, b, b],
    ):  # fmt: skip
        expected = library.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected
        stream = Stream(ours)
        assert "".join([*map(stream.feed, ids), stream.finish()]) == expected


def test_ids_without_a_token_decode_to_nothing(tiny, small):
    """As padding rows of a vocabulary: `tokenizers` decodes [97, 9999, 98] to 'ab'."""
    for tokenizer in (tiny, small, byte.Byte(), Extended(small, Additions(bos=1))):
        ids = tokenizer.encode("ab cd")
        assert tokenizer.decode([99_999, *ids, 99_999]) == "ab cd"
        assert tokenizer.token_bytes(99_999) == b""
        stream = Stream(tokenizer)
        fed = [*ids[:2], 99_999, *ids[2:], 99_999]
        assert "".join([*map(stream.feed, fed), stream.finish()]) == "ab cd"


def test_renamed_reserved_tokens_have_their_new_names_alone(small):
    """As Hermes 3 renames two of Llama 3's: the id is Meta's, the name is not."""
    eot = small.special["<|reserved_special_token_2|>"]
    ours = Extended(small, Additions((AddedToken(eot, "<|im_end|>"),), eos=eot))
    assert ours.special["<|im_end|>"] == ours.eos == eot
    assert "<|reserved_special_token_2|>" not in ours.special
    assert (len(ours.special), ours.vocab_size) == (256, small.vocab_size)
    assert ours.encode("ab<|im_end|>", special=True) == [256, eot]
    assert eot not in ours.encode("ab<|im_end|>")
    assert ours.decode([256, eot]) == "ab<|im_end|>"  # as Llama 3's specials read
    assert ours.fingerprint == small.fingerprint  # texts have the same ids


def test_begin_is_prefixed_only_where_the_checkpoint_does(tiny):
    assert tiny.prefix == (tiny.bos,)
    assert Extended(tiny, Additions(bos=7)).prefix == (7,)
    assert Extended(tiny, Additions(adds_bos=False)).prefix == ()


def test_an_added_token_that_texts_hold_changes_the_fingerprint(tiny):
    assert Extended(tiny, Additions(TOKENS[:1])).fingerprint == tiny.fingerprint
    assert Extended(tiny, Additions(TOKENS[:2])).fingerprint != tiny.fingerprint


def test_user_defined_pieces_have_names_and_stay_in_texts(user_defined):
    tokenizer = user_defined
    token = tokenizer.special["<|im_end|>"]
    assert tokenizer.user_defined == {tokenizer.special["<|im_start|>"], token}
    assert token in tokenizer.encode("rope<|im_end|>")
    text = "rope<|im_end|>norm"
    assert tokenizer.encode(text, special=True) == tokenizer.encode(text)


def test_additions_leave_for_hugging_face_and_come_back(tiny, small, tmp_path):
    """What is written gives transformers our ids, and us what was written; a gap between ids included."""
    transformers = pytest.importorskip("transformers")
    model = tiny._processor.serialized_model_proto()
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(small.token_bytes(i)), i) for i in range(259))
    renamed = AddedToken(269, "<|im_start|>")
    for kind, content, base, additions in (
        ("sp", model, tiny, Additions(TOKENS[:2], eos=300, pad=301, spaces="first")),
        (
            "sp",
            model,
            tiny,
            Additions((AddedToken(303, "<x>"), AddedToken(301, "<y>")), adds_bos=False),
        ),
        ("bpe", ranks, small, Additions((renamed, AddedToken(515, "<|im_end|>")), eos=515)),
    ):
        files = hf.hf_files(kind, content, additions)
        for name, text in files.items():
            (tmp_path / name).write_bytes(text)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = Extended(base, additions)
        text = "".join(f"rope{token.content} ab" for token in additions.tokens)
        assert theirs(text)["input_ids"] == [*ours.prefix, *ours.encode(text, special=True)]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
        assert theirs.pad_token_id == (additions.pad if additions.pad >= 0 else None)
        back, _ = hf_added.read(files, base, 600)
        ordered = tuple(sorted(additions.tokens, key=lambda token: token.id))
        assert back == dataclasses.replace(additions, tokens=ordered)


def test_user_defined_pieces_leave_for_hugging_face(user_defined):
    """As of Yi: transformers' own converter makes them added tokens that are not normalised, too."""
    library = pytest.importorskip("tokenizers")
    files = hf.hf_files("sp", user_defined._processor.serialized_model_proto())
    theirs = library.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("rope<|im_end|>norm", "rope <|im_end|> rope", "a<|im_end|><|im_end|> b"):
        expected = [user_defined.bos, *user_defined.encode(text)]
        assert theirs.encode(text).ids == expected, text
        assert theirs.decode(expected) == user_defined.decode(expected)
