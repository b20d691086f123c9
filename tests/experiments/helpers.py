"""Running the commands as a user does, on a small text of the test's own."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.experiments import warm

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "--config=configs/research_300k.py",
    *("--config.model.dim=24", "--config.model.head_dim=6", "--config.model.ffn_dim=40"),
    *("--config.model.layers=2", "--config.model.vocab_size=259"),
    *(
        "--config.data.tokenizer.kind=byte",
        "--config.data.seq_len=32",
        "--config.train.batch_size=8",
    ),
    *("--config.optim.warmup_steps=2", "--config.log.every=1", "--config.log.tensorboard=off"),
    *("--config.checkpoint.every=5", "--config.eval.every=10", "--config.eval.rows=12"),
]


def text(path: Path, words: int = 20_000) -> Path:
    """Words in an order that can be learned: each of 50 follows one of three others."""
    rng = random.Random(0)
    follow = {i: rng.sample(range(50), 3) for i in range(50)}
    word, lines = 0, []
    for i in range(words):
        word = rng.choice(follow[word])
        lines.append(f"w{word}" + ("\n" if i % 12 == 11 else " "))
    path.write_text("".join(lines))
    return path


def arguments(tmp_path: Path, *more: str, workdir: str = "run") -> list[str]:
    corpus = tmp_path / "corpus.txt"
    if not corpus.exists():
        text(corpus)
        (tmp_path / "cache").mkdir()
        (tmp_path.parent / "xla").mkdir(
            exist_ok=True
        )  # what was compiled, for every test beside it
        (tmp_path / "cache/xla").symlink_to(tmp_path.parent / "xla")
    return [
        *SMALL,
        f"--workdir={tmp_path / workdir}",
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.sources.corpus.kind=files",
        f"--config.data.sources.corpus.path={corpus}",
        *more,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    keep = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
    return {
        **os.environ,
        **{f"JAX_PERSISTENT_CACHE_{name}": value for name, value in keep.items()},
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }


def command(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", *args]


def run(module: str, *args: str, devices: int = 1, env=None, stdin="", timeout=300):
    """The command to its end, in a process of its own; `start` begins one as a shell does."""
    env = env or environment(devices)
    return warm.run([f"experiments.{module}", *args], env, timeout, stdin)


def start(module: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(module, *args), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
