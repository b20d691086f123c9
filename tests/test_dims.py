"""What the roles of letters decide."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config, dims, sharding
from llama_jax.model import linear
from llama_jax.quant import rounding
from llama_jax.train import optim
from tests.conftest import MODEL

# label: (matrix, inner, narrow letter); the matrices of an adapter ("E") of q and of o included.
LABELS = {
    "VD": (True, False, "D"), "DV": (True, False, "D"), "RD": (True, False, "D"), "NU": (False, False, ""),
    "LD": (False, False, "D"), "LNH": (False, False, ""), "LDNH": (True, True, "D"), "LNHD": (True, True, "D"),
    "FD": (True, True, "D"), "LDE": (True, True, "D"), "LENH": (True, True, "E"), "LNHE": (True, True, "E"),
    "ED": (True, True, "D"), "E": (False, False, "E"),
}  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_matrices_are_those_of_a_width_or_a_rank(label):
    assert (dims.is_matrix(label), dims.is_inner(label), dims.width(label)) == LABELS[label]


def test_tables_begin_with_what_is_looked_up():
    assert [dims.is_table(label) for label in ("VD", "RD", "DV", "LDF")] == [
        True,
        True,
        False,
        False,
    ]


def test_sizes_are_those_of_the_part_that_has_them():
    assert dims.shape("LDNH", MODEL) == (2, 24, 6, 4)
    assert dims.shape("VDKF", MODEL) == (41, 24, 3, 20)

    @dataclasses.dataclass(frozen=True)
    class Adapter:
        rank: int = 5
        dim: int = 24

    assert dims.sizes(Adapter()) == {"D": 24, "E": 5, "U": 32}


def test_an_adapter_decays_is_sharded_and_orthogonalised_as_a_matrix():
    letters = {"down": "LDE", "up": "LENH", "scale": "LD"}
    params = {name: np.ones(dims.shape(of, Sized()), np.float32) for name, of in letters.items()}
    decayed, _ = optim.build(
        config.Optim(learning_rate=1.0, weight_decay=0.5, warmup_steps=0, schedule="linear"),
        10,
        letters,
    )
    updates, _ = decayed.update(jax.tree.map(np.zeros_like, params), decayed.init(params), params)
    assert {name: float(leaf.ravel()[0]) for name, leaf in updates.items()} == {
        "down": -0.5, "up": -0.5, "scale": 0.0,
    }  # fmt: skip
    layout = sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices())
    assert layout.param("LDE").spec == jax.P(None, ("fsdp", "context"), None)
    assert layout.param("LENH").spec == jax.P(None, None, ("tensor",), None)
    sides = optim._sides("LENH")
    assert (sides.reduction_axis, sides.output_axis) == ([1], [2, 3])
    assert rounding.grid("NHE", (6, 4, 5), 0).contracted == 2


class Sized:
    dim, rank, heads, head_dim, groups = 24, 5, 6, 4, 2


def test_the_gradient_of_an_adapter_is_that_of_einsum():
    """Its narrow letter is its rank."""
    layout = sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices())
    rng = np.random.default_rng(0)
    x_BTE, w_ENH, slope_BNTH = (
        rng.normal(size=s).astype("f") for s in ((8, 7, 5), (5, 6, 4), (8, 6, 7, 4))
    )
    _, back = jax.vjp(
        jax.jit(lambda x, w: linear._across_devices("BTE,ENH->BNTH", x, w, layout)), x_BTE, w_ENH
    )
    x_slope, w_slope = back(slope_BNTH)
    np.testing.assert_allclose(
        w_slope, np.einsum("BTE,BNTH->ENH", x_BTE, slope_BNTH), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        x_slope, np.einsum("ENH,BNTH->BTE", w_ENH, slope_BNTH), rtol=1e-4, atol=1e-4
    )
