"""What launch prints, word for word, and what it does against a cloud that is a script."""

import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llama_jax.run import cloud as command_lines
from tests.experiments import helpers

GOLDEN = Path(__file__).parent / "golden"
TPU = ("--tpu=seven", "--zone=us-central2-b", "--workdir=~/bucket/7b", "--bucket=mine")
CASES = {
    "one_host": ("--config=configs/research_1b.py:v5e_8", "--tpu=one", "--zone=us-west4-a",
                 "--workdir=runs/1b", "--direct", "--project=mine"),
    "four_hosts": ("--config=configs/7b.py:v4_32", *TPU, "--spot",
                   "--config.data.threads=8", "--config.log.wandb=on", "--secrets=WANDB_API_KEY"),
    "two_slices": ("--config=configs/7b.py:v5e_256x2", *TPU),
    "slurm_nodes": ("--config=configs/65b.py:a100_2048", "--workdir=/scratch/65b", "--time=2-0"),
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
    words = [Path(word).read_text() if word.endswith("/secrets") else word for word in words]
    (home / "calls").open("a").write(json.dumps(words) + "\\n")
    script = json.loads((home / "script").read_text())
    if words[0] == "storage":
        answer = script["storage"]["ls" if "ls" in words else "describe"]
        sys.exit(answer[1:]) if answer.startswith("!") else print(answer)
        sys.exit()
    kind, verb = words[2:4]
    failing = script.get("failing", {}).get(verb, [])
    if failing and "--worker=0" not in words:
        answer = failing.pop(0)
        (home / "script").write_text(json.dumps(script))
        sys.exit(answer or None)
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
    binary.write_text(f"#!{sys.executable} -IS\n" + textwrap.dedent(CLOUD))
    binary.chmod(0o755)

    def go(state, log, *args, failing=None, storage=None, **more):
        """failing: of a verb, what each call of it fails with; "" succeeds."""
        storage = {"describe": "True", "ls": "gs://mine/x", **(storage or {})}
        script = {"state": state, "log": log, "failing": failing or {}, "storage": storage}
        (tmp_path / "script").write_text(json.dumps(script))
        done = launch(
            "--config=configs/research_10m.py:v4_32", *TPU, "--go", "--poll=0.01", *args,
            path=binary.parent, CLOUD=str(tmp_path), TMPDIR=str(tmp_path), **more,
        )  # fmt: skip
        calls = (
            (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        )
        return done, [json.loads(line) for line in calls]

    return go


def verbs(calls):
    """What the TPU API was asked to do."""
    calls = [words for words in calls if words[0] == "compute" and "--worker=0" not in words]
    return [words[3] for words in calls if words[3] != "describe"]


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
    log = ["running\nx", f"{word}\nx", f"{word}\nx", "finished\nx", "finished\nx"]
    done, calls = cloud(["ACTIVE"] * 3, log)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == STARTED


def test_what_ended_before_does_not_keep_the_same_command_from_starting(cloud):
    """Its code may have been mended since; on its own end with the same error it is given up."""
    log = ["1\nerror: old", "running\nx", *["1\nerror: new"] * 2]
    done, calls = cloud(["ACTIVE"] * 4, log)
    assert done.returncode == 1
    assert verbs(calls) == STARTED
    assert "error: old" not in done.stderr
    assert "the run has ended: 1; the end of its log:\nerror: new" in done.stderr


def test_a_slice_that_runs_another_command_is_left_alone(cloud):
    done, calls = cloud(["ACTIVE"], ["other\nstep 5/10"], "--spot")
    assert done.returncode == 1
    assert verbs(calls) == []
    assert "error: seven is running another command; wait for its end" in done.stderr


@pytest.mark.parametrize(
    ("end", "flags", "last"),
    [
        (["finished\nx"] * 2, ["--spot"], ["delete"]),
        (["finished\nx"] * 2, ["--spot", "--nogive_back"], []),
        (["finished\nx"] * 2, [], []),
        (["running\nx", *["2\nerror: x"] * 2], ["--give_back"], ["delete"]),
    ],
)
def test_a_slice_is_given_back_when_its_run_is_finished_or_given_up(cloud, end, flags, last):
    state = ["ACTIVE"] * (2 if end[0] == "running\nx" else 0) + ["ACTIVE", "ACTIVE", "DELETING"]
    done, calls = cloud(state, end, *flags)
    assert done.returncode == (0 if "finished" in end[-1] else 2), done.stderr
    assert verbs(calls) == last
    assert ("seven is given back" in done.stderr) == bool(last)
    assert ("to give the slice back:" in done.stderr) != bool(last)


def test_a_slice_whose_run_goes_on_is_not_given_back(cloud):
    """The cloud refuses to be asked: who watches it ends, the run does not."""
    done, calls = cloud(["ACTIVE", "!UNAUTHENTICATED: log in"], ["running\nx"], "--spot")
    assert done.returncode == 1
    assert verbs(calls) == []
    assert "UNAUTHENTICATED: log in" in done.stderr
    assert "to give the slice back:" in done.stderr


def test_what_is_being_taken_away_is_waited_for(cloud):
    """It cannot be deleted until it is SUSPENDED."""
    state = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", NOT_THERE, *["ACTIVE"] * 2]
    done, calls = cloud(state, ["running\nx", "-", "finished\nx", "finished\nx"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SUSPENDING; waiting") == 1
    assert verbs(calls) == ["delete", "create", *STARTED]
    assert "has ended: its host" not in done.stderr, "a new slice has no run that could end"


def test_a_cloud_that_fails_for_a_moment_to_create_or_delete_is_asked_again(cloud):
    failing = {
        "create": ["INTERNAL: try later", "ALREADY_EXISTS: seven"],
        "delete": ["FAILED_PRECONDITION: not yet", "NOT_FOUND: seven"],
    }
    state = [NOT_THERE, NOT_THERE, "SUSPENDED", "SUSPENDED", *["ACTIVE"] * 2]
    done, calls = cloud(state, ["-", "finished\nx", "finished\nx"], failing=failing)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create"] * 2 + ["delete"] * 2 + STARTED
    assert "INTERNAL: try later; trying again" in done.stderr


def test_a_quota_that_is_too_small_is_said_at_once(cloud):
    done, calls = cloud([NOT_THERE], [], failing={"create": ["RESOURCE_EXHAUSTED: quota of v4"]})
    assert done.returncode == 1
    assert verbs(calls) == ["create"]
    assert "RESOURCE_EXHAUSTED: quota of v4" in done.stderr


def test_a_host_that_does_not_answer_yet_is_filled_again(cloud):
    """Shells refuse for a moment after a slice is ready."""
    failing = {"scp": ["port 22: Connection refused", ""]}
    done, calls = cloud(["ACTIVE"] * 4, ["-", "-", "finished\nx", "finished\nx"], failing=failing)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["scp", *STARTED]
    assert "Connection refused" in done.stderr


def test_hosts_that_cannot_be_set_up_are_given_up_and_given_back(cloud):
    failing = {"ssh": ["no such package"] * 5}
    done, calls = cloud(["ACTIVE"] * 11 + [NOT_THERE], ["-"] * 5, "--spot", failing=failing)
    assert done.returncode == 1
    assert "error: seven could not be set up, 5 times in a row" in done.stderr
    assert verbs(calls) == ["scp", "ssh"] * 5 + ["delete"]


def test_taken_away_while_it_is_filled_is_no_error(cloud):
    state = ["ACTIVE", "SUSPENDING", "SUSPENDED", NOT_THERE, "ACTIVE", "ACTIVE"]
    log = ["-", "-", "finished\nx", "finished\nx"]
    done, calls = cloud(state, log, failing={"ssh": ["connection closed", "", ""]})
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["scp", "ssh", "delete", "create", *STARTED]


def test_a_second_launch_of_the_name_on_this_machine_is_refused(cloud, tmp_path):
    with open(
        tmp_path / f"llama_jax_launch_{os.getuid()}_default_us-central2-b_seven.lock", "w"
    ) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done, calls = cloud([], [])
    assert done.returncode == 1
    assert "error: --tpu=seven: another launch on this machine is watching it" in done.stderr
    assert calls == []


def test_a_bucket_is_there_with_folders_and_what_the_run_reads(cloud):
    """Before anything is rented."""
    data = ["--config.data.tokenizer.path=~/bucket/sp/tokenizer.model"]
    done, calls = cloud([], [], *data, storage={"ls": "!One or more URLs matched no objects."})
    assert done.returncode == 1
    assert "gs://mine/sp/tokenizer.model is not there" in done.stderr
    assert verbs(calls) == []
    done, _ = cloud([], [], storage={"describe": "!gs://mine not found: 404."})
    assert done.returncode == 1
    assert "--bucket=mine: there is none" in done.stderr
    assert "buckets create gs://mine --location=us-central2 " in done.stderr
    assert "--enable-hierarchical-namespace" in done.stderr
    flat, _ = cloud(["ACTIVE"], ["finished\nx"] * 2, storage={"describe": ""})
    assert flat.returncode == 0
    assert "note: --bucket=mine is flat" in flat.stderr


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


def until(host, word, workdir="runs/x", arguments=()):
    for _ in range(100):
        seen = host(command_lines.look(workdir, 1, arguments))
        if seen.split("\n")[0] == word:
            return seen
        time.sleep(0.05)
    pytest.fail(seen)


def test_the_start_returns_and_leaves_log_and_exit_code(host, tmp_path):
    """Whatever waits for the end of its output, as ssh does, is let go while the run goes on."""
    assert host(command_lines.look("~/it's", 1, ["--config=x"])) == "-\n"
    (tmp_path / ".llama_jax_env").write_text("TOKEN='a b'\n")
    arguments = ["--config=x", "--workdir=it's"]
    line = command_lines.start(arguments, "abc", secrets=True)
    train = 'echo "$TOKEN $LLAMA_JAX_CODE $5"; while ! test -e go; do sleep 0.05; done; exit 7'
    host(line, train)
    seen = until(host, "running", arguments=arguments)
    assert seen in ("running\n", "running\na b abc --workdir=it's\n")
    assert until(host, "other", arguments=["--config=y"]).startswith("other")
    (tmp_path / "llama_jax/go").touch()
    assert until(host, "7", arguments=arguments) == "7\na b abc --workdir=it's\n"
    assert until(host, "-", arguments=["--config=y"]).startswith("-"), (
        "another run's end is not its"
    )


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
    "own workdir of each": (
        ["--config=configs/7b.py:v4_32", *TPU[:2], "--workdir=/tmp/7b"],
        r"'/tmp/7b' is another folder on each of the 4 hosts; try --bucket=NAME --workdir='~/bucket/7b'",
    ),
    "own workdir of a spot slice": (
        ["--config=configs/research_10m.py:v4_8", *TPU[:2], "--workdir=runs/x", "--spot"],
        r"'runs/x' is lost when a spot slice is taken away",
    ),
    "results given back": (
        ["--config=configs/research_10m.py:v4_8", *TPU[:2], "--workdir=~/x", "--give_back"],
        r"'~/x' is deleted with the slice that --give_back gives back",
    ),
    "no bucket": (["--config=configs/7b.py:v4_32", *TPU[:3]], r"is in a bucket: name it with --bucket=NAME"),
    "workdir as address": (
        ["--config=configs/7b.py:v4_32", *TPU[:2], "--workdir=gs://mine/7b"],
        r"must be a path on the hosts; try --bucket=mine --workdir='~/bucket/7b'",
    ),
    "bucket as address": (
        ["--config=configs/7b.py:v4_32", *TPU[:3], "--bucket=gs://mine/x"],
        r"--bucket='gs://mine/x' must be the name alone; try --bucket=mine",
    ),
    "capitals": (
        ["--config=configs/7b.py:v4_32", "--tpu=My_TPU", *TPU[1:]],
        r"--tpu='My_TPU' must be small letters, digits and hyphens.*try --tpu=my-tpu",
    ),
    "bucket in capitals": (
        ["--config=configs/7b.py:v4_32", *TPU[:3], "--bucket=Mine"], r"--bucket='Mine' .* try --bucket=mine",
    ),
    "region": (
        ["--config=configs/7b.py:v4_32", TPU[0], "--zone=us-central2", *TPU[2:]],
        r"--zone='us-central2' must be a zone, as us-central2-b",
    ),
    "data not copied": (
        ["--config=configs/llama2_7b.py:v4_32", *TPU, "--go"],
        r"the config reads rows/llama2, tokenizer.model, and those are not among the files that are copied",
    ),
    "weights not copied": (
        ["--config=configs/llama2_7b.py:v4_32", *TPU, "--config.train.init_from=runs/base", "--go"],
        r"the config reads rows/llama2, tokenizer.model, runs/base, and those .* and --config.train.init_from to",
    ),
    "weights not here": (
        ["--config=configs/llama2_7b.py:h100_64", "--workdir=/scratch/x", "--config.train.init_from=/base", "--go"],
        r"tokenizer.model, /base, and those are not here; .* and --config.train.init_from to where they are",
    ),
    "data not here": (
        ["--config=configs/llama2_7b.py:h100_64", "--workdir=/scratch/x", "--go"],
        r"the config reads rows/llama2, tokenizer.model, and those are not here",
    ),
    "own workdir of each node": (
        ["--config=configs/7b.py:h100_16", "--workdir=/tmp/x"], r"must be a folder that all 2 nodes see",
    ),
    "time of slurm": (
        ["--config=configs/7b.py:v4_32", *TPU, "--time=1:00"], r"--time has no effect on v4-32",
    ),
    "tpu on gpus": (["--config=configs/research_1b.py:h100_8", *TPU], r"--tpu has no effect on 8xH100: SLURM runs it"),
}  # fmt: skip


def test_the_longest_secret_is_replaced_first(cloud):
    """One may be a part of another."""
    values = {"HF_TOKEN": "abc12", "WANDB_API_KEY": "abc12-the-rest"}
    end = ["1\nkeys abc12-the-rest abc12"] * 2
    done, _ = cloud(
        ["ACTIVE"] * 3, ["running\nx", *end], "--secrets=HF_TOKEN,WANDB_API_KEY", **values
    )
    assert "keys $WANDB_API_KEY $HF_TOKEN" in done.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_before_anything_costs_money(name):
    args, reason = REFUSED[name]
    done = launch(*args)
    assert done.returncode == 1
    assert re.search(reason, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
