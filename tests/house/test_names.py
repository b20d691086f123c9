"""A name is a class of one meaning: no two classes of the library have the same."""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def repeated(texts: dict[str, str]) -> dict[str, list[str]]:
    """{name: where it is defined} of classes with more than one definition, from {file: its text}."""
    places = collections.defaultdict(list)
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_class_name_is_used_twice():
    files = sorted((ROOT / "llama_jax").rglob("*.py"))
    found = repeated({str(path.relative_to(ROOT)): path.read_text() for path in files})
    assert not found, f"rename all but one in the field's terms: {found}"


def test_a_second_class_is_found_within_functions():
    texts = {"a.py": "class A: ...\nclass B: ...", "b.py": "def f():\n    class A: ..."}
    assert repeated(texts) == {"A": ["a.py:1", "b.py:2"]}
