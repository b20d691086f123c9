"""Smaller weights as a user makes them, and goes on with them."""

import dataclasses
import json
import re

import pytest

from tests.convert import small
from tests.experiments import helpers

FOUR = ["--config.quant.bits=4", "--config.quant.rows=8", "--config.quant.row_tokens=32"]
PERPLEXITY = re.compile(r"perplexity ([+-][0-9.]+)% \+- ([0-9.]+)%")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the byte tokenizer, 64 positions, random weights, as a run on TPUs leaves it."""
    folder = tmp_path_factory.mktemp("quantise")
    sizes = dataclasses.replace(small.MODEL, vocab_size=259)
    came = small.hf(folder / "hf", small.state(sizes), vocab_size=259)
    small.convert(came, folder / "native", "native")
    said = json.loads((folder / "native/model.json").read_text())
    said |= {"tokenizer": "byte", "context": 64}
    said["model"]["kernel"] = "splash"  # needs a TPU, and rows of multiples of 128
    (folder / "native/model.json").write_text(json.dumps(said))
    return folder / "native"


def quantise(model, to, *flags):
    return helpers.run("quantise", f"--checkpoint={model}", f"--to={to}", *flags)


def test_on_a_text_and_what_comes_of_it_goes_on_with_texts(model, tmp_path):
    text = helpers.text(tmp_path / "text.txt", 8000)
    (model / "huggingface/chat_template.jinja").write_text("{{ messages }}")
    for bits, flags in (("8.", ["--config.quant.activations=int16"]), ("4.", FOUR)):
        to = tmp_path / bits
        done = quantise(model, to, f"--text={text}", *flags)
        assert done.returncode == 0, done.stderr
        assert 0 < float(PERPLEXITY.search(done.stdout)[2]) < 10  # of random weights
        assert (to / "huggingface/chat_template.jinja").read_text() == "{{ messages }}"
        size = sum(file.stat().st_size for file in to.rglob("*"))
        assert size < sum(file.stat().st_size for file in model.rglob("*"))
        asked = ["--prompt=w1 w2", "--config.decode.max_new_tokens=8"]
        said = helpers.run("generate", f"--checkpoint={to}", *asked)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith("w1 w2")
    again = quantise(to, tmp_path / "again")
    assert "bits already; give what it came of" in again.stderr
    out = helpers.run("convert", f"--from={to}", f"--to={tmp_path}/hf", "--format=hf")
    assert "convert the folder that they were made from" in out.stderr


@pytest.mark.slow
def test_a_run_is_calibrated_on_its_own_data(tmp_path):
    trained = helpers.run("train", *helpers.arguments(tmp_path, "--config.train.steps=4"))
    assert trained.returncode == 0, trained.stderr
    for name, flags, most in (("eight", [], 0.1), ("four", FOUR[:2], 2)):
        done = quantise(tmp_path / "run", tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        # All that are held back: more than eval.rows, which are 12.
        assert "the run's own data: 118 rows of 32 tokens are measured" in done.stdout
        assert ("8 calibrated" in done.stdout) == (name == "four")
        assert abs(float(PERPLEXITY.search(done.stdout)[1])) < most
    short = quantise(tmp_path / "run", tmp_path / "short", "--config.quant.row_tokens=8")
    assert "118 rows of 8 tokens are measured" in short.stdout


def test_without_text_it_reads_what_it_writes(model, tmp_path):
    done = quantise(model, tmp_path / "small", *FOUR)
    assert done.returncode == 0, done.stderr
    assert "texts of the network's own: 128 rows of 32 tokens are measured" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.quant.bits=3"], "quant.bits=3 must be 8 or 4"),
        (["--config.quant.group=64"], "quant.group=64 has no effect while quant.bits=8"),
        (["--text=/nowhere"], "--text=/nowhere cannot be read"),
        (["--to=/tmp"], "--to=/tmp is there already; name a new folder"),
        (["--to=/proc/nowhere/x"], "--to=/proc/nowhere/x cannot be written"),
        (
            ["--config.quant.bits=4", "--config.quant.row_tokens=1"],
            "quant.row_tokens=1 must be 2 or more",
        ),
        (["--checkpoint=/nowhere"], "/nowhere does not exist; give a folder of weights"),
    ],
)
def test_what_cannot_be_done_is_one_line(model, tmp_path, flags, message):
    done = quantise(model, tmp_path / "small", *flags)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "small.unfinished").exists()


def test_what_lies_beside_is_left_alone(model, tmp_path):
    (tmp_path / "small.unfinished").mkdir()
    (tmp_path / "small.unfinished/params_of_my_thesis.csv").write_text("mine")
    done = quantise(model, tmp_path / "small")
    assert (
        "small.unfinished is not an unfinished conversion; move it or name another" in done.stderr
    )
    assert (tmp_path / "small.unfinished/params_of_my_thesis.csv").read_text() == "mine"


def test_a_text_that_is_too_short_is_said(model, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    done = quantise(model, tmp_path / "small", f"--text={tmp_path}/short.txt")
    assert "is too short: its last tenth has 0 rows of 64 tokens, and 2 are needed" in done.stderr
    text = helpers.text(tmp_path / "text.txt", 1000)
    done = quantise(model, tmp_path / "small", f"--text={text}", "--config.quant.bits=4")
    assert "or --config.quant.rows=" in done.stderr
    rows = int(done.stderr.rpartition("rows=")[2])
    assert 10 < rows < 128
