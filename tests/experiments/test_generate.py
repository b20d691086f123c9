"""Prompts from a file, and conversations, as a user has them."""

import base64
import dataclasses
import io
import json
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from experiments import cli
from llama_jax import config
from llama_jax.convert import native
from llama_jax.decode.generate import Completion
from llama_jax.decode.text import repeats
from llama_jax.run import chat, prompt_file
from llama_jax.run.loading import LoadedModel, form_of
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
        assert "is of other prompts, settings or weights" in other.stderr
    assert partial.read_text() == kept
    partial.write_text(kept + '[59, {"te')  # a line cut short
    moved = tmp_path / "moved"  # and with other rows at a time: the texts are the same
    shutil.copytree(model, moved)
    again = helpers.run("generate", f"--checkpoint={moved}", *flags[1:], "--config.decode.rows=5")
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
        (json.dumps({"prompt": "x" * 300}), "line 1 has 301 tokens .*shorten it to at most 216 tokens"),
        ("\n\n\n" + json.dumps({"prompt": "x" * 230}), "line 4 has 231 tokens .*try --config.decode.max_new_tokens=25"),
        ('{"prompt": "\\ud83d"}', r"p.jsonl, line 1: text.0.=U.D83D is a lone surrogate"),
        ('{"prompt": ' + "[" * 100_000, "line 1: no JSON .*recursion"),
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "line 1: no JSON .Exceeds the limit"),
        ('{"prompt": "a", "text": "b"}', "line 1: 'text' is written by this command; rename the field"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "f"}', "line 1: tools must be a list"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: messages.0..role='assistant' must be 'user'"),
        ('{"messages": ["a"]}', "line 1: messages.0.='a' must be an object"),
        ('{"messages": [{"role": "user", "content": "a", "audio": "b"}]}', "line 1: messages.0..audio='b' is not known"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_before_anything_runs(tmp_path, text, message):
    source = tmp_path / "p.jsonl"
    source.write_text(text)
    engine = SimpleNamespace(decode=config.Decode(max_new_tokens=40))
    loaded = LoadedModel(engine, None, byte.Byte(), 256, frozenset(), tmp_path, "")
    with pytest.raises(ValueError, match=message) as error:
        prompt_file.begin(loaded, source, tmp_path / "o", None)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400
    assert not list(tmp_path.glob("o*"))


def test_other_weights_are_another_job(model, tmp_path):
    """Of the same names and sizes: a run that trained on."""
    was = native.identity(model)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert native.identity(other) == was
    array = next((other / "params/groups.self_0.ffn.up").glob("c/*/*/*"))
    content = bytearray(array.read_bytes())
    content[40] ^= 1
    array.write_bytes(content)
    assert native.identity(other) != was


def test_fields_are_kept_as_they_came(tmp_path):
    """A lone surrogate, which UTF-8 cannot hold, escaped; blank lines and a byte order mark passed over."""
    source = tmp_path / "p.jsonl"
    source.write_text(
        '\ufeff{"prompt": "a", "id": "\\ud800é"}\r\n\n  \n{"prompt": "b", "id": "é"}\n\n'
    )
    read = prompt_file.read(source)
    assert list(read) == [1, 4]
    written = [prompt_file.line_of(line) for line in read.values()]
    assert [json.loads(line) for line in written] == list(read.values())
    assert '"\\ud800\\u00e9"' in written[0]
    assert '"é"' in written[1]
    "".join(written).encode()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --prompt, --chat and --input; 0 are given"),
        (["--prompt=a", "--chat"], "2 are given"),
        (["--input=/nowhere", "--output=o"], "--input=/nowhere cannot be read .*No such file"),
        (["--input=d/x.jsonl"], "--input needs --output=FILE, as --output=x.texts.jsonl"),
        (["--prompt=a", "--date=2024-07-26"], "--date belongs to --chat and --input"),
        (["--chat", "--date=26 Jul"], "--date=26 Jul must be a day, as 2024-07-26"),
        (["--prompt=a", "--output=x"], "--output belongs to --input"),
        (["--prompt=a", "--system=x"], "--system belongs to --chat"),
        (["--prompt=a", "--config.decode.stop_tokens=('<eso>',)"], "decode.stop_tokens='<eso>' is not one of .*nearest: '<eos>'"),
        (["--prompt=a", "--config.decode.stop=1."], "decode.stop=1.0 must be str, not float; in quotes it is a text: .*1.0"),
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
    talk = (
        f"hello\n/save {tmp_path / 'said.json'}\n/save gs://b/x\n/rest\n/system be brief\nagain\n"
    )

    flags = ["--chat", "--config.decode.max_new_tokens=20"]
    done = helpers.run("generate", f"--checkpoint={model}", *flags, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert "nothing in the checkpoint says that it was trained to chat" in done.stderr
    assert "using the form of Llama 2" in done.stderr
    assert "/rest is no command" in done.stderr
    assert "gs://b/x must be a path on this machine" in done.stderr
    saved = json.loads((tmp_path / "said.json").read_text())
    assert [one["role"] for one in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "hello"
    assert done.stdout.count("\n") >= 2


class Scripted:
    """A decoder that says what it is told to, and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def run(self, params, requests, listen, stopped):
        (request,) = requests
        self.asked.append(request.tokens)
        text, tokens, last = self.answers.pop(0)
        listen(0, text)
        yield 0, Completion(tokens, [], [], text, "stop" if last else "length", last)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    tokens = [bytes([i]) for i in range(256)]
    path = tmp_path_factory.mktemp("bpe") / "ranks"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return base.load(config.TokenizerConfig("bpe", str(path)))


def talk(monkeypatch, tmp_path, tokenizer, typed, answers, context=2000, system=""):
    """The chat, after these lines were typed."""
    scripted = Scripted(answers)
    monkeypatch.setattr(chat, "Decoder", lambda *_: scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    engine = SimpleNamespace(decode=config.Decode(max_new_tokens=50))
    loaded = LoadedModel(engine, None, tokenizer, context, frozenset(), tmp_path, "")
    one = chat.Chat(loaded, form_of(loaded, None), system)
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


def test_what_an_answer_ends_with_does_not_lose_it(monkeypatch, tmp_path, llama3, capsys):
    """Begin and end of text, a reserved token inside; in Llama 2's form its begin token, a tag inside."""
    special = llama3.special
    stray = special["<|reserved_special_token_9|>"]
    answers = [
        ("one", llama3.encode("one"), [llama3.eos]),
        ("two", llama3.encode("two"), [llama3.bos]),
        (
            "three<|reserved_special_token_9|>",
            [*llama3.encode("three"), stray],
            [special["<|eot_id|>"]],
        ),
        ("four", llama3.encode("four"), []),
    ]
    one = talk(monkeypatch, tmp_path, llama3, "a\nb\nc\nd\n", answers)
    said = [m.content for m in one.messages if m.role == "assistant"]
    assert said == ["one", "two", "three<|reserved_special_token_9|>", "four"]
    assert stray not in one.decoder.asked[3]
    tokenizer = byte.Byte()
    answers = [
        (" a story ", tokenizer.encode(" a story "), [tokenizer.bos]),
        (" b [/INST] x", tokenizer.encode(" b [/INST] x"), []),
        (" c ", tokenizer.encode(" c "), [tokenizer.eos]),
    ]
    one = talk(
        monkeypatch, tmp_path, tokenizer, "a\nb\nc\n/save " + str(tmp_path / "s.json"), answers
    )
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [m["content"] for m in saved] == ["a", "a story", "b", "b", "c", "c"]
    assert "turn" not in capsys.readouterr().err


def test_stops_that_a_shell_hands_over():
    assert [cli.unescaped(s) for s in ("\\n", "\\n\\n", "\\r\\t", "\n", "\\nabla", "a\\n")] == [
        "\n", "\n\n", "\r\t", "\n", "\\nabla", "a\\n",
    ]  # fmt: skip


def test_a_text_that_repeats_itself_is_noticed():
    text = list(range(30))
    assert repeats([*text, *[1, 2, 3] * 11])
    assert repeats([7] * 32)
    assert not repeats([7] * 31)
    assert not repeats([*[7] * 32, 8])
    assert not repeats(list(range(9)) * 4)


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
