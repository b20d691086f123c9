"""How one checkpoint takes conversations: by a form that is known here, or by the template it came with.

A template is rendered (template.py), unless a few conversations show that it writes what one of Meta's forms
(chat.py, prompts.py) writes: those know more, such as code for tools, and need no Jinja.
"""

import dataclasses
import datetime
import re
from collections.abc import Callable, Mapping, Sequence

from llama_jax.tokenizer import prompts, tools
from llama_jax.tokenizer.base import Tokenizer
from llama_jax.tokenizer.chat import FORMATS, Message
from llama_jax.tokenizer.template import NoJinja, Template

# What tells forms apart: outer white space, a system message, a question after an answer.
_PROBES = (
    [Message("user", " a ")],
    [Message("system", " b\n"), Message("user", "a")],
    [Message("user", "a"), Message("assistant", " b\n"), Message("user", "c")],
)


@dataclasses.dataclass(frozen=True)
class Form:
    """`write(messages, functions)`: ids up to where the model goes on: its answer begins, or it continues
    the last message, which is its own. functions: JSON schemas of tools. ValueError where it has no words.

    `answer(text, ids, last)`: the message in what the model said, `last` the token that ended it, if one did.
    """

    name: str
    write: Callable[[Sequence[Message], Sequence[dict]], list[int]]
    answer: Callable[[str, Sequence[int], Sequence[int]], Message]
    ends: frozenset[int]  # tokens that close an answer
    calls: bool = False  # whether tools.parse reads what it answers
    dated: bool = False  # whether it depends on the day
    note: str = ""  # why it is this one, where that is not plain


def find(
    source: str,
    names: Mapping[str, str],
    tokenizer: Tokenizer,
    today: datetime.date,
    date: datetime.date | None = None,
) -> Form:
    """The form of a checkpoint with the chat template `source`, "" without one.

    names: "bos_token" and the like -> the token's name, for templates. date: what templates are told of the
    day; without one they say what they say by themselves, which may be `today`. ValueError if `source` is
    no template.
    """
    if not source:
        form = _native(_family(tokenizer), tokenizer, "")
        return dataclasses.replace(
            form,
            note="nothing in the checkpoint says that it was trained to chat: it may just go on with the "
            f"text; using the form of {form.name}",
        )
    settings = {"date_string": date.strftime(_DATE)} if date else {}
    try:
        template = Template(source, tokenizer, names, date or today, settings)
    except NoJinja as error:
        name = _family(tokenizer, source)
        form = _native(name, tokenizer, (date or today).strftime(_DATE))
        return dataclasses.replace(
            form,
            note=f"the checkpoint's chat template cannot be followed ({error}); using the form of "
            f"{form.name} instead",
        )
    name = _family(tokenizer, source)
    known = _native(name, tokenizer, _date_in(template, tokenizer))
    if all(_ids(template.ids, probe) == _ids(known.write, probe) for probe in _PROBES):
        return dataclasses.replace(known, dated=template.asks_for_date)
    return Form(
        "its own chat template",
        template.ids,
        lambda text, ids, last: Message("assistant", text),
        template.ends(),
        dated=template.asks_for_date,
    )


_DATE = "%d %b %Y"  # of Llama 3.1's system message


def _family(tokenizer: Tokenizer, source: str = "") -> str:
    """Which of the known forms fits a tokenizer, and looks most like a template."""
    if "<|start_header_id|>" not in tokenizer.special:
        return "Llama 2"
    if "Cutting Knowledge Date" in source:
        return "Llama 3.1"
    return "Llama 3, contents trimmed" if source else "Llama 3"


def _native(name: str, tokenizer: Tokenizer, date: str) -> Form:
    format_ = FORMATS["llama2" if name == "Llama 2" else "llama3"]

    def write(messages: Sequence[Message], functions: Sequence[dict]) -> list[int]:
        if functions and name != "Llama 3.1":
            raise ValueError(f"tools: the form of {name} has no words for them")
        spoken = [_spoken(one, i, name) for i, one in enumerate(messages)]
        is_open = spoken[-1].role == "assistant" and not messages[-1].calls
        if is_open:
            spoken[-1] = dataclasses.replace(spoken[-1], end="none")
        if name == "Llama 3.1":
            spoken = prompts.llama31(spoken, date, functions=functions)
        elif name == "Llama 3, contents trimmed":
            spoken = prompts.stripped(spoken)
        return format_.write(spoken, tokenizer, not is_open)

    if name == "Llama 2":
        ends = {tokenizer.eos}
    else:
        marks = [f"<|{mark}|>" for mark in ("eot_id", "eom_id")]
        ends = {tokenizer.special[mark] for mark in marks if mark in tokenizer.special}
    return Form(
        name,
        write,
        lambda text, ids, last: format_.answer(text, ids, last, tokenizer),
        frozenset(ends),
        calls=name != "Llama 2",
    )


def _spoken(message: Message, number: int, form: str) -> Message:
    """With calls in words, and by the roles of Meta's forms."""
    if message.calls:
        if message.content or form == "Llama 2":
            raise ValueError(
                f"messages[{number}] calls tools"
                + (f", for which the form of {form} has no words" if form == "Llama 2" else "")
                + (f" and says {message.content[:40]!r}; it can do one" if message.content else "")
            )
        return tools.message(message.calls, "json")
    if message.role in ("tool", "ipython"):
        # Hugging Face's template of 3.1 has every result as JSON, a text too.
        content = tools.result(message.content).content if form == "Llama 3.1" else message.content
        return Message("ipython", content)
    if message.name or message.call_id:
        raise ValueError(
            f"messages[{number}] has a name or tool_call_id, which the form of {form} has no place for"
        )
    return message


def _date_in(template: Template, tokenizer: Tokenizer) -> str:
    """What a template says of the day, "" if nothing."""
    try:
        text = tokenizer.decode(template.ids([Message("user", "a")]))
    except ValueError:
        return ""
    found = re.search(r"^Today Date: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _ids(write, messages: list[Message]) -> list[int] | None:
    try:
        return write(messages, ())
    except ValueError:
        return None
