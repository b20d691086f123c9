"""Public functions of the library say what they take and return; `make lint` checks that they are right."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLED = ("__init__", "__call__")  # of public classes, public as well


def bare(text: str) -> list[str]:
    """Public functions and methods without an annotation of a parameter or of what they return: line, name."""
    return [
        f"{node.lineno} {name}" for node, name in _public(ast.parse(text).body) if _is_bare(node)
    ]


def _public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in body:
        name = getattr(node, "name", "_")
        if name.startswith("_") and not (owner and name in CALLED):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _public(node.body, f"{owner}{name}.")
        elif isinstance(node, ast.FunctionDef):
            yield node, owner + name


def _is_bare(function: ast.FunctionDef) -> bool:
    of = function.args
    given = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
    wanted = [arg for arg in given if arg.arg not in ("self", "cls")]
    without = function.returns is None and function.name != "__init__"
    return without or any(arg.annotation is None for arg in wanted)


def test_public_functions_are_annotated():
    found = [
        f"{path.relative_to(ROOT)}:{of}"
        for path in sorted((ROOT / "llama_jax").rglob("*.py"))
        for of in bare(path.read_text())
    ]
    assert not found, f"annotate parameters and return of {found}"


def test_a_function_without_annotations_is_found():
    text = """
def f(x: int, *rest: int, **more: int) -> int: ...
def g(x) -> int: ...
def h(x: int): ...
def _own(x): ...
class A:
    def __init__(self, x: int): ...
    def __call__(self, *rest) -> int: ...
    def __len__(self): ...
    @classmethod
    def m(cls, *, x=1) -> int: ...
class _B:
    def m(self): ...
"""
    assert bare(text) == ["3 g", "4 h", "8 A.__call__", "11 A.m"]
