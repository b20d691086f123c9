"""Studies of tiny networks, in one process each as a user starts them."""

import csv
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from llama_jax.run import lease
from llama_jax.study import record
from tests.experiments import helpers

TINY = [
    "--config.base.train.steps=6", "--config.base.optim.warmup_steps=1", "--config.base.train.batch_size=4",
    "--config.base.data.seq_len=32", "--config.base.eval.every=3", "--config.base.eval.rows=16",
    "--config.base.log.every=1", "--config.base.model.layers=2", "--config.base.data.tokenizer.kind=byte",
    "--config.base.model.vocab_size=259", "--config.seeds=2",
    "--config.rows=16",
]  # fmt: skip
PAGE = "configs/ablations/position.py"
TABLE = "--config.axes.position.learned.model.max_positions=32"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of a fixed text; a cache."""
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], 20_000)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(words[i * 2500 : (i + 1) * 2500]))
    return [
        "--config.base.data.sources.corpus.kind=files",
        f"--config.base.data.sources.corpus.path={folder}/*.txt",
        f"--config.base.data.cache={folder}/cache",
    ]


def arguments(*flags, page=PAGE):
    return [f"--config={page}", *TINY, *([TABLE] if page == PAGE else []), *flags]


def ablate(*flags, page=PAGE):
    return helpers.run("ablate", *arguments(*flags, page=page))


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    """A finished study, for looking at."""
    workdir = tmp_path_factory.mktemp("study") / "position"
    done = ablate(*corpus, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_the_report_says_what_the_files_say(study):
    workdir, done = study
    rows = list(csv.DictReader((workdir / "report.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert {row["cell"] for row in rows} == {"rope", "alibi", "learned", "none"}
    for row in rows:
        folder = workdir / "runs" / f"{row['cell']}-seed{row['seed']}"
        scores = record.read_scores(folder)
        assert float(row["loss_at_1x"]) == pytest.approx(scores[1].row_R.mean(), rel=1e-6)
        card = json.loads((folder / "runcard.json").read_text())
        # Of blocks of the split, and of single rows of it: near each other, the text is alike.
        assert scores[1].row_R.mean() == pytest.approx(card["results"]["validation_loss"], rel=0.02)
        assert card["command"].endswith(f"--only={folder.name}")
        line = f"{row['cell']}, seed {row['seed']}: loss {float(row['loss_at_1x']):.4f} after "
        assert line in done.stdout, "what is printed is what the report averages"
    learned = next(row for row in rows if row["cell"] == "learned")
    assert learned["loss_at_8x"] == "nan", "its table ends with the trained length"
    losses = {
        cell: [float(r["loss_at_1x"]) for r in rows if r["cell"] == cell]
        for cell in ("rope", "none")
    }
    difference = np.mean(losses["none"]) - np.mean(losses["rope"])
    markdown = (workdir / "report.md").read_text()
    line = next(line for line in markdown.splitlines() if line.startswith("| none |"))
    assert float(re.search(r"\| ([+-][\d.]+) \[", line)[1]) == pytest.approx(difference, abs=6e-5)
    assert "in training steps" in done.stdout
    assert "losses are of 16 held-out rows" in done.stdout


def test_the_page_needs_nothing_else_and_shows_every_picture(study):
    page = (study[0] / "report.html").read_text()
    assert page.count("<svg") == page.count("<figure>") == 6
    assert not re.search(r"(src|href)=\"(http|/)", page)
    assert "undefined" in page
    assert (study[0] / "report.tex").read_text().count(r"\\") >= 5


def test_started_again_it_trains_nothing(study):
    workdir, _ = study
    before = {path: path.stat().st_mtime_ns for path in (workdir / "runs").rglob("metrics.jsonl")}
    again = ablate(*flags_of(study), f"--workdir={workdir}")
    assert again.returncode == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in (workdir / "runs").rglob("metrics.jsonl")
    }


def flags_of(study):
    settings = json.loads((study[0] / "study.json").read_text())["base"]["data"]
    return [
        "--config.base.data.sources.corpus.kind=files",
        f"--config.base.data.sources.corpus.path={settings['sources']['corpus']['path']}",
        f"--config.base.data.cache={settings['cache']}",
    ]


def test_another_study_does_not_enter_the_workdir(study):
    other = ablate(
        *flags_of(study), "--config.base.optim.learning_rate=0.001", f"--workdir={study[0]}"
    )
    assert other.returncode == 1
    assert "holds another study" in other.stderr
    assert "optim.learning_rate: 0.003 -> 0.001" in other.stderr


def test_seeds_of_a_cell_differ_and_cells_of_a_seed_see_the_same_text(study):
    workdir, _ = study
    runs = {
        path.name: json.loads((path / "run.json").read_text())
        for path in (workdir / "runs").iterdir()
    }
    assert runs["rope-seed0"]["data"] == runs["alibi-seed0"]["data"]
    assert runs["rope-seed0"]["data"]["seed"] != runs["rope-seed1"]["data"]["seed"]
    first = {
        name: json.loads((workdir / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])[
            "loss"
        ]
        for name in ("rope-seed0", "rope-seed1")
    }
    assert first["rope-seed0"] != first["rope-seed1"]


@pytest.mark.slow
def test_a_job_array_shares_a_workdir_and_report_only_redraws(study, corpus, tmp_path):
    workdir = tmp_path / "shared"
    listed = ablate(*corpus, f"--workdir={workdir}", "--list")
    assert len(listed.stdout.splitlines()) == 8
    assert not workdir.exists()
    part = ablate(*corpus, f"--workdir={workdir}", "--only=1/4", "--config.seeds=1")
    assert part.returncode == 0, part.stderr
    assert [path.name for path in (workdir / "runs").iterdir()] == ["rope-seed0"]
    assert "Incomplete: 3 runs are not done" in (workdir / "report.md").read_text()
    own = (study[0] / "runs/rope-seed0/scores.npz").read_bytes()
    assert (workdir / "runs/rope-seed0/scores.npz").read_bytes() == own, "the same run, bit for bit"
    shutil.copytree(study[0] / "runs/none-seed0", workdir / "runs/none-seed0")
    drawn = ablate(*corpus, f"--workdir={workdir}", "--report-only", "--config.seeds=1")
    assert drawn.returncode == 0
    assert "Incomplete: 2 runs are not done" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_a_failed_run_is_marked_and_the_rest_go_on(corpus, tmp_path):
    page = tmp_path / "rates.py"
    page.write_text(
        "from configs.ablations import base\nfrom llama_jax.study import schema\n"
        "def get_config():\n"
        "    rates = {'usual': {}, 'huge': {'optim': {'learning_rate': 1e30}},\n"
        "             'low': {'optim': {'learning_rate': 1e-4}}}\n"
        "    return schema.edit(base.run(), {'rate': rates}, base.QUICK)\n"
    )
    workdir = tmp_path / "rates"
    done = ablate(*corpus, f"--workdir={workdir}", "--config.seeds=1", page=page)
    assert done.returncode == 1
    assert "FAILED huge, seed 0: step" in done.stdout
    assert "not finite" in (workdir / "runs/huge-seed0/failed.txt").read_text()
    assert (workdir / "runs/low-seed0/scores.npz").exists(), "it comes after the failed one"
    report = (workdir / "report.md").read_text()
    assert "huge, seed 0: step" in report
    assert "| huge | 0 of 1 |" in report
    assert "not known: 1 failed" in report
    text = page.read_text().replace("1e-4", "2e-4")
    page.write_text(text)
    other = ablate(*corpus, f"--workdir={workdir}", "--config.seeds=1", page=page)
    assert other.returncode == 1
    assert "low-seed0 holds another run than low is now" in other.stderr
    assert "optim.learning_rate: 0.0001 -> 0.0002" in other.stderr


@pytest.mark.slow  # a quarter of a minute
def test_tasks_of_an_array_start_together(corpus, tmp_path):
    """All make the same study of an empty folder; none dies of it, and the report has what both did."""
    workdir = tmp_path / "array"
    flags = [*corpus, f"--workdir={workdir}", "--config.seeds=1"]
    tasks = [helpers.start("ablate", *arguments(*flags, f"--only={k}/4")) for k in (1, 2, 3)]
    for task in tasks:
        said, _ = task.communicate(timeout=300)
        assert task.returncode == 0, said
    assert len(list((workdir / "runs").glob("*/scores.npz"))) == 3
    drawn = ablate(*flags, "--report-only")
    assert "Incomplete: 1 runs are not done" in (workdir / "report.md").read_text(), drawn.stdout
    assert not list(workdir.glob(".*")), "nothing half-written stays"


@pytest.mark.slow
def test_a_signal_in_the_last_moments_of_a_run_ends_the_study_after_it(corpus, tmp_path):
    """The run is scored; the next one does not begin."""
    workdir = tmp_path / "late"
    process = helpers.start(
        "ablate", *arguments(*corpus, f"--workdir={workdir}", "--config.base.eval.rows=4000")
    )
    metrics, deadline = workdir / "runs/rope-seed0/metrics.jsonl", time.time() + 200
    while time.time() < deadline and not (metrics.exists() and '"step": 5' in metrics.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert [path.name for path in (workdir / "runs").iterdir()] == ["rope-seed0"]


@pytest.mark.slow  # the session of two hosts interrupts a study too
def test_interrupted_it_goes_on(study, corpus, tmp_path):
    """SIGTERM in a run: exit 0, and the same results as the study that ran through."""
    workdir = tmp_path / "interrupted"
    flags = [
        *corpus,
        f"--workdir={workdir}",
        "--only=rope-seed0",
        "--config.base.checkpoint.every=2",
    ]
    process = helpers.start("ablate", *arguments(*flags))
    metrics, deadline = workdir / "runs/rope-seed0/metrics.jsonl", time.time() + 200
    while time.time() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "run the same command to go on" in said
    assert not (workdir / "runs/rope-seed0/scores.npz").exists()
    again = ablate(*flags)
    assert again.returncode == 0, again.stderr
    scores = (record.read_scores(path / "runs/rope-seed0") for path in (workdir, study[0]))
    ours, through = (score[8].row_R for score in scores)
    np.testing.assert_array_equal(ours, through)


def test_a_run_that_another_process_trains_is_passed_over(corpus, tmp_path):
    folder = tmp_path / "study/runs/rope-seed0"
    folder.mkdir(parents=True)
    held = lease.Lease(folder)
    assert held.take() == ""
    done = ablate(*corpus, f"--workdir={tmp_path}/study", "--only=rope-seed0")
    held.release()
    assert done.returncode == 75, done.stderr
    assert f"passed over rope, seed 0: --workdir={folder} is in use" in done.stdout
    assert f"process {os.getpid()} on " in done.stdout
    assert list(folder.iterdir()) == [], "it was not marked as failed"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only=rop-seed0"], "--only='rop-seed0' is not one of rope-seed0, .*nearest: 'rope-seed0'"),
        (["--only=5/4"], "--only=5/4 must be k/N with k from 1 to N"),
        (["--report-only"], "holds no study"),
        (["--config.grid=al"], "grid='al' is not one of one_at_a_time, full, listed"),
        (["--config.axes.position.alibi.model.position=alibo"], "'alibo' is not one of .*nearest: 'alibi'"),
        (["--config.base.model.positon=none"], "unknown setting --config.base.model.positon; nearest: --config.base.model.position"),
        (["--config.rows=100"], "rows=100 must be a multiple of 8"),
        (["--config.base.data.packing=best_fit"], "a study scores whole rows of running text"),
        (["--config.preset=quik"], "preset='quik' is not one of full, quick"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_runs(flags, message, tmp_path):
    done = ablate(f"--workdir={tmp_path}/study", *flags)
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()
