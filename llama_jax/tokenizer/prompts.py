"""What Llama 3.1, 3.2 and 3.3 are told of the date and of their tools, in the words they know.

`llama31` gives the words of Hugging Face's chat templates, the others those of Meta's prompt format
pages for 3.1 (`function_tags`) and 3.2 (`function_list`). A function is described by a JSON schema:
{"name": ..., "description": ..., "parameters": ...}.
"""

import dataclasses
import json
from collections.abc import Sequence

from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.tools import INTERPRETER

_JSON_CALL = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)
_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a "
    "function call." + _JSON_CALL
)
_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\n" + _JSON_CALL
)
_TAGS = """Think very carefully before calling functions.
If you choose to call a function ONLY reply in the following format with no prefix or suffix:

<function=example_function_name>{"example_name": "example_value"}</function>

Reminder:
- If looking for real time information use relevant functions before falling back to brave_search
- Function calls MUST follow the specified format, start with <function= and end with </function>
- Required parameters MUST be specified
- Only call one function at a time
- Put the entire function call reply on one line"""
_LIST = (
    "You are an expert in composing functions. You are given a question and a set of possible "
    "functions.\nBased on the question, you will need to make one or more function/tool calls to "
    "achieve the purpose.\nIf none of the function can be used, point it out. If the given question "
    "lacks the parameters required by the function,\nalso point it out. You should only return the "
    "function call in tools call sections.\n\nIf you decide to invoke any of the function(s), you "
    "MUST put it in the format of [func_name1(params_name1=params_value1, "
    "params_name2=params_value2...), func_name2(params)]\nYou SHOULD NOT include any other text in "
    "the response.\n\nHere is a list of functions in JSON format that you can invoke.\n\n"
)


def llama31(
    messages: Sequence[Message],
    date: str,
    builtin: Sequence[str] = (),
    functions: Sequence[dict] = (),
    where: str = "user",
) -> list[Message]:
    """Messages as Hugging Face's templates of 3.1, 3.2 and 3.3 send them, for the "llama3" format.

    The system message, made if there is none, begins with dates and the built-in tools
    ("brave_search", "wolfram_alpha", "code_interpreter"; 3.2's has none); functions stand in it or
    in the first user's message. Contents but calls and results lose outer white space. `date` is
    like "26 Jul 2024".
    """
    if where not in ("system", "user"):
        raise ValueError(f"where={where!r} must be 'system' or 'user'")
    given, rest = "", stripped(messages)
    if rest and rest[0].role == "system":
        given, rest = rest[0].content, rest[1:]
    described = "".join(_indented(function) + "\n\n" for function in functions)
    text = "Environment: ipython\n" if builtin or functions else ""
    if builtin:
        text += f"Tools: {', '.join(name for name in builtin if name != INTERPRETER)}\n\n"
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    if functions and where == "system":
        text += _IN_SYSTEM + described
    if functions and where == "user":
        if not rest or rest[0].role != "user":
            raise ValueError(
                f"messages[{len(messages) - len(rest)}] must be the user's, to hold the functions; "
                "add one or set where='system'"
            )
        rest[0] = Message("user", _IN_USER + described + rest[0].content)
    return [Message("system", text + given), *rest]


def function_tags(functions: Sequence[dict]) -> str:
    """For a user's message before the question: calls come as <function=name>{...}</function>."""
    uses = [
        f"Use the function '{function['name']}' to '{function['description']}':\n"
        f"{json.dumps(function, ensure_ascii=False)}\n\n"
        for function in functions
    ]
    return "You have access to the following functions:\n\n" + "".join(uses) + _TAGS


def function_list(functions: Sequence[dict]) -> str:
    """For the system message of 3.2: calls come as [name(argument=value), ...]."""
    return _LIST + _indented(list(functions))


def stripped(messages: Sequence[Message]) -> list[Message]:
    """Contents but calls and results without outer white space."""
    kept = lambda one: one.python or one.role == "ipython"  # noqa: E731
    return [
        one if kept(one) else dataclasses.replace(one, content=one.content.strip())
        for one in messages
    ]


def _indented(value) -> str:
    return json.dumps(value, ensure_ascii=False, indent=4)
