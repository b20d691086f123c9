"""What a Layout says of its devices, counted by hand on a mesh of 2 x 3 x 4 x 5 x 7."""

import jax
import pytest

from llama_jax import config, sharding
from llama_jax.sharding import DeviceGroup

P = jax.P


@pytest.fixture(scope="module")
def layout():
    mesh = config.Mesh(slices=2, data=3, fsdp=4, context=5, tensor=7)
    return sharding.abstract(mesh, 2 * 3 * 4 * 5 * 7)


def test_groups_are_counted_in_the_order_of_the_mesh(layout):
    """tensor is the innermost: its devices are neighbours, those of data 4 x 5 x 7 apart."""
    assert (layout.slices, layout.row_parts, layout.position_parts) == (2, 2 * 3 * 4, 5 * 7)
    assert layout.wide == DeviceGroup(7, 1)
    assert layout.exchanging == DeviceGroup(5, 7)
    assert layout.shards == DeviceGroup(4 * 5, 7)
    assert layout.replicas == DeviceGroup(3, 4 * 5 * 7)


def test_decoding_keeps_weights_where_they_rest_and_splits_rows_over_what_is_left(layout):
    decoding = layout.decoding
    assert decoding != layout
    assert decoding == layout.decoding, "so that a module of it is compiled once"
    assert hash(decoding) == hash(layout.decoding)
    assert decoding.param("DF") == layout.param("DF")
    assert layout.batch("BT").spec == P(("slices", "data", "fsdp"), None)
    assert decoding.batch("BT").spec == P(("slices", "data"), None)
    assert layout.cache("BKSH").spec == P(
        ("slices", "data", "fsdp"), ("tensor", "context"), None, None
    )
    assert decoding.cache("BKSH").spec == P(("slices", "data"), ("tensor", "context"), None, None)
    assert (decoding.row_parts, decoding.position_parts) == (6, 1)


def test_the_meshes_of_a_slice_use_all_of_its_chips():
    found = list(sharding.meshes("v4_32", 1, 16, [1, 2]))
    assert len(set(found)) == len(found) == 5 + 4 + 3 + 2 + 4 + 3 + 2 + 1
    assert all(sharding.fewest(mesh) == 16 for mesh in found)
    assert {mesh.hardware for mesh in found} == {"v4_32"}
    (twelve,) = (
        mesh for mesh in sharding.meshes("any", 2, 12, [1]) if (mesh.fsdp, mesh.tensor) == (4, 1)
    )
    assert (twelve.slices, twelve.data) == (2, 3)
    assert sharding.fewest(config.Mesh(data=3, tensor=2)) == 6, "fsdp may be 1"
