"""Trees by path: names, counts, and a readable difference of two trees."""

from typing import Any

import jax


def paths(tree: Any) -> dict[str, Any]:
    """{"groups/self_0/ffn/gate": leaf, ...}"""
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path(keys) -> str:
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
