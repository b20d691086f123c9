import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.model.quantised import Quantised

TREE = {"a": {"b": jnp.zeros((2, 3))}, "c": [jnp.zeros(4, jnp.int8)]}


def test_paths_count_and_size():
    assert list(tree.paths(TREE)) == ["a/b", "c/0"]
    assert tree.count(TREE) == 10
    assert tree.gib(TREE) == (24 + 4) / 2**30


def test_shapes_serve_as_well_as_arrays():
    shapes = jax.eval_shape(lambda: TREE)
    assert tree.count(shapes) == 10
    assert tree.gib(shapes) == 28 / 2**30


def test_difference_is_readable():
    other = {"a": {"b": np.zeros((2, 4), np.float32)}, "d": np.zeros(1, np.float32)}
    assert tree.diff(TREE, other) == [
        "c/0: int8[4] is gone",
        "d: float32[1] is new",
        "a/b: float32[2,3] -> float32[2,4]",
    ]


def test_a_tree_in_two_parts_is_the_tree():
    """A quantised matrix is one leaf, and empty branches are in neither part."""
    matrix = Quantised(np.ones((2, 3), np.int8), np.ones((1, 3)), "bfloat16")
    whole = {"groups": {"self_0": {"ffn": {"up": matrix}, "norm": {"scale": 1}}}, "embed": 2}
    picked, rest = tree.split(whole, lambda path: path.endswith(("up", "embed")))
    assert picked == {"groups": {"self_0": {"ffn": {"up": matrix}}}, "embed": 2}
    assert rest == {"groups": {"self_0": {"norm": {"scale": 1}}}}
    assert tree.join(picked, rest) == tree.join(rest, picked) == whole
    with pytest.raises(AssertionError, match="are in both"):
        tree.join(whole, rest)
