"""Trees by path: names, counts, and a readable difference of two trees."""

from collections.abc import Callable
from typing import Any

import jax


def paths(tree: Any) -> dict[str, Any]:
    """{"groups/self_0/ffn/gate": leaf, ...}"""
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `paths` gives these names."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def split(tree: dict[str, Any], pick: Callable[[str], bool]) -> tuple[dict, dict]:
    """Nested dicts in two: the leaves whose path is picked, and the others; neither has empty dicts.

    What is no dict is a leaf, quantised matrices included.
    """
    leaves = flat(tree)
    picked = {path: leaf for path, leaf in leaves.items() if pick(path)}
    return nest(picked), nest({path: leaf for path, leaf in leaves.items() if path not in picked})


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """`paths` of nested dicts, where what is no dict is a leaf."""
    found = {}
    for name, node in tree.items():
        path = f"{before}{name}"
        found |= flat(node, f"{path}/") if isinstance(node, dict) else {path: node}
    return found


def join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`. No leaf may be in both."""
    left, right = flat(one), flat(other)
    assert not left.keys() & right.keys(), f"{left.keys() & right.keys()} are in both trees"
    return nest(left | right)


def count(tree: Any) -> int:
    """The number of elements in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def gib(tree: Any) -> float:
    """The size of a tree of arrays or of their shapes, in GiB."""
    return sum(leaf.size * bytes_each(leaf) for leaf in jax.tree.leaves(tree)) / 2**30


def bytes_each(leaf: Any) -> float:
    """Of an entry; NumPy says 1 of int4, of which two are kept in a byte."""
    return 0.5 if leaf.dtype == "int4" else leaf.dtype.itemsize


def diff(old: Any, new: Any) -> list[str]:
    """One line a leaf that one tree lacks, or whose shape or dtype differs."""
    old, new = paths(old), paths(new)
    lines = [f"{name}: {_show(old[name])} is gone" for name in old if name not in new]
    lines += [f"{name}: {_show(new[name])} is new" for name in new if name not in old]
    for name in old:
        if name in new and _show(old[name]) != _show(new[name]):
            lines.append(f"{name}: {_show(old[name])} -> {_show(new[name])}")
    return lines


def _show(leaf) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
