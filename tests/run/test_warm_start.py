"""Runs that begin with the weights of another."""

import json
import shutil

import jax
import numpy as np
import pytest

from llama_jax import config, sharding, tree
from llama_jax.convert import native
from llama_jax.model import transformer
from tests.experiments import helpers

STEPS = "--config.train.steps=4"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a run of 4 steps, and the arguments of runs on its text."""
    folder = tmp_path_factory.mktemp("base")
    done = helpers.run("train", *helpers.arguments(folder, STEPS))
    assert done.returncode == 0, done.stderr
    return folder


def train(base, name, *flags):
    return helpers.run("train", *helpers.arguments(base, STEPS, *flags, workdir=name))


def params(folder):
    model, _, _ = native.settings(folder)
    module = transformer.build(model, sharding.make(config.Mesh(), jax.devices()[:1]))
    return {
        path: np.asarray(leaf) for path, leaf in tree.paths(native.load(folder, module)).items()
    }


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.init_from=/nowhere"], "train.init_from=/nowhere: /nowhere"),
        (
            ["--config.optim.train=('embd',)", "--config.train.init_from={base}/run"],
            "nearest: 'embed'",
        ),
        (
            ["--config.train.init_from={base}/run", "--config.train.init_checksum=0123"],
            "have the checksum",
        ),
        (
            ["--config.train.init_from={base}/run", "--config.model.ffn_dim=48"],
            "does not hold the parameters",
        ),
    ],
)
def test_what_cannot_begin_is_said(base, flags, message):
    done = train(base, "bad", *(flag.replace("{base}", str(base)) for flag in flags))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_every_parameter_resumes_without_its_base(base):
    """The base may have trained on, or be gone."""
    begins = [f"--config.train.init_from={base}/first"]
    shutil.copytree(base / "run", base / "first")
    done = train(base, "whole", *begins)
    assert done.returncode == 0, done.stderr
    assert "of them trained" not in done.stdout
    shutil.rmtree(base / "first")
    again = train(base, "whole", *begins)
    assert again.returncode == 0, again.stderr
    assert "already trained" in again.stdout
    other = train(base, "whole", *begins, "--config.train.init_checksum=0123")
    assert other.returncode == 1
    assert "first" in other.stderr


def test_a_study_does_not_begin_with_trained_weights(base):
    flags = ["--config=configs/ablations/norm.py", f"--config.base.train.init_from={base}/run"]
    done = helpers.run("ablate", *flags, f"--workdir={base}/study", "--list")
    assert done.returncode == 1
    assert "the runs of a study begin from their seeds" in done.stderr


def test_a_part_is_trained_and_the_folder_is_the_whole_network(base):
    """Its checkpoints hold that part; what reads the folder finds the rest in the base."""
    part = ["--config.optim.train=('*/attention/*', 'D')", f"--config.train.init_from={base}/run"]
    part += ["--config.checkpoint.every=2"]
    done = train(base, "part", *part)
    assert done.returncode == 0, done.stderr
    assert "of them trained" in done.stdout
    before, after = params(base / "run"), params(base / "part")
    assert before.keys() == after.keys()
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {path for path in before if "/attention/" in path or path.endswith("scale")}
    recorded = json.loads((base / "part/run.json").read_text())["train"]
    assert recorded["init_checksum"] == native.identity(base / "run")
    losses = [row["loss"] for row in rows(base / "part")]
    assert losses[0] < rows(base / "run")[-1]["loss"] + 0.3, "it begins where the base has ended"
    shutil.rmtree(base / "part/checkpoints/4")
    more = train(base, "part", *part)
    assert "resuming at step 2" in more.stdout, more.stderr
    assert [row["loss"] for row in rows(base / "part")] == losses
    asked = [f"--checkpoint={base}/part", "--prompt=w1", "--config.decode.max_new_tokens=4"]
    said = helpers.run("generate", *asked)
    assert said.returncode == 0, said.stderr
    (base / "run").rename(base / "moved")
    said = helpers.run("generate", *asked)
    assert f"{base}/part: its frozen parameters lie in train.init_from={base}/run" in said.stderr
    (base / "moved").rename(base / "run")
    shutil.rmtree(base / "run/checkpoints/4/state/d")
    again = train(base, "part", *part)
    assert again.returncode == 1
    assert "train.init_checksum" in again.stderr
