"""The letters that end a name are the shape of its value: tests/letters.py finds where they are not."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import dims
from llama_jax.model import attention, kernels
from tests import letters

SOURCE = '''"""Of names that end in letters."""

import contextlib
import functools


def parameter(x_BTD, *, y_BT=None):
    """A docstring."""
    return x_BTD


def size(x_BT, other):
    y_TD = other
    return y_TD


def digit(x):
    x_B1 = x
    return x_B1


def pair(a, b):
    (x_B, n), [*_, y_BT] = (a, 1), (0, b)
    return y_BT


def added(x, y):
    x_BT = x
    x_BT += y
    y_BT: object = y
    return x_BT


def loop(arrays):
    for i, x_BT in enumerate(arrays):
        y_BT = x_BT + i
    while arrays:
        x_B = arrays.pop()[:, 0]


def longer(x_BT, arrays):
    for y_T in arrays:
        pass


def comprehension(arrays):
    return [x_BT.sum() for x_BT in arrays]


def walrus(x):
    return (x_B := x).sum() if x is not None else None


def managed(x):
    with contextlib.nullcontext(x) as x_B:
        return x_B


by_name = lambda x_BB, n=2: x_BB * n


def within(x_BT):
    def inner(y_T):
        return y_T

    return inner


class Kept:
    CONSTANT_B = 3
    x_B: object = None

    def method(self, angles_BTh):
        return angles_BTh
'''


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The module above, imported through the hook."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "lettered").mkdir()
    (folder / "lettered/__init__.py").touch()
    (folder / "lettered/names.py").write_text(SOURCE)
    finder = letters.Finder("lettered")
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("lettered.names")
    sys.meta_path.remove(finder)
    sys.path.remove(str(folder))
    for name in ("lettered", "lettered.names"):
        del sys.modules[name]


def of(*shape):
    return np.zeros(shape)


def line(text: str) -> int:
    return SOURCE.splitlines().index(text) + 1


@pytest.mark.parametrize(
    ("call", "where", "said"),
    [
        (lambda m: m.parameter(of(2, 3)), "def parameter(x_BTD, *, y_BT=None):",
         "x_BTD has 2 dimensions, shape (2, 3); its letters say 3"),
        (lambda m: m.parameter(of(2, 3, 4), y_BT=of(2, 4)), "def parameter(x_BTD, *, y_BT=None):",
         "y_BT has shape (2, 4), T=4; T=3 by x_BTD in line 7"),
        (lambda m: m.size(of(2, 3), of(5, 4)), "    y_TD = other",
         "y_TD has shape (5, 4), T=5; T=3 by x_BT in line 12"),
        (lambda m: m.digit(of(2, 3)), "    x_B1 = x", "x_B1 has shape (2, 3), 1=3; 1=1 by the digit"),
        (lambda m: m.pair(of(2), of(3, 2)), "    (x_B, n), [*_, y_BT] = (a, 1), (0, b)",
         "y_BT has shape (3, 2), B=3; B=2 by x_B in line 23"),
        (lambda m: m.added(jnp.zeros((2, 3)), of(4, 2, 3)), "    x_BT += y",
         "x_BT has 3 dimensions, shape (4, 2, 3); its letters say 2"),
        (lambda m: m.added(of(2, 3), of(3)), "    y_BT: object = y",
         "y_BT has 1 dimensions, shape (3,); its letters say 2"),
        (lambda m: m.loop([of(2, 3), of(2)]), "    for i, x_BT in enumerate(arrays):",
         "x_BT has 1 dimensions, shape (2,); its letters say 2"),
        (lambda m: m.longer(of(2, 3), [of(3), of(4)]), "    for y_T in arrays:",
         "y_T has shape (4,), T=4; T=3 by x_BT in line 41"),
        (lambda m: m.comprehension([of(2, 3), of(2)]), "    return [x_BT.sum() for x_BT in arrays]",
         "x_BT has 1 dimensions, shape (2,); its letters say 2"),
        (lambda m: m.walrus(of(2, 3)), "    return (x_B := x).sum() if x is not None else None",
         "x_B has 2 dimensions, shape (2, 3); its letters say 1"),
        (lambda m: m.managed(of(2, 3)), "    with contextlib.nullcontext(x) as x_B:",
         "x_B has 2 dimensions, shape (2, 3); its letters say 1"),
        (lambda m: m.by_name(of(2, 3)), "by_name = lambda x_BB, n=2: x_BB * n",
         "x_BB has shape (2, 3), B=3; B=2 by x_BB in line 59"),
        (lambda m: m.Kept().method(of(2, 3)), "    def method(self, angles_BTh):",
         "angles_BTh has 2 dimensions, shape (2, 3); its letters say 3"),
    ],
)  # fmt: skip
def test_a_name_that_lies_is_found(call, where, said, checked):
    message = f"{checked.__file__}:{line(where)}: {said}"
    with pytest.raises(letters.WrongLetters, match=f"^{re.escape(message)}$"):
        call(checked)


def test_names_that_tell_the_truth_pass(checked):
    assert checked.parameter(of(2, 3, 4), y_BT=of(2, 3)).shape == (2, 3, 4)
    assert checked.size(of(2, 3), of(3, 4)).shape == (3, 4)
    assert checked.digit(of(2, 1)).shape == (2, 1)
    assert checked.by_name(of(2, 2)).shape == (2, 2)
    assert checked.comprehension([of(2, 3), of(4, 5)]) == [0, 0]
    checked.loop([of(2, 3), of(4, 5)])  # of a loop's own letters each turn has its own
    checked.longer(of(2, 3), [of(3), of(3)])
    checked.within(of(2, 3))(of(7))  # another call has its own
    checked.parameter(of(2, 3, 4), y_BT=of(1, 3))  # broadcast


def test_what_has_no_shape_passes(checked):
    for value in (None, (1, 2), [of(2)], 3.0, "text"):
        assert checked.parameter(value) is value


def test_tracers_are_checked(checked):
    assert jax.eval_shape(checked.parameter, of(2, 3, 4)).shape == (2, 3, 4)
    with pytest.raises(letters.WrongLetters, match=r"x_BTD has 2 dimensions"):
        jax.jit(checked.parameter)(jnp.zeros((2, 3)))


def test_source_lines_stay_and_no_bytecode_is_kept(checked):
    assert inspect.getsource(checked.size) == "\n".join(SOURCE.splitlines()[11:14]) + "\n"
    assert checked.parameter.__doc__ == "A docstring."
    assert [p.name for p in Path(checked.__file__).parent.rglob("names*")] == ["names.py"]


def test_letters_end_names_in_the_way_of_the_house():
    ends = {"x_BTD": "BTD", "angles_BTh": "BTh", "slope_BT1": "BT1", "inverse_h": "h", "_x_B": "B"}
    assert {name: letters.letters_of(name) for name in ends} == ends
    others = ("top_k", "min_p", "HOST_GB_S", "CONSTANT_B", "link_gb_s", "end_1", "x", "_B", "x_BTx")
    assert not any(map(letters.letters_of, others))


def test_the_library_is_checked():
    assert isinstance(kernels.__loader__, letters.Loader)
    assert isinstance(attention.__loader__, letters.Loader)
    assert not isinstance(dims.__loader__, letters.Loader), "it has no such name"
    with pytest.raises(
        letters.WrongLetters, match=r"model/kernels.py:\d+: q_BNTH has 3 dimensions"
    ):
        kernels.attend(of(2, 3, 4), of(2, 3, 4, 5), of(2, 3, 4, 5), of(2, 3, 4))
