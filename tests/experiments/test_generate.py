"""Prompts from a file, and conversations, as a user has them."""

import base64
import dataclasses
import io
import json
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from experiments import chat
from experiments.loading import Loaded
from llama_jax import config
from llama_jax.decode.generate import Result
from llama_jax.tokenizer import base, byte
from tests.convert import small
from tests.experiments import helpers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the byte tokenizer, 256 positions, random weights."""
    folder = tmp_path_factory.mktemp("byte")
    sizes = dataclasses.replace(small.MODEL, vocab_size=259)
    came = small.hf(folder / "hf", small.state(sizes), vocab_size=259)
    small.convert(came, folder / "native", "native")
    said = json.loads((folder / "native/model.json").read_text())
    said |= {"tokenizer": "byte", "context": 256}
    (folder / "native/model.json").write_text(json.dumps(said))
    return folder / "native"


def generate(model, *flags):
    return helpers.run("generate", f"--checkpoint={model}", *flags)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    made = [{"prompt": f"number {i}", "id": i} for i in range(11)]
    made.append({"messages": [{"role": "user", "content": "hi"}]})
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    return path


NEW = ["--config.decode.max_new_tokens=40", "--config.decode.temperature=1.0"]


def test_a_file_is_answered_in_its_order_and_as_alone(model, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    done = generate(
        model, f"--input={prompts}", f"--output={output}", *NEW, "--config.decode.rows=3"
    )
    assert done.returncode == 0, done.stderr
    made = lines(output)
    assert [line.get("id") for line in made] == [*range(11), None]
    assert all(len(line["tokens"]) == len(line["logprobs"]) for line in made)
    assert not output.with_name("out.jsonl.partial").exists()
    alone = generate(model, "--prompt=number 0", *NEW)
    # A pipe read as text has one kind of line end.
    text = made[0]["text"].replace("\r\n", "\n").replace("\r", "\n")
    assert alone.stdout == "number 0" + text + "\n"
    again = generate(model, f"--input={prompts}", f"--output={output}", *NEW)
    assert again.returncode == 1
    assert "exists; give another" in again.stderr


def test_samples_are_a_line_each(model, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    done = generate(
        model, f"--input={prompts}", f"--output={output}", *NEW, "--config.decode.samples=2"
    )
    assert done.returncode == 0, done.stderr
    made = lines(output)
    assert [(line.get("id"), line["sample"]) for line in made[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert made[0]["text"] != made[1]["text"]


def test_an_interrupted_file_goes_on_and_keeps_what_was_done(model, tmp_path):
    source, output = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i} is"}) + "\n" for i in range(60)))
    flags = [f"--checkpoint={model}", f"--input={source}", f"--output={output}", *NEW]
    whole = helpers.run("generate", *flags[:2], f"--output={tmp_path / 'whole'}", *NEW)
    assert whole.returncode == 0, whole.stderr
    process = helpers.start("generate", *flags, "--config.decode.rows=2")
    partial, deadline = output.with_name("out.jsonl.partial"), time.time() + 100
    while time.time() < deadline and not (
        partial.exists() and len(partial.read_text().split("\n")) > 4
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "run the same command to go on" in said
    kept = partial.read_text()
    assert not output.exists()
    for more in ("--config.decode.seed=5", f"--draft={model}"):
        other = helpers.run("generate", *flags, more)
        assert "is of other prompts or settings" in other.stderr
    assert partial.read_text() == kept
    partial.write_text(kept + '[59, {"te')  # a line cut short
    again = helpers.run("generate", *flags, "--config.decode.rows=2")
    assert again.returncode == 0, again.stderr
    assert [line["text"] for line in lines(output)] == [
        line["text"] for line in lines(tmp_path / "whole")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{]", "line 1: no JSON"),
        ('{"prompt": "a"}\n{"text": "a"}', 'line 2: it must have "prompt" or "messages"'),
        ('{"prompt": 3}', "line 1: prompt=3 must be a text"),
        (json.dumps({"prompt": "x" * 300}), "line 1 has 301 tokens .*shorten it to at most 255"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: messages.0..role='assistant' must be 'user'"),
        ('{"messages": ["a"]}', "line 1: messages must be a list of"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_before_anything_runs(model, tmp_path, text, message):
    source = tmp_path / "p.jsonl"
    source.write_text(text)
    done = generate(model, f"--input={source}", f"--output={tmp_path / 'o'}", NEW[0])
    assert done.returncode == 1
    import re

    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --prompt, --chat and --input; 0 are given"),
        (["--prompt=a", "--chat"], "2 are given"),
        (["--input=x"], "--input needs --output=FILE"),
        (["--prompt=a", "--output=x"], "--output belongs to --input"),
        (["--prompt=a", "--system=x"], "--system belongs to --chat"),
        (["--prompt=a", "--config.decode.stop_tokens=('<eso>',)"], "decode.stop_tokens='<eso>' is not one of .*nearest: '<eos>'"),
        (["--prompt=a", "--config.decode.top_k=3"], "decode.top_k=3 has no effect while decode.temperature=0.0"),
        (["--chat", "--config.decode.max_new_tokens=256"], "leaves no room for a question"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(model, flags, message):
    import re

    done = generate(model, *flags)
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_draft_says_the_same(model, tmp_path):
    same = generate(model, "--prompt=ab", f"--draft={model}", "--config.decode.max_new_tokens=30")
    alone = generate(model, "--prompt=ab", "--config.decode.max_new_tokens=30")
    assert same.stdout == alone.stdout != ""


def test_a_chat_through_a_pipe(model, tmp_path):
    talk = f"hello\n/save {tmp_path / 'said.json'}\n/rest\n/system be brief\nagain\n"

    flags = ["--chat", "--config.decode.max_new_tokens=20"]
    done = helpers.run("generate", f"--checkpoint={model}", *flags, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert "nothing in the checkpoint says that it was trained to chat" in done.stderr
    assert "using the form of llama2" in done.stderr
    assert "/rest is no command" in done.stderr
    saved = json.loads((tmp_path / "said.json").read_text())
    assert [one["role"] for one in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "hello"
    assert done.stdout.count("\n") >= 2


class Scripted:
    """A decoder that says what it is told to, and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def run(self, requests, listen, stopped):
        (request,) = requests
        self.asked.append(request.tokens)
        text, tokens, last = self.answers.pop(0)
        listen(0, text)
        yield 0, Result(tokens, [], text, "stop" if last else "length", last)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    tokens = [bytes([i]) for i in range(256)]
    path = tmp_path_factory.mktemp("bpe") / "ranks"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return base.load(config.Tokenizer("bpe", str(path)))


