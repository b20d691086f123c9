"""What the folders of a study's runs hold, read back: states, curves, scores."""

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax import config, files
from llama_jax.analysis import runcard
from llama_jax.eval.score import WindowScores
from llama_jax.study.grid import Cell, name_of, seeded
from llama_jax.train import metrics

SCORES, FAILED = "scores.npz", "failed.txt"


def folder(workdir: Path, cell: Cell, seed: int) -> Path:
    return workdir / "runs" / name_of(cell, seed)


def state(path: Path) -> str:
    """waiting, started, failed or done."""
    if (path / SCORES).exists():
        return "done"
    if (path / FAILED).exists():
        return "failed"
    return "started" if (path / "metrics.jsonl").exists() else "waiting"


class Finished(NamedTuple):
    """A run that is done."""

    seed: int
    card: Any  # of runcard.py
    rows: list[metrics.Row]
    scores: dict[int, WindowScores]  # by the multiple of the trained length


class Results(NamedTuple):
    """A cell with its finished runs, seeds rising, and what kept others from finishing."""

    cell: Cell
    runs: list[Finished]
    failures: dict[int, str]  # seed -> the reason

    def losses(self, times: int = 1) -> np.ndarray:
        """Nats a token, [seeds, rows]; empty where it was not scored at that length."""
        found = [run.scores[times].row_R for run in self.runs if times in run.scores]
        return np.stack(found) if found else np.empty((0, 0))

    def curve(self, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Validation loss of each seed, [seeds, points], against tokens, flops or mean seconds, [points]."""
        of = {
            "tokens": lambda row: row["tokens"],
            "flops": lambda row: row["tokens"] * self.cell.flops_per_token,
            "seconds": lambda row: row["seconds"],
        }[x]
        held_out = [
            {
                row["step"]: row
                for row in run.rows
                if math.isfinite(row.get("validation_loss") or math.nan)
            }
            for run in self.runs
        ]
        every = [set(rows) for rows in held_out]
        common = sorted(set.intersection(*every)) if every else []  # an evaluation may be missing
        places = np.array([[of(rows[n]) for n in common] for rows in held_out])
        losses = np.array([[rows[n]["validation_loss"] for n in common] for rows in held_out])
        return places.mean(0) if common else places, losses


def at(results: Results, x: str, budget: float) -> float:
    """Mean validation loss when so many tokens, FLOPs or seconds were spent; NaN before the first point."""
    places, losses = results.curve(x)
    if not losses.size or budget < places[0]:
        return math.nan
    return float(np.mean([np.interp(budget, places, one) for one in losses]))


def write_scores(path: Path, scores: dict[int, WindowScores]) -> None:
    arrays = {
        f"{name}_{times}": value
        for times, score in scores.items()
        for name, value in score._asdict().items()
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    files.write(path / SCORES, content.getvalue())


def read_scores(path: Path) -> dict[int, WindowScores]:
    with np.load(path / SCORES) as arrays:
        times = sorted(
            int(name.removeprefix("row_R_")) for name in arrays if name.startswith("row_R_")
        )
        return {n: WindowScores(arrays[f"row_R_{n}"], arrays[f"position_T_{n}"]) for n in times}


def collect(workdir: Path, cells: list[Cell], seeds: int) -> list[Results]:
    """Every cell with those of its runs that are done. ValueError if they are runs of something else."""
    check(workdir, cells, seeds)
    found = []
    for cell in cells:
        places = {seed: folder(workdir, cell, seed) for seed in range(seeds)}
        runs = [
            Finished(
                seed,
                runcard.read(path),
                metrics.read(path / "metrics.jsonl"),
                read_scores(path),
            )
            for seed, path in places.items()
            if state(path) == "done"
        ]
        failures = {
            seed: (path / FAILED).read_text().strip() or "no reason was kept"
            for seed, path in places.items()
            if state(path) == "failed"
        }
        found.append(Results(cell, runs, failures))
    return found


def check(workdir: Path, cells: list[Cell], seeds: int) -> None:
    """ValueError unless what is there was trained as the cells say, and all of it on the same text."""
    texts = {}
    for cell in cells:
        for seed in range(seeds):
            path = folder(workdir, cell, seed)
            if state(path) == "waiting" or not (path / "run.json").exists():
                continue
            theirs = config.from_dict(json.loads((path / "run.json").read_text()))
            if differing := config.diff(theirs, seeded(cell.run, seed), essential=True):
                raise ValueError(
                    f"{path} holds another run than {cell.name} is now; it differs in\n  "
                    + "\n  ".join(differing)
                    + "\ngive a new --workdir, or the settings of the run that is there"
                )
            if card := runcard.read(path):
                texts.setdefault(card["provenance"]["data"], path)
    if len(texts) > 1:
        places = ", ".join(f"{path.name} on {text}" for text, path in texts.items())
        raise ValueError(
            f"{workdir}: runs read different text ({places}); losses cannot be compared: give a new --workdir"
        )
