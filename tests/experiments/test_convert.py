"""The commands convert and generate, as a user types them."""

import os
import signal
import time

import numpy as np
import pytest

from benchmarks import synthetic
from llama_jax import config
from tests.convert import small
from tests.experiments import helpers


@pytest.mark.slow
def test_a_training_run_leaves_for_hugging_face_with_its_tokenizer(tmp_path):
    """Its own SentencePiece model, trained on the text, goes along."""
    transformers = pytest.importorskip("transformers")
    sp = ["--config.data.tokenizer.kind=sp", "--config.model.vocab_size=272"]
    trained = helpers.run("train", *helpers.arguments(tmp_path, *sp, "--config.train.steps=6"))
    assert trained.returncode == 0, trained.stderr
    to = tmp_path / "hf"
    done = helpers.run(
        "convert", f"--from={tmp_path / 'run'}", f"--to={to}", "--format=hf", "--check"
    )
    assert done.returncode == 0, done.stderr
    assert "native format" in done.stdout
    assert "tensors are equal, bit by bit" in done.stdout
    assert f"written to {to}" in done.stdout
    ours = helpers.run(
        *("generate", f"--checkpoint={tmp_path / 'run'}", "--prompt=w1 w2"),
        "--config.decode.max_new_tokens=8",
    )
    assert ours.returncode == 0, ours.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    model = transformers.AutoModelForCausalLM.from_pretrained(to)
    prompt = tokenizer("w1 w2", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ours.stdout == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"


def test_a_converted_model_is_announced_and_generates(tmp_path, shared):
    came = shared("checkpoints/stories260K/stories260K.bin")
    done = helpers.run("convert", f"--from={came}", f"--to={tmp_path / 'native'}")
    assert done.returncode == 0, done.stderr
    assert "llama2c format, 260,032 parameters in float32" in done.stdout
    assert "5 layers, dim 64, 8 heads, 4 key heads" in done.stdout
    assert "tokenizer: sp" in done.stdout
    said = helpers.run(
        *("generate", f"--checkpoint={tmp_path / 'native'}", "--prompt=Once upon a time"),
        "--config.decode.max_new_tokens=20",
    )
    assert said.stdout.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.slow
def test_sampling_is_seeded(tmp_path, shared):
    came = shared("checkpoints/stories260K/stories260K.bin")
    helpers.run("convert", f"--from={came}", f"--to={tmp_path / 'native'}")

    def text(seed):
        options = ["--config.decode.temperature=1.0", f"--config.decode.seed={seed}"]
        return helpers.run(
            *("generate", f"--checkpoint={tmp_path / 'native'}", "--prompt=Once", *options)
        ).stdout

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from=/nowhere", "--to=/tmp/x"], "/nowhere does not exist"),
        (["--to=/tmp/x"], "--from"),
        (["--from=/tmp", "--to=/tmp/x", "--format=gguf"], "native|hf|meta"),
        (["--from=/tmp", "--to=/tmp/x", "--dtype=int8"], "float32|float16|bfloat16"),
    ],
    ids=["no source", "no flag", "unknown format", "unknown dtype"],
)
def test_convert_refuses_in_one_line(flags, words):
    done = helpers.run("convert", *flags)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    example = "as in\n" in done.stderr  # of a command that lacks a flag
    assert len(done.stderr.strip().splitlines()) == 1 + example


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--checkpoint=/nowhere", "--prompt=a"],
            "/nowhere does not exist; give a folder of weights",
        ),
        (["--config.decode.max_new_tokens=1000"], "try --config.decode.max_new_tokens=61"),
        (["--config.decode.max_new_tokens=0"], "decode.max_new_tokens=0 must be positive"),
        (["--config.decode.temperature=-1.0"], "decode.temperature=-1.0 must not be negative"),
        (["--config.decode.seed=3"], "decode.seed=3 has no effect"),
        (["--config.decode.temprature=1.0"], "nearest: --config.decode.temperature"),
        (["--prompt=\udcff"], "surrogate"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_generate_refuses_in_one_line(flags, words, byte_model):
    given = [f"--checkpoint={byte_model}", "--prompt=ab", *flags]
    done = helpers.run("generate", *given)
    assert done.returncode in (1, 2), done.stdout
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A model folder with the byte tokenizer, 64 positions, random weights."""
    import dataclasses
    import json

    folder = tmp_path_factory.mktemp("byte")
    model = dataclasses.replace(small.MODEL, vocab_size=259)
    came = small.hf(folder / "hf", small.state(model), vocab_size=259)
    small.convert(came, folder / "native", "native")
    said = json.loads((folder / "native/model.json").read_text())
    (folder / "native/model.json").write_text(json.dumps({**said, "tokenizer": "byte"}))
    return folder / "native"


def test_a_model_without_a_tokenizer_says_how_to_give_it_one(tmp_path):
    small.convert(small.hf(tmp_path / "hf"), tmp_path / "native", "native")
    done = helpers.run("generate", f"--checkpoint={tmp_path / 'native'}", "--prompt=a")
    assert done.returncode == 1
    assert "--tokenizer=FILE" in done.stderr


def test_a_tokenizer_with_more_ids_than_the_model_is_not_generated_with(tmp_path):
    small.convert(small.hf(tmp_path / "hf"), tmp_path / "native", "native")
    (tmp_path / "native/tokenizer.model").write_bytes(small.sentencepiece(49))
    done = helpers.run("generate", f"--checkpoint={tmp_path / 'native'}", "--prompt=a")
    assert done.returncode == 1
    assert "the tokenizer has 49 ids, more than model.vocab_size=48" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_was_killed_goes_on(tmp_path, number):
    model = config.Model(
        vocab_size=4096, dim=512, layers=40, heads=8, kv_heads=4, head_dim=64, ffn_dim=1408
    )
    synthetic.write(tmp_path / "meta", model, 1, np.dtype(np.float32))
    to = tmp_path / "to"
    flags = [f"--from={tmp_path / 'meta'}", f"--to={to}"]
    process = helpers.start("convert", *flags)
    stage = to.with_name("to.unfinished")
    deadline = time.monotonic() + 60
    while not (stage / "arrays").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, number)
    output = process.communicate()[0]
    assert process.returncode in (-signal.SIGKILL, 130), output
    assert "Traceback" not in output
    assert not to.exists()
    assert stage.exists()
    done = helpers.run("convert", *flags, "--check")
    assert done.returncode == 0, done.stderr
    assert to.exists()
    assert not stage.exists()
