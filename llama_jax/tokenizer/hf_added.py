"""Additions to a tokenizer's model file, as Hugging Face's small files beside it tell them.

What transformers makes of the files: tokenizer.json lists added tokens with their flags;
`added_tokens_decoder` of tokenizer_config.json overrides them; added_tokens.json of older folders has names
and ids alone, and a name is special there if another file names it as one (tokenization_utils_base.py). A
special token that no file gives an id has its vocabulary's, else the next free one
(tokenization_utils_tokenizers.py). User-defined pieces of a SentencePiece model are added tokens, too, of
LlamaTokenizer (convert_slow_tokenizer.py).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.tokenizer.added import Additions
from llama_jax.tokenizer.sp import SPACE, SentencePiece
from llama_jax.tokenizer.special import AddedToken

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


def read(
    files: Mapping[str, bytes], base: Any, vocab_size: int
) -> tuple[Additions, tuple[str, ...]]:
    """The additions to the tokenizer `base`, and notes. Tokens beyond the network's vocabulary are left out.

    ValueError names a file that is not what Hugging Face writes.
    """
    whole, config, older, roles = (_object(files, name) for name in FILES)
    roles = roles | {name: config[name] for name in (*_ROLES, *_LISTS) if name in config}
    tokens: dict[int, AddedToken] = {}
    specials = _specials(roles)  # with their flags
    for name, i in older.items():
        special = name in specials
        tokens |= _token(
            i, {"content": name, "special": special, "normalized": not special}, FILES[2]
        )
    for entry in _shaped(whole.get("added_tokens") or [], list, FILES[0], "added_tokens"):
        entry = _shaped(entry, dict, FILES[0], "added_tokens")
        tokens |= _token(entry.get("id"), entry, FILES[0])
    decoder = config.get("added_tokens_decoder") or {}
    for i, entry in _shaped(decoder, dict, FILES[1], "added_tokens_decoder").items():
        tokens |= _token(i, _shaped(entry, dict, FILES[1], "added_tokens_decoder"), FILES[1])
    pieces = _pieces(base, tokens, whole, config)
    tokens |= pieces
    ids = {token.content: token.id for token in tokens.values()}
    for name, flags in specials.items():
        if name not in ids:
            i = base.id_of(name)
            free = max([base.vocab_size - 1, *tokens]) + 1
            ids[name] = free if i < 0 or i in tokens else i
            tokens |= _token(ids[name], {**flags, "content": name, "special": True}, FILES[1])
    unknown = _name(roles.get("unk_token")) or "<unk>"
    new = [
        token for token in tokens.values() if token.id in pieces or _is_new(token, base, unknown)
    ]
    beyond = [token for token in new if token.id >= vocab_size]
    own = {"bos": base.bos, "eos": base.eos, "pad": base.pad}
    found = {role: ids.get(_name(roles.get(f"{role}_token")), -1) for role in own}
    additions = Additions(
        tuple(sorted((t for t in new if t.id < vocab_size), key=lambda token: token.id)),
        **{
            role: -1 if i in (own[role], *(t.id for t in beyond)) else i
            for role, i in found.items()
        },
        adds_bos=_adds_bos(whole, config),
        spaces=_spaces(whole, config, whole_texts=bool(pieces)),
    )
    note = (
        f"added tokens beyond the vocabulary of {vocab_size} are left out: "
        f"{', '.join(f'{token.content!r} ({token.id})' for token in beyond[:4])}"
    )
    return additions, (note,) if beyond else ()


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}); mend it or take it away") from error
    return _shaped(found, dict, name, "it")


def _shaped(value: Any, kind: type, file: str, what: str) -> Any:
    if not isinstance(value, kind):
        wanted = "a list of objects" if kind is list else "an object"
        raise ValueError(f"{file}: {what} must be {wanted}, as transformers writes it")
    return value


def _token(i: Any, entry: dict[str, Any], file: str) -> dict[int, AddedToken]:
    """By its id. `added_tokens_decoder` has ids as text."""
    flags = {name: entry.get(name) is True for name in _FLAGS}
    try:
        token = AddedToken(int(i), entry["content"], **flags)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{file}: an added token must have a content and an id of 0 or more; {str(i)[:40]!r} has "
            f"{str(entry.get('content'))[:40]!r}"
        ) from error
    return {token.id: token}


def _name(role: Any) -> str:
    """ "<s>" and {"content": "<s>", ...} are both written."""
    name = role.get("content") if isinstance(role, dict) else role
    return name if isinstance(name, str) else ""


def _specials(roles: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> flags of the special tokens, in the order in which transformers gives them ids."""
    named = [roles.get(role) for role in _ROLES]
    for name in _LISTS:
        more = roles.get(name) or []
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    flags = {_name(role): role if isinstance(role, dict) else {} for role in named}
    return {name: flags[name] for name in flags if name}


def _pieces(
    base, tokens: dict[int, AddedToken], whole: dict[str, Any], config: dict[str, Any]
) -> dict[int, AddedToken]:
    """User-defined pieces of a SentencePiece model that transformers takes for added tokens, by id.

    Those that tokenizer.json lists; without one LlamaTokenizer takes all. They stay in any text, also where
    a file calls them special. A piece with a space in it is left to SentencePiece.
    """
    if not isinstance(base, SentencePiece) or not (whole or _is_llama(config)):
        return {}
    names = {i: name for name, i in base.special.items() if i in base.user_defined}
    found = {i: tokens.get(i, AddedToken(i, name)) for i, name in names.items()}
    return {
        i: dataclasses.replace(token, special=False)
        for i, token in found.items()
        if SPACE not in token.content and (i in tokens or not whole)
    }


def _is_new(token: AddedToken, base, unknown: str) -> bool:
    """Whether it says more than the model file. A name that only reserves an id says less."""
    if token.id < base.vocab_size and (
        _RESERVED.fullmatch(token.content) or token.content == unknown
    ):
        return False
    return base.special.get(token.content) != token.id


def _is_llama(config: dict[str, Any]) -> bool:
    return str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")


def _adds_bos(whole: dict[str, Any], config: dict[str, Any]) -> bool:
    """LlamaTokenizer asks its config, the class of tokenizer.json alone the post-processor there."""
    asked = config.get("add_bos_token")
    llama = _is_llama(config)
    if isinstance(asked, bool) and (llama or not whole):
        return asked
    if "bos_token" in config and config["bos_token"] is None:
        return False
    if not whole or llama:
        return True
    steps = whole.get("post_processor") or {}
    for step in steps.get("processors", [steps]) if isinstance(steps, dict) else ():
        template = step.get("single") if isinstance(step, dict) else None
        if isinstance(template, list) and template:
            return "SpecialToken" in template[0]
    return False


def _spaces(whole: dict[str, Any], config: dict[str, Any], whole_texts: bool) -> str:
    """whole_texts: SentencePiece itself finds the added tokens in a text, and goes on behind each."""
    if not whole:
        legacy = config.get("legacy")  # transformers 4 takes an absent one for true, 5 for false
        return "first" if legacy is False or (legacy is not True and whole_texts) else "every"
    step = whole.get("pre_tokenizer")
    steps = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    schemes = [s.get("prepend_scheme") for s in steps if s.get("type") == "Metaspace"]
    return "first" if "first" in schemes else "every"
