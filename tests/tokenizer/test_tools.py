import random

import pytest

from llama_jax.tokenizer import tools
from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.tools import Call
from tests.tokenizer import fuzz


def said(text, python=False):
    return tools.parse(Message("assistant", text, python))


def test_the_published_forms():
    search, weather = Call("brave_search", {"query": "1oz gold"}), Call("f", {"a": 1, "b": "x"})
    expected = {
        "builtin": ([search], '<|python_tag|>brave_search.call(query="1oz gold")<|eom_id|>'),
        "code": (
            [Call("code_interpreter", {"code": "print(7)"})],
            "<|python_tag|>print(7)<|eom_id|>",
        ),
        "json": ([weather], '{"name": "f", "parameters": {"a": 1, "b": "x"}}<|eot_id|>'),
        "function": ([weather], '<function=f>{"a": 1, "b": "x"}</function><|eot_id|>'),
        "list": ([weather, Call("g", {})], "[f(a=1, b='x'), g()]<|eot_id|>"),
    }
    assert set(expected) == set(tools.FORMS)
    for form, (calls, text) in expected.items():
        message = tools.message(calls, form)
        tag = "<|python_tag|>" if message.python else ""
        assert f"{tag}{message.content}<|{message.end}_id|>" == text
        assert tools.parse(message) == tuple(calls)


@pytest.mark.parametrize("form", ["builtin", "json", "function", "list"])
def test_any_arguments_come_back(form):
    rng = random.Random(4)
    texts = fuzz.strings(500, seed=4)
    values = [
        None,
        True,
        False,
        -3,
        2.5,
        10**20,
        [],
        {},
        [1, [2, {"k": "v"}]],
        {"a": [None, -1e-9]},
    ]
    for _ in range(400):
        pick = lambda: rng.choice(texts) if rng.random() < 0.6 else rng.choice(values)
        keys = rng.sample(["query", "n", "größe", "_x", "k9"], rng.randint(0, 4))
        calls = [
            Call(rng.choice(["f", "a.b_c", "news"]), {key: pick() for key in keys})
            for _ in range(rng.randint(1, 3) if form == "list" else 1)
        ]
        assert tools.parse(tools.message(calls, form)) == tuple(calls)


def test_text_is_no_call():
    for text in (
        "", "Hello.", "[1, 2]", "[]", "{}", "[f(1)]", "[f(a=b)]", "[f(a=g())]", "[f(**{'a': 1})]",
        "[f(a=1), 2]", "[f(a=1)] and more", "f(a=1)", "[(lambda: 0)(a=1)]", "[f(a=1)(b=2)]",
        "[f(a={[]: 1})]", "[f(a={1, []})]",
        "[f(a=1", '{"name": "f"}', '{"name": 1, "parameters": {}}', '{"name": "f", "parameters": 3}',
        '{"name": "f", "parameters": {}, "x": 1}', '{"type": "q", "name": "f", "parameters": {}}',
        '[{"name": "f", "parameters": {}}]', "<function=f>{bad}</function>", "<function=f>[1]</function>",
        "<function=>{}</function>", "<function=f>{}", "x.call(1)", "x.call(a=y)", "x.calls(a=1)", 'recall(a=".call(")', "call(a=1)",
        "\x00", "[f(a='\ud800", "[" * 100_000, '{"a":' * 100_000, "-" * 100_000 + "1",
        "[f(a=" + "(" * 5000, "[f(a=" + "9" * 9000 + ")]",
    ):  # fmt: skip
        assert said(text) == (), text[:40]


def test_nothing_that_a_model_writes_is_run(tmp_path):
    file = tmp_path / "made"
    for text in (
        f"[f(a=__import__('pathlib').Path({str(file)!r}).touch())]",
        f"x.call(query=open({str(file)!r}, 'w'))",
    ):
        assert said(text) == ()
    assert not file.exists()


def test_meanings_of_type_space_and_escapes():
    call = (Call("f", {"a": "é"}),)
    assert (
        said(' {"type": "function", "name": "f", "parameters": {"a": "é"}}\n', python=True) == call
    )
    assert said('<function=f>{"a": "\\u00e9"}</function>\n') == call
    assert said('\n[f(a="é")] ', python=True) == call
    assert said('f.call(a="é")') == said('f.call(a="é")', python=True) == call
    assert said(r'[f(a="\d")]') == (Call("f", {"a": r"\d"}),)
    assert said("[f(a='1\\n2')]") == (Call("f", {"a": "1\n2"}),)


def test_behind_the_tag_all_else_is_code():
    code = " x = [1]\nprint(x)\n"
    assert said(code, python=True) == (Call("code_interpreter", {"code": code}),)
    assert said(code) == ()
    broken = 'brave_search.call(query="a "b" c")'
    assert said(broken, python=True) == (Call("code_interpreter", {"code": broken}),)


def test_results_are_json_for_the_model():
    assert tools.result("25 °C") == Message("ipython", '"25 °C"')
    assert tools.result({"a": [1, None]}).content == '{"a": [1, null]}'


@pytest.mark.parametrize(
    ("calls", "form", "error"),
    [
        ([Call("f", {})], "xml", r"form='xml' must be one of \('builtin'"),
        ([], "list", "0 calls in form 'list'"),
        ([Call("f", {})] * 2, "json", "2 calls in form 'json': it holds one; 'list' holds several"),
        ([Call("f-g", {})], "list", "name 'f-g' of a tool or argument must be a Python name"),
        ([Call("f", {"a b": 1})], "builtin", "name 'a b' of a tool or argument"),
        ([Call("f>", {})], "function", r"calls\[0\].name='f>' must be free of"),
        ([Call("f", {"code": "x"})], "code", r"calls\[0\]=f\(code\): form 'code' is"),
    ],
)
def test_calls_that_a_form_cannot_hold_are_refused(calls, form, error):
    with pytest.raises(ValueError, match=error):
        tools.message(calls, form)
