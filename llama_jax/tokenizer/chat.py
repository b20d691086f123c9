"""Conversations as token ids, and back: Llama 2-Chat's form and that of Llama 3, 3.1, 3.2 and 3.3.

Llama 2: Meta's llama/generation.py (`chat_completion`). Llama 3: Meta's llama-models,
models/llama3 (chat_format.py) and the prompt format pages of llama.com; a message there is

    <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>

with content encoded apart from the two newlines. Only the forms' own marks become special tokens:
what a user writes stays text, whatever it spells.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from llama_jax.tokenizer.base import Tokenizer

ROLES = ("system", "user", "assistant", "ipython")
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")  # of Llama 2, plain text to its tokenizer


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool's name, and its arguments by name, JSON-like values."""

    name: str
    arguments: dict


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. Roles: "system", "user", "assistant", "ipython" (what a tool gave; Llama 3.1 on).

    `python`: the content is meant for a tool and stands behind <|python_tag|>. `end`: "eot" closes
    the turn; "eom" pauses it until the tool's result; "none" is an answer cut short, the last one.

    `calls`: of tools, that a form has yet to put into words (tools.message). `name` of the tool that
    a result is from, or of who speaks, and `call_id`, which call it answers: some templates want them.
    """

    role: str
    content: str
    python: bool = False
    end: str = "eot"
    calls: tuple[Call, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a family of models reads and writes conversations; `write` with `reply` ends where the
    model's answer begins. `read` undoes `write`, with or without the answer's ids behind.

    `answer(text, ids, last, tokenizer)`: the message in what a model said, `last` the token that ended
    it, if one did. Whatever it said, `write` takes it.
    """

    write: Callable[[Sequence[Message], Tokenizer, bool], list[int]]
    read: Callable[[Sequence[int], Tokenizer], list[Message]]
    answer: Callable[[str, Sequence[int], Sequence[int], Tokenizer], Message]


def write_llama2(messages: Sequence[Message], tokenizer: Tokenizer, reply: bool) -> list[int]:
    """Each question and answer is a text with begin and end; contents lose outer white space.

    The last question has no end when the model is to reply, nor has an answer of end "none".
    """
    _check_llama2(messages, reply)
    if messages[0].role == "system":
        system, user = messages[0].content, messages[1].content
        asked = Message("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}")
        messages = [asked, *messages[2:]]
    ids = []
    for i in range(0, len(messages), 2):
        text = f"[INST] {messages[i].content.strip()} [/INST]"
        end = []
        if i + 1 < len(messages):
            answer = messages[i + 1]
            text += f" {answer.content.strip()}"
            if answer.end != "none":
                text, end = text + " ", [tokenizer.eos]
        ids += [tokenizer.bos, *tokenizer.encode(text), *end]
    return ids


def read_llama2(ids: Sequence[int], tokenizer: Tokenizer) -> list[Message]:
    """Messages without outer white space; ValueError names the turn that has another form."""
    messages = []
    for number, turn in enumerate(_turns(list(ids), tokenizer)):
        done = turn[-1:] == [tokenizer.eos]
        text = tokenizer.decode(turn[:-1] if done else turn)
        form = re.fullmatch(r"\[INST\] (.*?) \[/INST\](.*)", text, re.DOTALL)
        if not form:
            raise ValueError(
                f"turn {number} is {text[:60]!r}; Llama 2 has '[INST] question [/INST] answer'"
            )
        question, answer = form[1], form[2].strip()
        system = re.fullmatch(r"<<SYS>>\n(.*)\n<</SYS>>(?:\n\n(.*))?", question, re.DOTALL)
        if system:
            messages.append(Message("system", system[1]))
            question = system[2] or ""
        messages.append(Message("user", question))
        if done or answer:
            messages.append(Message("assistant", answer, end="eot" if done else "none"))
    return messages


def answer_llama2(
    text: str, ids: Sequence[int], last: Sequence[int], tokenizer: Tokenizer
) -> Message:
    """Up to a tag of the form, behind which a model has gone on without its user."""
    return Message("assistant", re.split("|".join(map(re.escape, TAGS)), text)[0].strip())


def write_llama3(messages: Sequence[Message], tokenizer: Tokenizer, reply: bool) -> list[int]:
    """Contents as they are (Hugging Face's templates strip them, as prompts.llama31 does).

    With `reply` the assistant's header follows, else only a last message of end "none" is open.
    """
    _check_llama3(messages, reply)
    special = _marks(tokenizer)
    ids = [tokenizer.bos]
    for message in messages:
        ids += _header(message.role, tokenizer)
        ids += [special["python_tag"]] if message.python else []
        ids += tokenizer.encode(message.content)
        ids += [] if message.end == "none" else [special[f"{message.end}_id"]]
    return ids + (_header("assistant", tokenizer) if reply else [])


def read_llama3(ids: Sequence[int], tokenizer: Tokenizer) -> list[Message]:
    """Messages; an assistant's header with nothing behind it is none. ValueError on another form.

    <|python_tag|> is taken for one at the start of a content only; later it reads as its name.
    """
    special = _marks(tokenizer)
    ids = [int(i) for i in ids]
    messages = []
    at = 1 if ids[:1] == [tokenizer.bos] else 0
    while at < len(ids):
        head = _find(ids, at, len(ids), special["end_header_id"])
        if ids[at] != special["start_header_id"] or head == len(ids):
            raise ValueError(f"ids[{at}]={ids[at]}: a message begins with a header, role inside")
        role = tokenizer.decode(ids[at + 1 : head])
        end = _find(ids, head, len(ids), special["eot_id"], special["eom_id"])
        message = _content(role, ids, head + 1, end, tokenizer)
        if end < len(ids) or message.content or message.python or role != "assistant":
            messages.append(message)
        at = end + 1
    return messages


