"""Tokenizer files as Hugging Face's `tokenizers` and `transformers` read them, and Llama 3's back.

The layout of tokenizer.json is that of the `tokenizers` library (model, normalizer, pre_tokenizer,
post_processor, decoder, added_tokens); its settings here are those of the files published with
meta-llama/Llama-2-7b-hf and meta-llama/Llama-3.1-8B, which begin every text with the begin token.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping

from llama_jax.tokenizer import bpe, hf_json
from llama_jax.tokenizer.added import NONE, Additions
from llama_jax.tokenizer.alphabet import BYTES, CHARS
from llama_jax.tokenizer.sp import SPACE, messages
from llama_jax.tokenizer.special import AddedToken

# Hugging Face's published names of the 256 specials. Ids are Meta's; Meta calls id 128005 <|step_id|>
# where Hugging Face has another reserved name, so that later reserved names differ by one.
SPECIALS = (
    *bpe.NAMED[: bpe.NAMED.index("<|step_id|>")],
    "<|reserved_special_token_2|>",
    *bpe.NAMED[bpe.NAMED.index("<|step_id|>") + 1 :],
    *(f"<|reserved_special_token_{3 + i}|>" for i in range(256 - len(bpe.NAMED))),
)


def hf_files(kind: str, content: bytes, additions: Additions = NONE) -> dict[str, bytes]:
    """Name -> content of the tokenizer files of an export directory.

    `kind` is that of the config, "sp", "bpe" or "json"; `content` the SentencePiece model, the ranks or the
    tokenizer.json; `additions` what the checkpoint adds to it.
    The class is PreTrainedTokenizerFast: it takes tokenizer.json as it is, in transformers 4 and 5.
    LlamaTokenizer of transformers 5 rebuilds it, and then drops the first of two leading spaces.
    """
    makers = {"sp": sp_to_hf_json, "bpe": ranks_to_hf_json, "json": _with_additions}
    if kind not in makers:
        raise ValueError(f"data.tokenizer.kind={kind!r} has no Hugging Face form; the others have")
    tokenizer = makers[kind](content, additions)
    names = {i: name for name, i in tokenizer["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    bos, eos = _ends(kind, content)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names.get(bos if additions.bos < 0 else additions.bos),
        "eos_token": names.get(eos if additions.eos < 0 else additions.eos),
        **({"pad_token": names[additions.pad]} if additions.pad >= 0 else {}),
        "unk_token": tokenizer["model"].get("unk_token"),
        "clean_up_tokenization_spaces": False,  # transformers 4 takes spaces from text otherwise
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {"tokenizer.json": _dump(tokenizer), "tokenizer_config.json": _dump(config)}
    return files | {"tokenizer.model": content} if kind == "sp" else files


def ranks_to_hf_json(content: bytes, additions: Additions = NONE) -> dict:
    """Tiktoken ranks (lines `base64 rank`) as a tokenizer.json with the same ids."""
    ranks = bpe.parse(content, "ranks")
    spelt = {token: _spell(token) for token in ranks}
    pairs = (pair for token in ranks for pair in sorted(_splits(token, ranks)))
    split = {"type": "Split", "pattern": {"Regex": bpe.PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    own = [AddedToken(len(ranks) + i, name) for i, name in enumerate(SPECIALS)]
    return _document(
        own,
        additions,
        bos=len(ranks),
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        decoder=byte_level | {"use_regex": True},
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelt[token]: rank for token, rank in ranks.items()},
            "merges": [f"{spelt[left]} {spelt[right]}" for _, _, left, right in pairs],
        },
    )


def hf_json_to_ranks(content: str | bytes) -> bytes:
    """The tiktoken ranks in a Llama 3 tokenizer.json. ValueError where it is another tokenizer."""
    try:
        return _ranks(json.loads(content))
    except (
        *(json.JSONDecodeError, UnicodeDecodeError, RecursionError),
        *(KeyError, TypeError, AttributeError),  # of another shape than is looked for
    ) as error:
        raise ValueError(
            f"tokenizer.json is not a BPE tokenizer of Hugging Face: {error}"
        ) from error


def sp_to_hf_json(content: bytes, additions: Additions = NONE) -> dict:
    """A SentencePiece model with LLaMA's settings as a tokenizer.json with the same ids.

    User-defined pieces are added tokens. Where the additions do not list them, or where additions.spaces is
    "first", the space before a text is Metaspace's: a text that begins with a space or with such a piece does
    not get it.

    Two splits of one piece that overlap in the text ("ab|a" and "a|ba" in "abaaba"'s middle) are
    merged from the left by SentencePiece and in the order of `merges` here, the longer left part
    first: 10,000 random strings hold no such text for LLaMA's pieces.
    """
    proto = messages()

    model = _parsed(content)
    _check_model(model, proto)
    kinds = proto.ModelProto.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {p.piece: p.score for p in model.pieces if p.type == kinds.NORMAL}
    order = sorted(scores, key=lambda name: (-scores[name], vocab[name]))
    pairs = (pair for name in order for pair in _splits(name, scores)[::-1])
    named = {kinds.UNKNOWN: True, kinds.CONTROL: True, kinds.USER_DEFINED: False}
    own = [
        AddedToken(i, piece.piece, special=named[piece.type])
        for i, piece in enumerate(model.pieces)
        if piece.type in named
    ]
    trainer = model.trainer_spec
    listed = {token.id for token in additions.tokens}
    found_whole = not all(token.special or token.id in listed for token in own)
    first_alone = additions.spaces == "first" or found_whole
    prepended = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first"}
    return _document(
        own,
        additions,
        bos=trainer.bos_id,
        normalizer=None if first_alone else prepended,
        pre_tokenizer=metaspace | {"split": False} if first_alone else None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        model={
            "unk_token": model.pieces[trainer.unk_id].piece,
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for _, _, left, right in pairs],
        },
    )


def _ranks(document: dict) -> bytes:
    model, added = document["model"], document["added_tokens"]
    vocab, merges = model["vocab"], model["merges"]
    pre_tokenizer = document["pre_tokenizer"]
    _check_kind(document, model, pre_tokenizer)
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(vocab))):
        raise ValueError(
            f"tokenizer.json: the ids of model.vocab ({len(vocab)}) must be 0..{len(vocab) - 1}"
        )
    _check_specials(added, len(vocab))
    _check_merges(merges, vocab)
    try:
        raw = [bytes(BYTES[char] for char in token) for token in tokens]
    except KeyError as error:
        raise ValueError(
            f"tokenizer.json: character {error} in model.vocab is outside of the byte alphabet"
        ) from error
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(raw))
    bpe.parse(lines, "tokenizer.json")
    return lines


def _with_additions(content: bytes, additions: Additions) -> dict:
    """A tokenizer.json with the added tokens that came beside it."""
    document = json.loads(content)
    taken = {token.id for token in additions.tokens}
    kept = [token for token in document.get("added_tokens") or [] if token["id"] not in taken]
    added = [*kept, *map(dataclasses.asdict, additions.tokens)]
    return document | {"added_tokens": sorted(added, key=lambda token: token["id"])}


def _ends(kind: str, content: bytes) -> tuple[int, int]:
    """Ids of bos and eos in a model file, -1 if it does not tell them."""
    if kind == "json":
        tokenizer = hf_json.Json(content)
        return tokenizer.bos, tokenizer.eos
    if kind == "sp":
        trainer = _parsed(content).trainer_spec
        return trainer.bos_id, trainer.eos_id
    first = len(bpe.parse(content, "ranks"))
    return first, first + 1


def _parsed(content: bytes):
    from google.protobuf.message import DecodeError

    proto = messages()

    model = proto.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model ({len(content)} bytes): {error}") from error
    return model


def _document(
    own: list[AddedToken], additions: Additions, bos: int, normalizer, pre_tokenizer, decoder, model
) -> dict:
    """own, bos: the model file's, to which the additions come."""
    by_id = {token.id: token for token in (*own, *additions.tokens)}
    added = [by_id[i] for i in sorted(by_id)]
    behind = [token for token in added if token.content not in model["vocab"]]
    first = len(model["vocab"])
    if [token.id for token in behind] != list(range(first, first + len(behind))):
        # `tokenizers` numbers added tokens itself, without gaps, unless the vocabulary has their ids.
        model = model | {"vocab": model["vocab"] | {token.content: token.id for token in behind}}
    bos = bos if additions.bos < 0 else additions.bos
    names = {i: name for name, i in model["vocab"].items()}
    names |= {token.id: token.content for token in added}
    bpe_model = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dataclasses.asdict(token) for token in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _begin(names[bos], bos) if additions.adds_bos else None,
        "decoder": decoder,
        "model": bpe_model | model,
    }


