"""What launch prints, word for word, and what it does against a cloud that is a script."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments import cloud as command_lines
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
    return helpers.run("launch", *args, env=environment, timeout=120)


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
STARTED = ["scp", "ssh", "ssh"]


def test_a_slice_that_is_taken_away_is_rented_again_and_the_run_started_again(cloud):
    rented = [NOT_THERE, "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"]
    state = [*rented, "SUSPENDED", NOT_THERE, "ACTIVE", "ACTIVE", "ACTIVE"]
    log = ["-", "running\nstep 5/10", "-", "running\nstep 7/10", "finished\nx", "finished\nmore\nx"]
    done, calls = cloud(state, log)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", *STARTED, "delete", "create", *STARTED]
    assert done.stdout.splitlines() == ["step 5/10", "step 7/10"]
    assert "the run has ended: finished; the end of its log:\nmore\nx" in done.stderr
    assert (
        "to give the slice back:\n  gcloud compute tpus queued-resources delete seven"
        in done.stderr
    )


def test_started_again_it_watches_the_run_that_is_there(cloud):
    """Also when the host cannot be asked for once."""
    done, calls = cloud(
        ["ACTIVE"] * 3, ["!ssh: timed out", "running\nstep 5/10", "finished\nx", "finished\nx"]
    )
    assert done.returncode == 0
    assert verbs(calls) == []


def test_a_run_that_ends_with_an_error_of_its_own_is_not_started_again(cloud):
    done, calls = cloud(["ACTIVE"] * 3, ["running\nstep 5/10", "1\nerror: x", "1\nerror: x"])
    assert done.returncode == 1
    assert verbs(calls) == []
    assert "the run has ended: 1; the end of its log:\nerror: x" in done.stderr


@pytest.mark.parametrize("word", ["0", "134", "-"])
def test_a_run_that_was_cut_off_is_started_again(cloud, word):
    """Saved on a signal to one host, aborted because another was lost, gone with a restart of the machine."""
    tail = [] if word == "-" else [f"{word}\nx"]
    done, calls = cloud(["ACTIVE"] * 2, [f"{word}\nx", *tail, "finished\nx", "finished\nx"])
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == STARTED


def test_a_slice_that_cannot_be_had_is_said_with_the_reason(cloud):
    done, calls = cloud([NOT_THERE, "FAILED", "state: FAILED, no quota for v4 in this zone"], [])
    assert done.returncode == 1
    assert "no quota for v4 in this zone" in done.stderr
    assert "to give the slice back" in done.stderr
    assert verbs(calls) == ["create"]


def test_a_cloud_that_stays_away_for_a_moment_is_asked_again(cloud):
    state = ["!503", "ACTIVE", "!503", "!503", "ACTIVE"]
    done, calls = cloud(state, ["running\nx", "finished\nx", "finished\nx"])
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == []


def test_secrets_go_to_the_hosts_and_nowhere_else(cloud):
    log = ["-", f"running\nwrong key {KEY}", f"1\nwrong key {KEY}", f"1\nwrong key {KEY}"]
    done, calls = cloud([NOT_THERE, *["ACTIVE"] * 4], log, "--secrets=WANDB_API_KEY")
    assert done.returncode == 1
    assert KEY not in done.stdout + done.stderr
    assert "wrong key $WANDB_API_KEY" in done.stderr
    assert "wrong key $WANDB_API_KEY" in done.stdout
    holding = [words for words in calls if any(KEY in word for word in words)]
    assert [words[3:5] for words in holding] == [["scp", f"WANDB_API_KEY={KEY}\n"]]


def test_what_the_cloud_refuses_is_said(cloud):
    done, calls = cloud(["!PERMISSION_DENIED: log in first"], [])
    assert done.returncode == 1
    assert "PERMISSION_DENIED: log in first" in done.stderr
    assert "Traceback" not in done.stderr
    assert verbs(calls) == []


def test_the_archive_is_the_working_tree_without_what_git_ignores(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("a.py", "b with space.py", "gone.py", "run.log", ".gitignore"):
        (tmp_path / name).write_text("*.log\n")
    subprocess.run(["git", "add", "a.py", "gone.py"], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    pack = ["bash", "-o", "pipefail", "-c", command_lines.pack("out.tgz")]
    subprocess.run(pack, cwd=tmp_path, check=True, capture_output=True)
    listed = subprocess.run(
        ["tar", "tzf", tmp_path / "out.tgz"], capture_output=True, text=True, check=True
    )
    assert {"a.py", "b with space.py", ".gitignore"} <= set(listed.stdout.splitlines())
    assert "run.log" not in listed.stdout


@pytest.fixture
def host(tmp_path):
    """The home of a host whose `train` is a script of the test's; shell commands run in it."""
    (tmp_path / "llama_jax/.venv/bin").mkdir(parents=True)
    python = tmp_path / "llama_jax/.venv/bin/python"

    def shell(line, train=None):
        if train:
            python.write_text(f"#!/bin/sh\n{train}\n")
            python.chmod(0o755)
        home = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=home, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return shell


