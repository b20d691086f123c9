"""A live view of a study's runs: state, loss and time left. A table on a terminal, lines elsewhere."""

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from tqdm import tqdm

from llama_jax.study import record
from llama_jax.study.grid import Cell
from llama_jax.train.metrics import Row, read

EVERY = 30.0  # seconds between lines of a run where there is no table
STYLES = {"done": "green", "failed": "red", "running": "bold"}


class Overview:
    """To be entered as a context. `console` is what the loop of one run writes to."""

    def __init__(self, workdir: Path, runs: list[tuple[Cell, int]], quiet: bool = False):
        self._workdir, self._runs, self._quiet = workdir, runs, quiet
        self._rows: dict[tuple[str, int], Row] = {}
        self._now: tuple[str, int] | None = None
        for cell, seed in runs:
            path = record.folder(workdir, cell, seed) / "metrics.jsonl"
            if path.exists() and (rows := read(path)):
                self._rows[cell.name, seed] = rows[-1]
        self._scores: dict[tuple[str, int], float] = {}
        self._took: list[float] = []  # seconds of each run that this session finished
        self._began = self._said = time.monotonic()
        self._terminal = Console(stderr=True)
        is_live = self._terminal.is_terminal and not quiet
        self._live = Live(console=self._terminal, auto_refresh=False) if is_live else None

    def __enter__(self):
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *raised):
        if self._live:
            self._live.__exit__(*raised)

    def begin(self, cell: Cell, seed: int) -> None:
        self._now = (cell.name, seed)
        self._began = time.monotonic()
        self._show()

    def end(self, cell: Cell, seed: int) -> None:
        self._now = None
        row = self._rows.get((cell.name, seed), {})
        done = sum(self._state(*run) == "done" for run in self._runs)
        if row and self._state(cell, seed) == "done":
            self._took.append(time.monotonic() - self._began)
            # The loss that the report averages, not that of the fewer rows of the curve.
            loss = self._scored(cell, seed)
            said = f"loss {loss:.4f} after {row['seconds']:.0f} s of training{self._left()}"
            self._say(f"[{done}/{len(self._runs)}] {cell.name}, seed {seed}: {said}")
        self._show()

    def fail(self, cell: Cell, seed: int, error: Exception) -> None:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._say(f"FAILED {cell.name}, seed {seed}: {first}")

    def console(self, first: int, steps: int) -> "Overview":
        """What session.train asks for: it is this, for every run."""
        return self

    def write(self, row: Row) -> None:
        """Of the run that is on; as metrics.Console has it."""
        assert self._now
        self._rows[self._now] = self._rows.get(self._now, {}) | row
        self._show()
        if not self._live and time.monotonic() - self._said > EVERY:
            name, seed = self._now
            left = tqdm.format_interval(row["eta_seconds"])
            self._say(
                f"{name}, seed {seed}: step {row['step']}, loss {row['loss']:.4f}, {left} left"
            )

    def say(self, text: str) -> None:
        self._say(text)

    def close(self) -> None:
        self._show()

    def _state(self, cell: Cell, seed: int) -> str:
        if (cell.name, seed) == self._now:
            return "running"
        return record.state(record.folder(self._workdir, cell, seed))

    def _scored(self, cell: Cell, seed: int) -> float:
        """Nats a token of a finished run on the rows that results are of."""
        if (cell.name, seed) not in self._scores:
            scores = record.read_scores(record.folder(self._workdir, cell, seed))
            self._scores[cell.name, seed] = float(scores[1].row_R.mean())
        return self._scores[cell.name, seed]

    def _left(self) -> str:
        """Of the whole study, were this process alone; "" before a run has shown how long one takes."""
        runs = sum(self._state(*run) != "done" for run in self._runs)
        if not (runs and self._took):
            return ""
        seconds = runs * sum(self._took) / len(self._took)
        if self._now:
            seconds -= time.monotonic() - self._began
        return f"; {runs} runs, about {tqdm.format_interval(max(seconds, 0))} left"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        if self._quiet:
            return
        if self._live:
            self._terminal.print(text, highlight=False)
        else:
            print(text, flush=True)

    def _show(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, caption=self._left().removeprefix("; "))
        for name in ("run", "state", "step", "training loss", "curve", "loss", "ETA"):
            table.add_column(name, justify="left" if name in ("run", "state") else "right")
        for cell, seed in self._runs:
            state, row = self._state(cell, seed), self._rows.get((cell.name, seed), {})
            number = lambda name: f"{row[name]:.4f}" if row.get(name) else ""  # noqa: B023, E731
            left = tqdm.format_interval(row["eta_seconds"]) if state == "running" and row else ""
            table.add_row(
                *(f"{cell.name} seed {seed}", state, f"{row.get('step', '')}"),
                *(number("loss"), number("validation_loss")),
                *(f"{self._scored(cell, seed):.4f}" if state == "done" else "", left),
                style=STYLES.get(state, "dim"),
            )
        return table