def talk(monkeypatch, tmp_path, tokenizer, typed, answers, context=2000, system=""):
    """The chat, after these lines were typed."""
    scripted = Scripted(answers)
    monkeypatch.setattr(chat, "Decoder", lambda *_: scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    engine = SimpleNamespace(decode=config.Decode(max_new_tokens=50))
    one = chat.Chat(Loaded(engine, tokenizer, context, frozenset(), tmp_path), system)
    assert one.run() == 0
    return one


def test_a_tool_is_called_and_answered_by_hand(monkeypatch, tmp_path, llama3):
    call = '{"name": "weather", "parameters": {"city": "Rome"}}'
    special = llama3.special
    answers = [
        (call, [special["<|python_tag|>"], *llama3.encode(call)], [special["<|eom_id|>"]]),
        ("warm", llama3.encode("warm"), [special["<|eot_id|>"]]),
    ]
    one = talk(monkeypatch, tmp_path, llama3, "how is Rome?\n31 degrees\n", answers)
    assert [(m.role, m.content) for m in one.messages] == [
        ("user", "how is Rome?"), ("assistant", call), ("ipython", "31 degrees"), ("assistant", "warm"),
    ]  # fmt: skip
    assert (one.messages[1].python, one.messages[1].end) == (True, "eom")
    assert "31 degrees" in llama3.decode(one.decoder.asked[1])


def test_what_no_longer_fits_is_forgotten_from_the_oldest_on(monkeypatch, tmp_path, capsys):
    tokenizer = byte.Byte()
    answers = [("yes", tokenizer.encode("yes"), [tokenizer.eos])] * 4
    typed = "first question\nsecond question\nthird question\n" + "x" * 500 + "\nlast\n"
    one = talk(monkeypatch, tmp_path, tokenizer, typed, answers, context=170, system="be kind")
    asked = [tokenizer.decode(tokens) for tokens in one.decoder.asked]
    assert all("be kind" in text for text in asked)
    assert "first" in asked[1]
    assert "first" not in asked[2]
    assert "second" in asked[2]
    said = capsys.readouterr().err
    assert "no longer fit, and are forgotten" in said
    assert "the question has 5" in said
    assert one.messages[-2].content == "last", "the chat goes on after a question that was too long"
