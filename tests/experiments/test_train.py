"""The command that users type every day: what it writes, how it resumes, what it says when wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.train import metrics
from tests.experiments import helpers

STEPS = 40


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics.read(workdir / "metrics.jsonl")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run left alone: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("reference")
    done = helpers.run("train", *helpers.arguments(folder, f"--config.train.steps={STEPS}"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_ends_with_its_results_and_what_it_wrote(reference):
    folder, out = reference
    end = out[out.rindex("nats/token") :]
    values = {line.split()[0]: float(line.split()[1]) for line in end.splitlines()[1:4]}
    assert set(values) == {"validation", "unigram", "bigram"}
    assert 0 < values["bigram"] < values["unigram"] < 5.6
    assert "continuation:" in out
    for name in (
        "metrics.jsonl",
        "loss.png",
        "runcard.md",
        "runcard.json",
        "run.json",
        "checkpoints",
    ):
        assert (folder / "run" / name).exists()
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_what_is_promised(reference):
    rows = metrics.read(reference[0] / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = {
        "step",
        "loss",
        "tokens",
        "seconds",
        "tokens_per_second",
        "mfu",
        "grad_norm",
        "learning_rate",
    }
    assert wanted <= set(rows[0])
    assert rows[-1]["tokens"] == STEPS * 8 * 32
    evaluated = [row["step"] for row in rows if "validation_loss" in row]
    assert evaluated == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "it learns"


def test_the_run_card_adds_up(reference):
    card = json.loads((reference[0] / "run" / "runcard.json").read_text())
    assert card["tokens"] == STEPS * 8 * 32
    assert card["hardware"] == {"device": "cpu", "devices": 1, "watts": None}
    assert card["mfu"] is None
    assert card["kwh"] is None
    assert card["model_flops"] % card["tokens"] == 0
    assert "jax 0." in card["provenance"]["packages"]
    assert card["config"]["model"]["dim"] == 24
    assert 0 < card["epochs"]["corpus"] < 1
    assert card["results"]["validation_loss"] > 0


def kill_at(step: int, number: signal.Signals, args: list[str], workdir: Path) -> tuple[int, str]:
    """Start a run and signal it once metrics.jsonl has the step; exit code and output."""
    process = helpers.start("train", *args)
    path, deadline = workdir / "metrics.jsonl", time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, _ = process.communicate(timeout=100)
    return process.returncode, out


# Killed at 17 with checkpoints every 5: the second start goes on from 15, at the latest.
def test_killed_and_started_again_it_ends_with_the_same_loss_bit_for_bit(tmp_path, reference):
    args = helpers.arguments(tmp_path, f"--config.train.steps={STEPS}")
    code, _ = kill_at(17, signal.SIGKILL, args, tmp_path / "run")
    assert code == -signal.SIGKILL
    done = helpers.run("train", *args)
    assert done.returncode == 0, done.stderr
    resumed = int(done.stdout.split("resuming at step ")[1].split()[0])
    assert 0 < resumed < STEPS
    assert losses(tmp_path / "run") == losses(reference[0] / "run")
    finals = [
        metrics.read(f / "run" / "metrics.jsonl")[-1]["validation_loss"]
        for f in (tmp_path, reference[0])
    ]
    assert finals[0] == finals[1]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path, reference):
    args = helpers.arguments(
        tmp_path, f"--config.train.steps={STEPS}", "--config.checkpoint.every=1000"
    )
    code, out = kill_at(7, number, args, tmp_path / "run")
    assert code == 0, out
    assert f"{number.name}: saved step " in out
    assert "run the same command to go on:\n  python -m experiments.train" in out
    done = helpers.run("train", *args)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(reference[0] / "run")


def test_a_second_run_in_a_workdir_is_refused_while_the_first_one_trains(tmp_path):
    args = helpers.arguments(tmp_path, "--config.train.steps=100000")
    first, path = helpers.start("train", *args), tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 200
    while not path.exists() and time.time() < deadline and first.poll() is None:
        time.sleep(0.05)
    second = helpers.run("train", *args)
    assert second.returncode == 75, second.stderr
    assert second.stderr.startswith(
        f"error: --workdir={tmp_path}/run is in use: process {first.pid}"
    )
    assert second.stderr.count("\n") == 1
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=100)
    assert first.returncode == 0, out
    assert not (tmp_path / "run" / "lease.json").exists()
    steps = [row["step"] for row in metrics.read(path)]
    assert steps == list(range(1, len(steps) + 1)), "nobody else wrote"


@pytest.mark.slow
def test_eight_devices_give_the_same_losses(tmp_path, reference):
    done = helpers.run(
        "train", *helpers.arguments(tmp_path, f"--config.train.steps={STEPS}"), devices=8
    )
    assert done.returncode == 0, done.stderr
    assert "on 8 x cpu" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0] / "run"), abs=1e-4)


def test_a_finished_run_started_again_trains_no_further(reference):
    folder, _ = reference
    before = (folder / "run" / "metrics.jsonl").read_text()
    done = helpers.run("train", *helpers.arguments(folder, f"--config.train.steps={STEPS}"))
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "metrics.jsonl").read_text() == before


def test_a_torn_run_card_is_mended_though_nothing_can_be_sampled(reference):
    """What a kill while it was written left, of versions that wrote it in place."""
    folder, _ = reference
    torn = folder / "torn"
    shutil.copytree(folder / "run", torn)
    whole = json.loads((torn / "runcard.json").read_text())
    (torn / "runcard.json").write_text((torn / "runcard.json").read_text()[:100])
    (torn / "runcard.md").unlink()
    code = """from experiments import cli, train
