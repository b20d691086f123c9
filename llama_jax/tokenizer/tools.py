"""A model's calls of tools, as it writes them: from text and to text.

Forms: Meta's prompt format pages for Llama 3.1 (built-in tools, Python code, JSON, <function=...>)
and 3.2 (a list in Python's notation), and Hugging Face's chat templates for the same models.
Nothing that a model writes is ever run: values are literals.
"""

import ast
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.tokenizer.chat import Call, Message

INTERPRETER = "code_interpreter"  # the built-in tool whose call is bare Python code
# What the parsers of json and ast raise on text that is neither, or nested too deeply for them.
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclasses.dataclass(frozen=True)
class ToolCallForm:
    write: Callable[[Sequence[Call]], str]
    python: bool  # behind <|python_tag|>
    end: str  # "eom" waits for the result


def message(calls: Sequence[Call], form: str) -> Message:
    """The assistant's message that makes these calls. Only "list" holds more than one.

    With built-in tools at hand, Hugging Face's templates end "json" with "eom" too.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {tuple(FORMS)}")
    if not calls or (len(calls) > 1 and form != "list"):
        raise ValueError(f"{len(calls)} calls in form {form!r}: it holds one; 'list' holds several")
    chosen = FORMS[form]
    return Message("assistant", chosen.write(calls), chosen.python, chosen.end)


def result(value: Any) -> Message:
    """What a tool gave, as JSON, for the model to read."""
    return Message("ipython", json.dumps(value, ensure_ascii=False))


def parse(answer: Message) -> tuple[Call, ...]:
    """The calls that an assistant's message makes in any form; () if it is just text.

    Behind <|python_tag|> all that is no other form is code for the interpreter.
    """
    text = answer.content.strip()
    for read in (_read_json, _read_function, _read_list, _read_builtin):
        if calls := read(text):
            return calls
    return (Call(INTERPRETER, {"code": answer.content}),) if answer.python else ()


def _write_builtin(calls: Sequence[Call]) -> str:
    return f"{_identifier(calls[0].name)}.call({_keywords(calls[0], _double_quoted)})"


def _write_code(calls: Sequence[Call]) -> str:
    if calls[0].name != INTERPRETER or list(calls[0].arguments) != ["code"]:
        raise ValueError(
            f"calls[0]={calls[0].name}({', '.join(calls[0].arguments)}): form 'code' is "
            f"{INTERPRETER}(code)"
        )
    return calls[0].arguments["code"]


def _write_json(calls: Sequence[Call]) -> str:
    call = {"name": calls[0].name, "parameters": calls[0].arguments}
    return json.dumps(call, ensure_ascii=False)


def _write_function(calls: Sequence[Call]) -> str:
    if not re.fullmatch(r"[^<>\n]+", calls[0].name):
        raise ValueError(f"calls[0].name={calls[0].name!r} must be free of '<', '>' and newlines")
    arguments = json.dumps(calls[0].arguments, ensure_ascii=False)
    return f"<function={calls[0].name}>{arguments}</function>"


def _write_list(calls: Sequence[Call]) -> str:
    return f"[{', '.join(f'{_identifier(c.name)}({_keywords(c, repr)})' for c in calls)}]"


def _identifier(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"name {name!r} of a tool or argument must be a Python name; use 'json'")
    return name


def _keywords(call: Call, literal: Callable[[object], str]) -> str:
    return ", ".join(f"{_identifier(key)}={literal(v)}" for key, v in call.arguments.items())


def _double_quoted(value) -> str:
    """Python's literal, strings in double quotes as Meta has them; quotes inside are escaped."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _read_json(text: str) -> tuple[Call, ...]:
    try:
        call = json.loads(text)
    except _UNREADABLE:
        return ()
    if not isinstance(call, dict) or call.pop("type", "function") != "function":
        return ()
    if set(call) != {"name", "parameters"} or not isinstance(call["name"], str):
        return ()
    return (Call(call["name"], call["parameters"]),) if isinstance(call["parameters"], dict) else ()


def _read_function(text: str) -> tuple[Call, ...]:
    form = re.fullmatch(r"<function=([^<>\n]+)>(.*)</function>", text, re.DOTALL)
    if not form:
        return ()
    try:
        arguments = json.loads(form[2])
    except _UNREADABLE:
        return ()
    return (Call(form[1], arguments),) if isinstance(arguments, dict) else ()


def _read_list(text: str) -> tuple[Call, ...]:
    tree = _expression(text) if text.startswith("[") else None
    if not isinstance(tree, ast.List):
        return ()
    calls = [call for node in tree.elts if (call := _call(node))]
    return tuple(calls) if len(calls) == len(tree.elts) else ()


def _read_builtin(text: str) -> tuple[Call, ...]:
    """`tool.call(query="...")`."""
    tree = _expression(text) if ".call(" in text else None
    call = _call(tree)
    if call is None or not call.name.endswith(".call"):
        return ()
    return (Call(call.name.removesuffix(".call"), call.arguments),)


def _expression(text: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a model's string is no concern of the user
            return ast.parse(text, mode="eval").body
    except _UNREADABLE:
        return None


def _call(node: ast.expr | None) -> Call | None:
    """`name(key=literal, ...)`; None for anything else: unnamed arguments, names as values."""
    if not isinstance(node, ast.Call) or node.args or not _dotted(node.func):
        return None
    try:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (*_UNREADABLE, TypeError):
        return None
    return None if None in arguments else Call(_dotted(node.func), arguments)


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a plain name and attributes, "" for other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


FORMS = {
    "builtin": ToolCallForm(_write_builtin, python=True, end="eom"),
    "code": ToolCallForm(_write_code, python=True, end="eom"),
    "json": ToolCallForm(_write_json, python=False, end="eot"),
    "function": ToolCallForm(_write_function, python=False, end="eot"),
    "list": ToolCallForm(_write_list, python=False, end="eot"),
}
