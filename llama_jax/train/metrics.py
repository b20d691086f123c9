"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights and Biases, the console."""

import atexit
import json
import math
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax import files

Row = dict[str, Any]  # "step" and what there is of it
Writer = Callable[[Row], None]


def jsonl(path: Path, after_step: int) -> Writer:
    """Append one object a line. Lines past `after_step`, of a run that died there, are dropped."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= after_step]
    files.write(path, "".join(f"{line}\n" for line in kept))

    def write(row: Row) -> None:
        line = json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"
        try:
            with path.open("a") as file:
                file.write(line)
        except OSError as error:
            error.filename = str(path)  # of a full disk it would not say which file
            raise

    return write


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def tensorboard(folder: Path, after_step: int) -> Writer:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=after_step + 1, flush_secs=10)
    atexit.register(writer.close)  # its thread is a daemon and would take the last rows along

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                writer.add_scalar(name, value, row["step"])

    return write


def wandb(workdir: Path, settings: dict[str, Any]) -> Writer:
    """Weights and Biases, where installed; a resumed run goes on in the same page."""
    try:
        import wandb as client  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise ValueError(
            "log.wandb='on' but the package is absent; pip install wandb, or set log.wandb to 'off'"
        ) from None
    id_file = workdir / "wandb_id"
    if not id_file.exists():
        files.write(id_file, uuid.uuid4().hex[:12])
    run = client.init(
        project="llama_jax", id=id_file.read_text(), name=workdir.name, dir=workdir, config=settings,
        resume="allow",
    )  # fmt: skip

    def write(row: Row) -> None:
        run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return write


class Console:
    """One live line on a terminal, plain lines elsewhere."""

    def __init__(self, first: int, steps: int, quiet: bool = False):
        self._live = sys.stderr.isatty() and not quiet
        self._steps = steps
        self._bar = tqdm(
            total=steps, initial=first, unit="step", disable=not self._live, dynamic_ncols=True
        )

    def write(self, row: Row) -> None:
        text = describe(row)
        if self._live:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        else:
            print(f"step {row['step']}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        self._bar.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def describe(row: Row) -> str:
    """`loss 4.123  3,456 tokens/s  MFU 41.2%  ETA 1:02:03  stall 0.0%`"""
    parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    parts.append("MFU unknown" if row["mfu"] is None else f"MFU {row['mfu']:.1%}")
    parts.append(f"ETA {tqdm.format_interval(row['eta_seconds'])}")
    parts.append(f"stall {row['stall']:.1%}")
    if "validation_loss" in row:
        parts.append(f"validation {row['validation_loss']:.4f}")
    return "  ".join(parts)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    """Complete lines: a process killed in the middle of a write leaves a piece of one."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()
