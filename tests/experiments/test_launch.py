"""What launch prints, word for word, and what it does against a cloud that is a script."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.experiments import helpers

GOLDEN = Path(__file__).parent / "golden"
TPU = ("--tpu=seven", "--zone=us-central2-b", "--workdir=~/bucket/7b")
CASES = {
    "one_host": ("--config=configs/research_1b.py:v5e_8", "--tpu=one", "--zone=us-west4-a",
                 "--workdir=runs/1b", "--direct", "--project=mine"),
    "four_hosts": ("--config=configs/7b.py:v4_32", *TPU, "--bucket=mine", "--spot",
                   "--config.data.threads=8", "--config.log.wandb=on", "--secrets=WANDB_API_KEY"),
    "two_slices": ("--config=configs/7b.py:v5e_256x2", *TPU),
    "slurm": ("--config=configs/research_1b.py:h100_8", "--workdir=/scratch/1b", "--partition=gpu",
              "--account=lab"),
}  # fmt: skip
KEY = "abcdef0123456789"


def launch(*args, path="", **more):
    environment = {
        **helpers.environment(),
        "LLAMA_JAX_CODE": "0123456789ab",
        "WANDB_API_KEY": KEY,
        **more,
    }
    environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        helpers.command("launch", *args), cwd=helpers.ROOT, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_commands_are_those_of_the_golden_file(name):
    """When they change on purpose: run the case and put its output in the file, after reading it."""
    done = launch(*CASES[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"launch_{name}.txt").read_text()
    assert KEY not in done.stdout


@pytest.mark.parametrize("name", CASES)
def test_a_shell_can_read_them(name):
    checked = subprocess.run(["bash", "-n", GOLDEN / f"launch_{name}.txt"], check=False)
    assert checked.returncode == 0


CLOUD = """\
    import json, os, sys
    from pathlib import Path
    home, words = Path(os.environ["CLOUD"]), sys.argv[1:]
    words = [Path(word).read_text() if "secrets" in word else word for word in words]
    (home / "calls").open("a").write(json.dumps(words) + "\\n")
    kind, verb = words[2:4]
    script = json.loads((home / "script").read_text())
    if verb == "describe" or "--worker=0" in words:
        answer = script["state" if verb == "describe" else "log"].pop(0)
        (home / "script").write_text(json.dumps(script))
        if answer.startswith("!"):
            sys.exit(answer[1:])
        print(answer)
    """


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that answers what a script says and writes down what it is asked."""

    binary = tmp_path / "bin" / "gcloud"
    binary.parent.mkdir()
    binary.write_text(f"#!{sys.executable}\n" + textwrap.dedent(CLOUD))
    binary.chmod(0o755)

    def go(state, log, *args):
        (tmp_path / "script").write_text(json.dumps({"state": state, "log": log}))
        done = launch(
            "--config=configs/7b.py:v4_32", *TPU, "--go", "--poll=0.01", *args,
            path=binary.parent, CLOUD=str(tmp_path),
        )  # fmt: skip
        calls = (
            (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        )
        return done, [json.loads(line) for line in calls]

    return go


def verbs(calls):
    return [words[3] for words in calls if words[3] != "describe" and "--worker=0" not in words]


NOT_THERE = "!NOT_FOUND: no such resource"


def test_a_slice_that_is_taken_away_is_rented_again_and_the_run_started_again(cloud):
    state = [
        NOT_THERE,
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
        "ACTIVE",
        "SUSPENDED",
    ]  # rented, watched, taken
    state += ["SUSPENDED", "SUSPENDED"]  # found so, given back
    state += [NOT_THERE, "ACTIVE", "ACTIVE", "ACTIVE"]  # rented again, watched to the end
    log = ["-", "-\nstep 5/10", "-", "-\nstep 7/10", "0\nwritten", "0\nmore\nwritten"]
    done, calls = cloud(state, log)
    assert done.returncode == 0, done.stderr
    started = ["create", "scp", "ssh", "ssh"]
    assert verbs(calls) == [*started, "delete", *started]
    assert done.stdout.splitlines() == ["step 5/10", "step 7/10"]
    assert "exit code 0; the end of its log:\nmore\nwritten" in done.stderr
    assert "to give it back:\n  gcloud compute tpus queued-resources delete seven" in done.stderr


def test_started_again_it_watches_the_run_that_is_there(cloud):
    done, calls = cloud(["ACTIVE"] * 3, ["-\nstep 5/10", "3\nerror: x", "3\nerror: x"])
    assert done.returncode == 3
    assert verbs(calls) == []


def test_secrets_go_to_the_hosts_and_nowhere_else(cloud):
    done, calls = cloud(
        [NOT_THERE, "ACTIVE", "ACTIVE"],
        ["-", "1\nx", f"1\nwrong key {KEY}"],
        "--secrets=WANDB_API_KEY",
    )
    assert done.returncode == 1
    assert KEY not in done.stdout + done.stderr
    assert "wrong key $WANDB_API_KEY" in done.stderr
    holding = [words for words in calls if any(KEY in word for word in words)]
    assert [words[3:5] for words in holding] == [["scp", f"WANDB_API_KEY={KEY}\n"]]


def test_what_the_cloud_refuses_is_said(cloud):
    done, calls = cloud(["!PERMISSION_DENIED: log in first"], [])
    assert done.returncode == 1
    assert "PERMISSION_DENIED: log in first" in done.stderr
    assert "Traceback" not in done.stderr
    assert verbs(calls) == []


def test_the_archive_is_the_working_tree_without_what_git_ignores(tmp_path):
    from experiments import cloud

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("a.py", "b with space.py", "run.log", ".gitignore"):
        (tmp_path / name).write_text("*.log\n")
    subprocess.run(["git", "add", "a.py"], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", cloud.pack("out.tgz")], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["tar", "tzf", tmp_path / "out.tgz"], capture_output=True, text=True, check=True
    )
    assert {"a.py", "b with space.py", ".gitignore"} <= set(listed.stdout.splitlines())
    assert "run.log" not in listed.stdout


def test_the_start_leaves_log_and_exit_code(tmp_path):
    """The line that hosts run, with a train of our own."""
    from experiments import cloud

    (tmp_path / "llama_jax/.venv/bin").mkdir(parents=True)
    python = tmp_path / "llama_jax/.venv/bin/python"
    python.write_text('#!/bin/sh\necho "$TOKEN $LLAMA_JAX_CODE $5"; exit 7\n')
    python.chmod(0o755)
    (tmp_path / ".llama_jax_env").write_text("TOKEN='a b'\n")
    line = cloud.start(["--config=x", "--workdir=it's"], "abc", secrets=True)
    home = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=home, check=True)
    seen = subprocess.run(
        ["bash", "-c", cloud.look(1)],
        cwd=tmp_path,
        env=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "7\na b abc --workdir=it's\n"


REFUSED = {
    "no slice": (["--config=configs/7b.py", "--workdir=x"], r"launching needs a slice"),
    "no zone": (["--config=configs/7b.py:v4_32", "--workdir=x", "--tpu=a"], r"both a name and a zone"),
    "direct slices": (["--config=configs/7b.py:v5e_256x2", *TPU, "--direct"], r"leave --direct out"),
    "secret": (["--config=configs/7b.py:v4_32", *TPU, "--secrets=NOT_SET_HERE"], r"NOT_SET_HERE: not set"),
    "does not fit": (
        ["--config=configs/7b.py:v4_32", *TPU, "--config.model.remat=none", "--config.train.microbatches=16"], r"needs \d+\.\d GiB a chip and v4_32 has 30\.75",
    ),
    "tpu on gpus": (["--config=configs/research_1b.py:h100_8", *TPU], r"have no effect on 8xH100"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_before_anything_costs_money(name):
    args, reason = REFUSED[name]
    done = launch(*args)
    assert done.returncode == 1
    assert re.search(reason, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
