"""The templates of Hugging Face are compared in test_chat.py."""

import json
import re

import pytest

from llama_jax.tokenizer import prompts
from llama_jax.tokenizer.chat import Message


def page(shared, name):
    return shared(f"chat_format/meta_docs/{name}.md").read_text()


def test_function_tags_are_the_words_of_metas_page(shared):
    text = page(shared, "llama3_1_prompt_format")
    message = re.search(
        r"You have access to the following functions:.*?(?=<\|eot_id\|>)", text, re.S
    )
    schema = re.search(r"^\{\"name\": \"trending_songs\".*\}$", text, re.M)
    assert prompts.function_tags([json.loads(schema[0])]) == message[0]


def test_function_list_is_the_words_of_metas_page(shared):
    text = page(shared, "llama3_2_text_prompt_format")
    messages = re.findall(r"You are an expert in composing.*?(?=<\|eot_id\|>)", text, re.S)
    assert len(messages) == 2
    for message in messages:
        functions = json.loads(message[message.index("\n[\n") :])
        assert prompts.function_list(functions) == message


def test_a_plain_conversation_is_told_the_dates():
    (system, user) = prompts.llama31([Message("user", " Hi\n")], "26 Jul 2024")
    assert system.content == "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert user == Message("user", "Hi")


def test_contents_lose_outer_space_but_code_and_results_do_not():
    call, result = Message("assistant", " x\n", python=True, end="eom"), Message("ipython", "\n1 ")
    said = Message("assistant", " y ", end="eom")
    (_, *rest) = prompts.llama31([call, result, said], "26 Jul 2024")
    assert rest == [call, result, Message("assistant", "y", end="eom")]


def test_functions_need_a_place():
    functions = [{"name": "f"}]
    for messages, place in (
        ([], 0),
        ([Message("system", "x")], 1),
        ([Message("assistant", "x")], 0),
    ):
        with pytest.raises(ValueError, match=rf"messages\[{place}\] must be the user's"):
            prompts.llama31(messages, "1 Jan 2025", functions=functions)
    with pytest.raises(ValueError, match="where='here' must be 'system' or 'user'"):
        prompts.llama31([], "1 Jan 2025", where="here")