def sampled(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: no memory for keys and values")
train.sampled = sampled
cli.run(train.main)"""
    args = helpers.arguments(folder, f"--config.train.steps={STEPS}", workdir="torn")
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=helpers.ROOT, env=helpers.environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuation: none: RESOURCE_EXHAUSTED" in done.stdout
    mended = json.loads((torn / "runcard.json").read_text())
    for part in ("results", "steps", "epochs", "config"):
        ours, theirs = (json.dumps(card[part]).replace("/torn", "/run") for card in (mended, whole))
        assert ours == theirs
    assert (torn / "runcard.md").exists()


@pytest.mark.slow
def test_the_audit_lists_every_row_once_an_epoch(tmp_path):
    args = helpers.arguments(tmp_path, "--config.train.steps=6", "--config.log.audit=on")
    assert helpers.run("train", *args).returncode == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "audit.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 7))
    rows = [row for line in lines for row in line["row"]]
    assert len(set(rows)) == len(rows) == 48


@pytest.mark.slow
def test_a_source_of_the_command_line_is_mixed_in_and_reported_by_itself(tmp_path):
    (tmp_path / "digits.txt").write_text("".join(f"{i * 7919:08d}\n" for i in range(3000)))
    args = helpers.arguments(
        tmp_path,
        "--config.train.steps=4",
        "--config.checkpoint.every=100",
        "--config.data.sources.digits.kind=files",
        f"--config.data.sources.digits.path={tmp_path / 'digits.txt'}",
        "--config.data.sources.digits.weight=3",
    )
    done = helpers.run("train", *args)
    assert done.returncode == 0, done.stderr
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    card = json.loads((tmp_path / "run" / "runcard.json").read_text())
    for name in ("validation_loss", "validation_bits_per_byte"):
        each = [row[f"{name}/{source}"] for source in ("corpus", "digits")]
        assert row[name] == pytest.approx(sum(each) / 2)
        assert each[0] != each[1]
        assert card["results"][f"{name}/digits"] == each[1]
    assert card["epochs"]["digits"] > card["epochs"]["corpus"] > 0
    end = done.stdout[done.stdout.rindex("nats/token") :].splitlines()
    assert [line.split()[0] for line in end[1:10:3]] == ["validation", "unigram", "bigram"]
    assert end[3].split() == [
        "digits", f"{row['validation_loss/digits']:.4f}", f"{row['validation_bits_per_byte/digits']:.4f}",
    ]  # fmt: skip


def test_another_runs_workdir_is_refused_with_the_difference(reference):
    args = helpers.arguments(
        reference[0], f"--config.train.steps={STEPS}", "--config.model.ffn_dim=48"
    )
    done = helpers.run("train", *args)
    assert done.returncode == 1
    assert done.stderr.count("\n") <= 4
    assert "holds another run; it differs in\n  model.ffn_dim: 40 -> 48" in done.stderr


@pytest.mark.slow
def test_a_finished_run_gets_more_steps_and_its_text_may_have_moved(tmp_path):
    """It ends as the run that had them from the beginning, bit for bit."""
    schedule = ("--config.optim.schedule=inverse_sqrt", "--config.optim.final_fraction=0.1")
    args = helpers.arguments(tmp_path, *schedule)
    longer = helpers.arguments(tmp_path, *schedule, workdir="longer")
    assert helpers.run("train", *args, "--config.train.steps=12").returncode == 0
    whole = helpers.run("train", *longer, "--config.train.steps=18")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "corpus.txt").rename(tmp_path / "elsewhere" / "corpus.txt")
    there = f"--config.data.sources.corpus.path={moved}"
    done = helpers.run("train", *args, "--config.train.steps=18", there)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 12" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "longer")
    cards = [
        json.loads((tmp_path / name).read_text())["steps"]
        for name in ("run/runcard-12.json", "run/runcard.json")
    ]
    assert cards == [12, 18]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_fails(tmp_path):
    """A limit on the size of a file stands for the disk: the second save meets it."""
    args = helpers.arguments(
        tmp_path, f"--config.train.steps={STEPS}", "--config.checkpoint.every=1000"
    )
    code, _ = kill_at(5, signal.SIGTERM, args, tmp_path / "run")
    assert code == 0
    limited = ["bash", "-c", 'ulimit -f 60; trap "" XFSZ; exec "$@"', "-"]
    done = subprocess.run(
        [*limited, *helpers.command("train", *args)],
        cwd=helpers.ROOT, env=helpers.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    (last,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"the checkpoint of step {STEPS} could not be written" in last
    assert "File too large" in last
    assert "is good" in last
    again = helpers.run("train", *args)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout


ERRORS = {
    "misspelt": (["--config.model.dmi=3"], 2, "unknown setting --config.model.dmi; nearest: --config.model.dim"),
    "mistyped": (["--config.model.dim=wide"], 2, "--config.model.dim='wide' must be a number"),
    "heads": (["--config.model.kv_heads=3"], 1, "model.kv_heads=3 must divide model.heads=4; try 1, 2 or 4"),
    "vocabulary": (["--config.model.vocab_size=300"], 1, "model.vocab_size=300 but the tokenizer (byte) has 259"),
    "no corpus": (["--config.data.sources.corpus.path=/nowhere/*.txt"], 1, "/nowhere/*.txt"),
    "source": (["--config.data.sources.boks.weight=2"], 2, "there is no source 'boks' but corpus; a new one needs"),
    "choice": (["--config.optim.name=adamm"], 1, "optim.name='adamm' is not one of adamw, lion, adafactor, muon; nearest: 'adamw'"),
    "bucket": (["--workdir=gs://b/run"], 2, "--workdir=gs://b/run: must be a path on this machine; mount the bucket with"),
    "argument": (["stray"], 2, "unexpected argument 'stray'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line_and_nothing_is_written(case, tmp_path):
    more, code, message = ERRORS[case]
    done = helpers.run("train", *helpers.arguments(tmp_path, *more))
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_batch_that_does_not_divide_by_the_devices_is_refused(tmp_path):
    done = helpers.run(
        "train", *helpers.arguments(tmp_path, "--config.train.batch_size=12"), devices=8
    )
    assert done.returncode == 1
    assert "must divide train.batch_size / train.microbatches=12 (batch); try" in done.stderr


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = helpers.run("train", *helpers.arguments(tmp_path, workdir="file/run"))
    assert done.returncode == 1
    assert f"--workdir={blocked}/run cannot be written: Not a directory" in done.stderr


def test_7b_on_this_machine_says_what_it_needs_in_seconds(tmp_path):
    start = time.time()
    done = helpers.run("train", "--config=configs/7b.py", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert "this run needs at least" in done.stderr
    assert "GiB is free" in done.stderr
    needed = float(done.stderr.split("at least ")[1].split(" GiB")[0])
    assert needed > 6_738_415_616 * 16 / 2**30, "parameters, two moments and a gradient in float32"
    assert time.time() - start < 30


def test_a_loss_that_is_not_a_number_stops_training(tmp_path):
    args = helpers.arguments(
        tmp_path, "--config.train.steps=40", "--config.optim.learning_rate=1e30",
        "--config.optim.warmup_steps=0",
    )  # fmt: skip
    done = helpers.run("train", *args)
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert "on_anomaly='skip'" in done.stderr


def test_changed_text_is_noticed_on_resuming(tmp_path):
    args = helpers.arguments(
        tmp_path, f"--config.train.steps={STEPS}", "--config.checkpoint.every=1000"
    )
    code, _ = kill_at(5, signal.SIGTERM, args, tmp_path / "run")
    assert code == 0
    with (tmp_path / "corpus.txt").open("a") as file:
        file.write("one more line\n")
    done = helpers.run("train", *args)
    assert done.returncode == 1
    assert "the text has changed" in done.stderr
