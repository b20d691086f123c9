"""Imports go down only (docs/architecture.md): a room may use its own floor's room and those below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    0: {"config", "dims", "files", "tree"},
    1: {"sharding", "tokenizer", "interrupt"},
    2: {"model", "data"},
    3: {"train", "decode", "convert", "quant"},
    4: {"analysis", "eval"},
    6: {"run", "plan"},
    7: {"study"},
}
FLOOR = {room: level for level, rooms in LAYERS.items() for room in rooms}
WITHOUT_JAX = ("tokenizer", "config", "dims.py", "interrupt.py")
FILES = sorted((ROOT / "llama_jax").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "llama_jax").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room_of(path)
    if own in ("__init__", "__main__"):
        return
    assert own in FLOOR, f"{own} is a new room: give it a floor here and in docs/architecture.md"
    for name in imports(path):
        assert not name.startswith(("experiments", "configs", "tests")), name
        if name.startswith("llama_jax."):
            room = name.split(".")[1]
            allowed = room == own or FLOOR[room] < FLOOR[own] or FLOOR[own] == 0
            assert allowed, f"{own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[room]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_without_jax_stay_so(path):
    if str(path.relative_to(ROOT / "llama_jax")).startswith(WITHOUT_JAX):
        assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if path.name != "sharding.py":
            assert "PartitionSpec" not in path.read_text(), path


def test_only_runs_and_views_of_them_print():
    prints = {*(ROOT / "llama_jax/run").glob("*.py"), ROOT / "llama_jax/study/overview.py"}
    for path in sorted({*FILES} - prints):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not calls or path.name == "metrics.py", f"{path} prints"


def test_importing_the_library_starts_nothing():
    code = (
        "import llama_jax.train.loop, llama_jax.model.transformer, llama_jax.data.iterator; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
