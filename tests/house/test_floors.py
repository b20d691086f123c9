"""Imports go down (docs/architecture.md): a package may use itself and the layers below, and no two files each
other, directly or around."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from llama_jax.sharding import AXES

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
LAYER = {package: layer for layer, packages in LAYERS.items() for package in packages}
WITHOUT_JAX = ("tokenizer", "config", "dims.py", "interrupt.py")
FILES = sorted((ROOT / "llama_jax").rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "llama_jax").parts[0].removesuffix(".py")


def imports(text: str) -> set[str]:
    """Full names that a file imports anywhere in it, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(texts: dict[str, str]) -> dict[str, set[str]]:
    """{module: modules of the library that it imports} from {module: its text}, both by full names.

    A name that is no module is one of the module before its last dot.
    """
    named = {module: imports(text) for module, text in texts.items()}
    whole = {
        module: {name if name in texts else name.rpartition(".")[0] for name in names}
        for module, names in named.items()
    }
    return {module: names & texts.keys() for module, names in whole.items()}


def circle(graph: dict[str, Iterable[str]]) -> list[str]:
    """The first circle that is found, with its first module again at its end; empty if there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = (follow(other, [*path, module]) for other in sorted(graph[module]))
        first = next(filter(None, found), [])
        done.add(module)
        return first

    return next(filter(None, (follow(module, []) for module in sorted(graph))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = package_of(path)
    if own in ("__init__", "__main__"):
        return
    assert own in LAYER, f"{own} is new: give it a layer here and in docs/architecture.md"
    for name in imports(path.read_text()):
        assert not name.startswith(("experiments", "configs", "tests")), name
        if name.startswith("llama_jax.") and name != "llama_jax.__version__":
            other = name.split(".")[1]
            # The lowest layer is one of foundations, which may rest on one another.
            allowed = other == own or LAYER[other] < LAYER[own] or LAYER[other] == LAYER[own] == 0
            assert allowed, f"{own} (layer {LAYER[own]}) imports {name} (layer {LAYER[other]})"


def test_no_files_import_one_another_in_a_circle():
    texts = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        texts[module.removesuffix(".__init__")] = path.read_text()
    found = circle(uses(texts))
    assert not found, f"files import one another in a circle: {' -> '.join(found)}"


def test_a_circle_is_found_within_functions_and_through_packages():
    texts = {
        "a": "",
        "a.b": "from a import c",
        "a.c": "def f():\n    from a.d.e import g",
        "a.d": "",
        "a.d.e": "import a.b",
        "a.f": "from a import b",
    }
    assert circle(uses(texts)) == ["a.b", "a.c", "a.d.e", "a.b"]
    assert circle(uses({**texts, "a.d.e": ""})) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_without_jax_stay_so(path):
    if str(path.relative_to(ROOT / "llama_jax")).startswith(WITHOUT_JAX):
        names = {name.split(".")[0] for name in imports(path.read_text())}
        assert not names & {"jax", "flax", "optax"}


def axes_named(text: str) -> list[str]:
    """Expressions that name an axis of the mesh, or say how one is sharded."""

    def names(node: ast.AST) -> bool:
        match node:
            case ast.Attribute(value, attr):
                return attr in AXES and "mesh" in ast.unparse(value).lower()
            case ast.Subscript(value, ast.Constant(key)):
                return key in AXES and "mesh" in ast.unparse(value).lower()
            case ast.Call(function):
                made = ast.unparse(function).rpartition(".")[2]
                return made == "Mesh" and any(word.arg in AXES for word in node.keywords)
            case ast.Constant("fsdp") | ast.Name("PartitionSpec"):
                return True
        return False

    return [ast.unparse(node) for node in ast.walk(ast.parse(text)) if names(node)]


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if path.name != "sharding.py":
            assert not axes_named(path.read_text()), path
    for text in ('mesh["data"]', "run.mesh.tensor", 'layout.mesh.shape["slices"]', "P('fsdp')"):
        assert axes_named(text), text
    assert axes_named("config.Mesh(context=2)")
    assert not axes_named('source.context + run.data.rows + slice_.slices + card["data"]')


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