def until(host, word, workdir="runs/x"):
    for _ in range(100):
        seen = host(command_lines.look(workdir, 1))
        if seen.split("\n")[0] == word:
            return seen
        time.sleep(0.05)
    pytest.fail(seen)


def test_the_start_returns_and_leaves_log_and_exit_code(host, tmp_path):
    """Whatever waits for the end of its output, as ssh does, is let go while the run goes on."""
    assert host(command_lines.look("~/it's", 1)) == "-\n"
    (tmp_path / ".llama_jax_env").write_text("TOKEN='a b'\n")
    line = command_lines.start(["--config=x", "--workdir=it's"], "abc", secrets=True)
    train = 'echo "$TOKEN $LLAMA_JAX_CODE $5"; while ! test -e go; do sleep 0.05; done; exit 7'
    host(line, train)
    assert until(host, "running") in ("running\n", "running\na b abc --workdir=it's\n")
    (tmp_path / "llama_jax/go").touch()
    assert until(host, "7") == "7\na b abc --workdir=it's\n"


@pytest.mark.parametrize("workdir", ["~/bucket/a b", "runs/x"])
def test_a_run_is_finished_when_its_results_are_there(host, tmp_path, workdir):
    host(command_lines.start([], "abc"), "exit 0")
    until(host, "0", workdir)
    place = tmp_path / workdir[2:] if workdir[0] == "~" else tmp_path / "llama_jax" / workdir
    place.mkdir(parents=True)
    (place / "runcard.json").touch()
    until(host, "finished", workdir)


def test_a_machine_that_started_again_has_no_run(host, tmp_path):
    host(command_lines.start([], "abc"), "sleep 30")
    until(host, "running")
    os.kill(int((tmp_path / "train.pid").read_text()), 9)
    until(host, "-")


REFUSED = {
    "no slice": (["--config=configs/7b.py", "--workdir=x"], r"a slice is needed"),
    "no zone": (["--config=configs/7b.py:v4_32", "--workdir=x", "--tpu=a"], r"both a name and a zone"),
    "direct slices": (["--config=configs/7b.py:v5e_256x2", *TPU, "--direct"], r"leave --direct out"),
    "secret": (["--config=configs/7b.py:v4_32", *TPU, "--secrets=NOT_SET_HERE"], r"NOT_SET_HERE: not set"),
    "does not fit": (
        ["--config=configs/7b.py:v4_32", *TPU, "--config.model.remat=none", "--config.train.microbatches=16"], r"needs \d+\.\d GiB a chip and v4_32 has 30\.75",
    ),
    "two words": (["--config=configs/7b.py:v4_32", *TPU, "--config.data.threads", "3"], r"--config.data.threads: write it as --name=value"),
    "tpu on gpus": (["--config=configs/research_1b.py:h100_8", *TPU], r"have no effect on 8xH100"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_before_anything_costs_money(name):
    args, reason = REFUSED[name]
    done = launch(*args)
    assert done.returncode == 1
    assert re.search(reason, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
