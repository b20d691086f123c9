"""docs/ablations.md runs: its blocks go into a copy of the code, its test passes, its command reports."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments import helpers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/ablations.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# ([\w/.]+)\n(.*?)```", PAGE, re.S))
SCHEME = "llama_jax/model/position.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code with the blocks of the page at their places."""
    root = tmp_path_factory.mktemp("copy")
    for room in ("llama_jax", "configs", "experiments", "tests"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, text in BLOCKS.items():
        path = root / name
        path.write_text((path.read_text() + "\n\n" if path.exists() else "") + text)
    return root


def run(root, *words):
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=helpers.environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_a_scheme_is_less_than_forty_lines_test_and_study_included():
    assert len(BLOCKS) == 3
    lines = [line for text in BLOCKS.values() for line in text.splitlines() if line.strip()]
    assert len(lines) < 40


def test_its_test_passes_and_fails_when_the_scheme_is_broken(copy):
    name = next(name for name in BLOCKS if name.startswith("tests/"))
    flags = ("-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    done = run(copy, *flags)
    assert done.returncode == 0, done.stdout
    path = copy / SCHEME
    right = path.read_text()
    path.write_text(right.replace("jnp.log1p(", "jnp.sqrt("))
    assert run(copy, *flags).returncode == 1
    path.write_text(right)


@pytest.mark.slow  # half a minute
def test_its_study_reports(copy, tmp_path):
    (command,) = re.findall(r"```sh\npython (.*?)\n```", PAGE)
    words = [word.replace("/tmp/", f"{tmp_path}/") for word in shlex.split(command)]
    short = {"train.steps": 4, "optim.warmup_steps": 1, "eval.rows": 8, "train.batch_size": 2}
    short |= {
        "model.layers": 1,
        "data.seq_len": 64,
        "data.tokenizer.kind": "byte",
        "model.vocab_size": 259,
    }
    short |= {"data.cache": tmp_path / "cache", "data.sources.corpus.kind": "files"}
    short["data.sources.corpus.path"] = helpers.text(tmp_path / "corpus.txt")
    flags = [f"--config.base.{name}={value}" for name, value in short.items()]
    done = run(copy, *words, *flags, "--config.rows=16", "--config.seeds=1")
    assert done.returncode == 0, done.stderr + done.stdout
    report = (tmp_path / "kerple/report.md").read_text()
    assert all(f"| {cell} |" in report for cell in ("rope", "alibi", "kerple"))


def test_the_table_of_slots_is_complete():
    from llama_jax.model.block import PLACEMENTS
    from llama_jax.model.ffn import FFNS
    from llama_jax.model.init import INITS
    from llama_jax.model.norm import NORMS
    from llama_jax.model.position import POSITIONS, SCALINGS
    from llama_jax.train.optim import OPTIMISERS, SCHEDULES

    table = PAGE[PAGE.index("| slot |") : PAGE.index("Numbers are choices")]
    for slot in (POSITIONS, SCALINGS, FFNS, NORMS, PLACEMENTS, INITS, OPTIMISERS, SCHEDULES):
        for key in slot:
            assert re.search(rf"\b{key}\b", table), key
