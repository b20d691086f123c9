"""Conversations as JSON has them, in the form of OpenAI's API that most data sets and tools write.

A message is {"role": ..., "content": ...}; content is a text, or parts {"type": "text", "text": ...}, which
are joined by newlines; the assistant's may be null beside "tool_calls". Role "developer" is read as
"system". What is not known here is refused: dropped, the model would be asked something else.
"""

import contextlib
import json
from typing import Any

from llama_jax.tokenizer.chat import Call, Message

KEYS = ("role", "content", "tool_calls", "tool_call_id", "name")


def read(value: Any) -> list[Message]:
    """ValueError names the message and the key that is not of this form."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages={_short(value)} must be a list of at least one message")
    return [_message(one, f"messages[{i}]") for i, one in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(
            f'{place}={_short(value)} must be an object, as {{"role": "user", "content": ...}}'
        )
    said = {key: part for key, part in value.items() if part not in (None, [], {}, "")}
    for key in said:
        if key not in KEYS:
            raise ValueError(
                f"{place}.{key}={_short(said[key])} is not known here and would be lost; a message has "
                f"{', '.join(KEYS)}"
            )
    role, name, call_id = (_text(said.get(key, ""), f"{place}.{key}") for key in _NAMES)
    if not role:
        raise ValueError(f"{place} has no role; it must be a text, as 'user'")
    calls = said.get("tool_calls", [])
    if calls and role != "assistant":
        raise ValueError(f"{place}.tool_calls: only the assistant calls tools, not role {role!r}")
    if not isinstance(calls, list):
        raise ValueError(f"{place}.tool_calls={_short(calls)} must be a list")
    if value.get("content") is None and not calls:
        raise ValueError(f"{place} of role {role!r} has no content; it must be a text")
    return Message(
        "system" if role == "developer" else role,
        _content(said.get("content", ""), f"{place}.content"),
        calls=tuple(_call(one, f"{place}.tool_calls[{i}]") for i, one in enumerate(calls)),
        name=name,
        call_id=call_id,
    )


_NAMES = ("role", "name", "tool_call_id")


def _content(value: Any, place: str) -> str:
    if not isinstance(value, list):
        return _text(value, place)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise ValueError(
                f'{place}[{i}]={_short(part)} must be {{"type": "text", "text": ...}}: only text is read'
            )
        texts.append(_text(part.get("text"), f"{place}[{i}].text"))
    return "\n".join(texts)


def _call(value: Any, place: str) -> Call:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{place}={_short(value)} must be {{"function": {{"name": ..., "arguments": ...}}}}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI has JSON in a text, Hugging Face an object
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: arguments={_short(arguments)} must be a JSON object")
    return Call(function["name"], arguments)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}={_short(value)} must be a text")
    return value


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