def _begin(name: str, i: int) -> dict:
    """Puts the begin token before a text, and before each of a pair."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": s, "type_id": n}} for n, s in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }


def _splits(token, known: Mapping) -> list[tuple]:
    """Every way to make a token of two known ones: (value of left, of right, left, right)."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return [(known[a], known[b], a, b) for a, b in cuts if a in known and b in known]


def _check_kind(document: dict, model: dict, pre_tokenizer) -> None:
    if model.get("type") != "BPE" or model.get("byte_fallback") or not pre_tokenizer:
        raise ValueError(
            f"tokenizer.json: model.type={model.get('type')!r} with byte_fallback="
            f"{model.get('byte_fallback')} is no byte-level BPE; for SentencePiece's use the "
            "tokenizer.model beside it"
        )
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if patterns != [bpe.PATTERN] or "ByteLevel" not in [step["type"] for step in steps]:
        raise ValueError(
            f"tokenizer.json: pre_tokenizer splits by {patterns}, Llama 3 by {bpe.PATTERN!r} and "
            "then to bytes; it is another model's"
        )
    if document["normalizer"] or any(step.get("add_prefix_space") for step in steps):
        raise ValueError(
            "tokenizer.json: it changes the text before it splits it; Llama 3's does not"
        )
    if not model.get("ignore_merges"):
        raise ValueError("tokenizer.json: model.ignore_merges must be true, as Llama 3 has it")


