"""What Hugging Face's small files, carried in one of our folders, say of generating.

Each function takes the folder of the model. What is absent says nothing; ValueError on what cannot be read.
"""

from pathlib import Path
from typing import Any

from llama_jax.convert import json_file, native

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def end_ids(folder: Path) -> frozenset[int]:
    """The tokens that end a text: `eos_token_id`, a number or a list, of both files that have it."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        said = _read(folder, name).get("eos_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        for i in ids:
            if type(i) is not int:
                raise ValueError(
                    f"{_file(folder, name)}: eos_token_id={json_file.shown(said)} must be a token's "
                    "number, or a list of them"
                )
        ends |= {i for i in ids if i >= 0}
    return frozenset(ends)


def chat_template(folder: Path) -> str:
    """The template for conversations, "" if none came: where there are several, the default one."""
    file = _file(folder, "chat_template.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read ({error})") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        said = _read(folder, name).get("chat_template")
        if isinstance(said, list):
            named = [one for one in said if isinstance(one, dict) and one.get("name") == "default"]
            said = named[0].get("template") if named else None
        if said:
            if not isinstance(said, str):
                raise ValueError(
                    f"{_file(folder, name)}: chat_template={json_file.shown(said)} must be a text"
                )
            return said
    return ""


def token_names(folder: Path) -> dict[str, str]:
    """The names of "bos_token" and the like, as templates are given them; "" of one that is not used."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        said = _read(folder, file)
        for key in (key for key in _NAMES if key in said):
            name = said[key].get("content") if isinstance(said[key], dict) else said[key]
            found[key] = name if isinstance(name, str) else ""
    return found


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = _file(folder, name)
    return json_file.read(file) if file.is_file() else {}


def _file(folder: Path, name: str) -> Path:
    return folder / native.CARRIED / name
