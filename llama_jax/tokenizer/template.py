"""A checkpoint's own chat template (Jinja, as transformers has them), from messages to token ids.

Templates are programs that came with weights from anywhere: they run in Jinja's sandbox, on plain data.
What a message holds stays text, whatever it spells; special tokens are those that the template writes.
The extra `chat` installs Jinja; `load` says so where it is not there.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.tokenizer.base import Tokenizer
from llama_jax.tokenizer.chat import Message

# Code points that Unicode leaves to programs, for no text to hold.
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class NoJinja(Exception):
    """Jinja is not installed, or too old a version of it."""


class Template:
    """One template, for one tokenizer."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        names: Mapping[str, str],
        today: datetime.date,
        settings: Mapping[str, Any],
    ):
        """names: "bos_token" and the like -> the token's name. today: for templates that ask for it.

        settings: what else the template is given. NoJinja, or ValueError if it is no template.
        """
        self.asks_for_date = False
        self._tokenizer, self._given = tokenizer, {**names, **settings}
        special, in_text = tokenizer.special, tokenizer.user_defined
        # Names that users' texts must not spell. Others that any text becomes stay what they are there.
        marks = [name for name, i in special.items() if i not in in_text or name in source]
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))

        def strftime_now(form: str) -> str:
            self.asks_for_date = True
            return today.strftime(form)

        self._template = _compiled(source, strftime_now)

    def ids(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
        """Up to where the model goes on: its answer begins, or it continues the last message, its own.

        ValueError, with the template's reason, where it does not take the messages.
        """
        plain = [_plain(message) for message in messages]
        texts = json.dumps([plain, list(tools)], ensure_ascii=False)
        free = [char for char in _NONCHARACTERS if char not in texts]
        if len(free) < 2:
            raise ValueError(
                "messages hold all of the noncharacters U+FDD0 to U+FDEF; take one out"
            )
        guard, end = free[:2]
        shield = lambda found: found[0][0] + guard + found[0][1:]  # noqa: E731
        plain, tools = _mapped([plain, list(tools)], lambda text: self._marks.sub(shield, text))
        is_open = messages[-1].role == "assistant" and not messages[-1].calls
        if is_open:
            plain[-1]["content"] += end + " "
        text = self._rendered(plain, tools, not is_open)
        for place, name in _named(messages, tools):
            if name not in text.replace(guard, ""):
                raise ValueError(f"{place} {name!r} is left out by the checkpoint's chat template")
        if is_open:
            before, is_there, after = text.rpartition(end)
            if not is_there:
                raise ValueError(
                    "the last message is the assistant's, and the checkpoint's chat template leaves it out"
                )
            # Where the template takes outer white space away it has taken ours.
            text = before if after.startswith(" ") else before.rstrip()
        return self._encoded(text, guard)

    def ends(self) -> frozenset[int]:
        """The token, if it is one, that the template writes behind an answer."""
        asked = [Message("user", "a"), Message("assistant", "b")]
        mark = _NONCHARACTERS[0]
        plain = [_plain(message) for message in asked]
        plain[1]["content"] = mark
        try:
            _, _, behind = self._rendered(plain, [], False).rpartition(mark)
        except ValueError:
            return frozenset()
        found = self._marks.match(behind.lstrip())
        return frozenset({self._tokenizer.special[found[0]]} if found else ())

    def _rendered(self, messages: list[dict], tools: Sequence[dict], reply: bool) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools or None, documents=None,
                add_generation_prompt=reply, **self._given,
            )  # fmt: skip
        except Exception as error:  # a program of others
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the checkpoint's chat template refuses it: {reason[0]}") from error

    def _encoded(self, text: str, guard: str) -> list[int]:
        """Ids of a text whose names are tokens, but for those that a guard stands in."""
        first, *rest = text.split(guard)
        ids = self._tokenizer.encode(first, special=True)
        for part in rest:  # it goes on in the middle of a name
            found = self._marks.search(part)
            at = found.start() if found else len(part)
            ids += self._tokenizer.encode_inner(part[:at])
            ids += self._tokenizer.encode(part[at:], special=True)
        return ids


def _named(messages: Sequence[Message], tools: Sequence[dict]) -> Iterator[tuple[str, str]]:
    """What a template that knows no tools passes over in silence: calls, and tools themselves."""
    for i, message in enumerate(messages):
        yield from ((f"messages[{i}].tool_calls: the call of", call.name) for call in message.calls)
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield f"tools[{i}]", function["name"]


def _plain(message: Message) -> dict[str, Any]:
    """As transformers' templates want it."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    about = {"name": message.name, "tool_call_id": message.call_id}
    return made | {key: value for key, value in about.items() if value}


def _mapped(value: Any, change) -> Any:
    """Plain data with every text in it changed, keys apart."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return value


def _compiled(source: str, strftime_now):
    """With the settings, filters and functions that transformers gives to templates."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox, utils
    except ImportError as error:
        raise NoJinja("Jinja is not installed: pip install 'jinja2>=3.1.6'") from error
    if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise NoJinja(
            f"Jinja {jinja2.__version__} has holes in its sandbox: pip install 'jinja2>=3.1.6'"
        )

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what is trained on; here it is only its inside."""

        tags = {"generation"}  # noqa: RUF012 as Jinja declares it

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(utils.Namespace):
        """Without names that are Python's own."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": Namespace,
    }  # fmt: skip
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the checkpoint's chat template is not one: line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise ValueError("the checkpoint's chat template is nested too deeply") from error