def _check_specials(added: list[dict], first: int) -> None:
    """Derivatives rename Llama 3's, and add more behind them."""
    missing = set(range(first, first + len(SPECIALS))) - {token["id"] for token in added}
    if missing:
        raise ValueError(
            f"tokenizer.json: none of its {len(added)} added tokens has id {min(missing)}; Llama 3 has "
            f"{len(SPECIALS)} from id {first}"
        )


def _check_merges(merges: list, vocab: dict[str, int]) -> None:
    """Merges in the order of the ids they give: then the lowest id first is the same rule."""
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges
    ]
    made = [vocab.get("".join(pair), -1) for pair in pairs]
    if -1 in made or made != sorted(made):
        raise ValueError(
            "tokenizer.json: model.merges must give tokens of model.vocab in the order of their "
            "ids, else ranks cannot say the same"
        )


def _check_model(model, proto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = proto.ModelProto.SentencePiece
    odd = [
        p.piece
        for p in model.pieces
        if p.type == kinds.UNUSED or (p.type == kinds.USER_DEFINED and SPACE in p.piece)
    ]
    rules = {
        f"model_type={proto.TrainerSpec.ModelType.Name(trainer.model_type)} must be BPE": (
            trainer.model_type == proto.TrainerSpec.BPE
        ),
        f"normalizer {normalizer.name!r} must be 'identity'": not normalizer.precompiled_charsmap,
        "add_dummy_prefix=False must be true": normalizer.add_dummy_prefix,
        "escape_whitespaces=False must be true": normalizer.escape_whitespaces,
        "remove_extra_whitespaces=True must be false": not normalizer.remove_extra_whitespaces,
        f"pieces {odd[:3]} must be neither unused nor user-defined with a space": not odd,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(
                f"SentencePiece model: {rule} for a tokenizer.json with the same ids; export with "
                "--format=native, or give a tokenizer.json with --tokenizer=FILE"
            )


def _spell(token: bytes) -> str:
    return "".join(CHARS[byte] for byte in token)


def _dump(document: dict) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
