import json

import pytest

from llama_jax.tokenizer import messages
from llama_jax.tokenizer.chat import Call, Message

CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]


def test_what_openais_api_writes_is_read():
    """Null and empty keys are those of an answer that the API gave."""
    found = messages.read(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": None, "tool_calls": CALLS, "refusal": None, "annotations": []},
            {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": ""},
        ]
    )  # fmt: skip
    assert found == [
        Message("system", "be brief"),
        Message("user", "hi\n?"),
        Message("assistant", "", calls=(Call("f", {"x": 1}),)),
        Message("tool", "3", name="f", call_id="1"),
        Message("assistant", ""),
    ]


def test_calls_are_read_as_hugging_face_has_them():
    call = {"function": {"name": "f", "arguments": {"x": [1, None]}}}
    (found,) = messages.read([{"role": "assistant", "tool_calls": [call, {"name": "g"}]}])
    assert found.calls == (Call("f", {"x": [1, None]}), Call("g", {}))


U = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "messages='hi' must be a list of at least one message"),
        ([], r"messages=\[\] must be a list of at least one"),
        ([U, "a"], r"messages\[1\]='a' must be an object"),
        ([{"content": "a"}], r"messages\[0\] has no role"),
        ([{"role": 3, "content": "a"}], r"messages\[0\].role=3 must be a text"),
        ([{"role": "user"}], r"messages\[0\] of role 'user' has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] of role 'user' has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content=3 must be a text"),
        ([{"role": "user", "content": {"text": "a"}}], r'messages\[0\].content={"text": "a"} must be a text'),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]=.* only text is read"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"content\[0\]=.* only text is read"),
        ([{**U, "reasoning_content": "hm"}], r"messages\[0\].reasoning_content='hm' is not known here and would be lost"),
        ([{**U, "tool_calls": CALLS}], r"messages\[0\].tool_calls: only the assistant calls tools, not role 'user'"),
        ([{"role": "assistant", "tool_calls": "f"}], r"tool_calls='f' must be a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\]='f' must be {\"function\""),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], r"tool_calls\[0\]: arguments='{' must be a JSON object"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 9999}]}], r"arguments='\[\[.*must be a JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(value, message):
    with pytest.raises(ValueError, match=message) as error:
        messages.read(json.loads(json.dumps(value)))
    assert len(str(error.value)) < 250