def answer_llama3(
    text: str, ids: Sequence[int], last: Sequence[int], tokenizer: Tokenizer
) -> Message:
    """Special tokens inside are text; cut short, or ended by another token, it counts as whole."""
    special = _marks(tokenizer)
    python = list(ids[:1]) == [special["python_tag"]]
    content = text.removeprefix("<|python_tag|>") if python else text
    end = "eom" if list(last) == [special["eom_id"]] else "eot"
    return Message("assistant", content, python, end)


def _turns(ids: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """What stands behind each begin token."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos]
    if starts[:1] != [0]:
        raise ValueError(f"ids begin with {ids[:1]}; Llama 2's turns begin with {tokenizer.bos}")
    ends = [*starts[1:], len(ids)]
    return [ids[a + 1 : b] for a, b in zip(starts, ends, strict=True)]


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    special = _marks(tokenizer)
    inside = tokenizer.encode(role)
    start, end = special["start_header_id"], special["end_header_id"]
    return [start, *inside, end, *tokenizer.encode("\n\n")]


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Llama 3's marks by name without brackets."""
    names = ("start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag")
    special = tokenizer.special
    marks = {name: special[f"<|{name}|>"] for name in names if f"<|{name}|>" in special}
    if len(marks) < len(names):
        raise ValueError(
            "this tokenizer has no <|start_header_id|>: the form of Llama 3 needs "
            "data.tokenizer.kind='bpe', Llama 2's takes any"
        )
    return marks


def _find(ids: list[int], start: int, stop: int, *wanted: int) -> int:
    """The first place of one of the wanted ids, `stop` if there is none."""
    return next((i for i in range(start, stop) if ids[i] in wanted), stop)


def _content(role: str, ids: list[int], start: int, end: int, tokenizer: Tokenizer) -> Message:
    special = _marks(tokenizer)
    stray = set(tokenizer.special.values()) - {special["python_tag"]}
    i = next((i for i in range(start, end) if ids[i] in stray), end)
    if i < end:
        raise ValueError(
            f"ids[{i}]={ids[i]} is a special token inside the {role!r} message from ids[{start}]"
        )
    tag = _find(ids, start, end, special["python_tag"])
    python = tag < end and tokenizer.decode(ids[start:tag]) == "\n\n"
    if python:
        content = tokenizer.decode(ids[tag + 1 : end])
    else:
        text = tokenizer.decode(ids[start:end])
        content = text.removeprefix("\n\n")
        if content == text:
            raise ValueError(
                f"ids[{start}:] {text[:20]!r}: two newlines must follow the header of {role!r}"
            )
    closed = end < len(ids)
    how = "none" if not closed else "eot" if ids[end] == special["eot_id"] else "eom"
    return Message(role, content, python, how)


def _check_llama2(messages: Sequence[Message], reply: bool) -> None:
    """Meta's rules: system first or not at all, then user and assistant in turn, no tags inside."""
    first = 1 if messages and messages[0].role == "system" else 0
    for i, message in enumerate(messages):
        expected = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if message.role != expected:
            raise ValueError(
                f"messages[{i}].role={message.role!r} must be {expected!r}: in Llama 2 an optional "
                "system message is followed by user and assistant in turn"
            )
        for tag in TAGS:
            if tag in message.content:
                raise ValueError(
                    f"messages[{i}].content holds {tag!r}, which Llama 2 reads as its own mark; "
                    "take it out"
                )
        is_open = message.end == "none" and not reply and i + 1 == len(messages)
        if message.python or message.calls or not (message.end == "eot" or is_open):
            raise ValueError(
                f"messages[{i}] has python={message.python}, calls={len(message.calls)}, "
                f"end={message.end!r}: Llama 2 knows no tools, and only the last message may be open"
            )
    last = "user" if reply else "assistant"
    if len(messages) <= first or messages[-1].role != last:
        raise ValueError(
            f"{len(messages)} messages with reply={reply} must end with the {last}'s in Llama 2"
        )


def _check_llama3(messages: Sequence[Message], reply: bool) -> None:
    if not messages:
        raise ValueError("0 messages: a conversation has at least one")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise ValueError(f"messages[{i}].role={message.role!r} must be one of {ROLES}")
        if message.end not in ("eot", "eom", "none"):
            raise ValueError(f"messages[{i}].end={message.end!r} must be 'eot', 'eom' or 'none'")
        if message.calls:
            raise ValueError(f"messages[{i}].calls: tools.message puts them into words first")
        if message.role != "assistant" and (message.python or message.end != "eot"):
            raise ValueError(
                f"messages[{i}] of role {message.role!r} has python={message.python}, "
                f"end={message.end!r}: only the assistant calls tools or stops before its end"
            )
        if message.role == "ipython" and (
            not i or messages[i - 1].role not in ("assistant", "ipython")
        ):
            raise ValueError(
                f"messages[{i}].role='ipython' is a tool's result: the assistant's call or another "
                "result must stand before it"
            )
        if message.end == "none" and (reply or i + 1 < len(messages)):
            raise ValueError(
                f"messages[{i}].end='none' must be the last, with reply=False: the model continues it"
            )


FORMATS = {
    "llama2": PromptFormat(write_llama2, read_llama2, answer_llama2),
    "llama3": PromptFormat(write_llama3, read_llama3, answer_llama3),
}
