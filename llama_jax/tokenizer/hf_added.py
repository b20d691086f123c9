"""Additions to a tokenizer's model file, as Hugging Face's small files beside it tell them.

What transformers makes of the files: tokenizer.json lists added tokens with their flags;
`added_tokens_decoder` of tokenizer_config.json overrides them; added_tokens.json of older folders has names
and ids alone, and a name is special there if another file names it as one (tokenization_utils_base.py).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.tokenizer.added import Additions
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


def read(files: Mapping[str, bytes], base, vocab_size: int) -> tuple[Additions, tuple[str, ...]]:
    """The additions to the tokenizer `base`, and notes. Tokens beyond the network's vocabulary are left out.

    ValueError names a file that is not what Hugging Face writes.
    """
    whole, config, older, roles = (_object(files, name) for name in FILES)
    roles = roles | {name: config[name] for name in (*_ROLES, *_LISTS) if name in config}
    tokens: dict[int, AddedToken] = {}
    specials = _specials(roles)
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
    unknown = _name(roles.get("unk_token")) or "<unk>"
    kept = [token for token in tokens.values() if _is_new(token, base, unknown)]
    beyond = [token for token in kept if token.id >= vocab_size]
    kept = [token for token in kept if token.id < vocab_size]
    ids = base.special | {token.content: token.id for token in kept}
    own = {"bos": base.bos, "eos": base.eos, "pad": base.pad}
    found = {role: ids.get(_name(roles.get(f"{role}_token")), -1) for role in own}
    additions = Additions(
        tuple(sorted(kept, key=lambda token: token.id)),
        **{role: -1 if i == own[role] else i for role, i in found.items()},
        adds_bos=_adds_bos(whole, config),
        spaces=_spaces(whole, config),
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


def _specials(roles: dict[str, Any]) -> set[str]:
    named = [roles.get(role) for role in _ROLES]
    for name in _LISTS:
        more = roles.get(name) or []
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return {_name(role) for role in named} - {""}


def _is_new(token: AddedToken, base, unknown: str) -> bool:
    """Whether it says more than the model file. A name that only reserves an id says less."""
    if token.id < base.vocab_size and (
        _RESERVED.fullmatch(token.content) or token.content == unknown
    ):
        return False
    return base.special.get(token.content) != token.id


def _adds_bos(whole: dict[str, Any], config: dict[str, Any]) -> bool:
    """LlamaTokenizer asks its config, the class of tokenizer.json alone the post-processor there."""
    asked = config.get("add_bos_token")
    llama = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
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


def _spaces(whole: dict[str, Any], config: dict[str, Any]) -> str:
    if not whole:
        return "first" if config.get("legacy") is False else "every"
    step = whole.get("pre_tokenizer")
    steps = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    schemes = [s.get("prepend_scheme") for s in steps if s.get("type") == "Metaspace"]
    return "first" if "first" in schemes else "every"
