"""Folders of smaller weights: what is written is what is read, on any mesh, and nothing else is touched."""

import json
import shutil

import jax
import numpy as np
import pytest

from llama_jax import config, sharding, tree
from llama_jax.convert import native, smaller
from llama_jax.model import transformer
from llama_jax.quant.network import quantise
from tests.convert import small

QUANTS = {
    "int8": config.Quant(),
    "int8 x int16": config.Quant(activations="int16"),
    "int4": config.Quant(bits=4, group=12, method="nearest"),
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smaller")
    small.convert(small.hf(folder / "hf"), folder / "native", "native")
    return folder / "native"


def loaded(folder, layout):
    module = transformer.build(native.settings(folder)[0], layout)
    return module, native.load(folder, module)


def write(origin, to, layout, quant):
    made = quantise(*loaded(origin, layout), quant)
    with smaller.new(to, origin, 0) as place:
        smaller.write(place, origin, made, quant, "")
    return made


@pytest.mark.parametrize("quant", QUANTS)
def test_what_is_written_is_what_is_read(origin, tmp_path, layout, quant):
    made = write(origin, tmp_path / "to", layout, QUANTS[quant])
    assert native.quantised(tmp_path / "to") == QUANTS[quant]
    many = sharding.make(config.Mesh(fsdp=2, tensor=2, data=2), jax.devices())
    for where in (layout, many):
        _, found = loaded(tmp_path / "to", where)
        assert jax.tree.structure(found) == jax.tree.structure(made)
        for name, leaf in tree.paths(found).items():
            wanted = tree.paths(made)[name]
            assert leaf.dtype == wanted.dtype
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted), err_msg=name)


def test_blocks_that_the_mesh_does_not_divide_are_named(origin, tmp_path, layout):
    write(origin, tmp_path / "to", layout, config.Quant(bits=4, group=8, method="nearest"))
    many = sharding.make(config.Mesh(fsdp=8), jax.devices())
    with pytest.raises(
        ValueError, match=r"one scale each, do not spread evenly over the mesh fsdp=8"
    ):
        loaded(tmp_path / "to", many)


def test_scales_that_do_not_fit_are_refused(origin, tmp_path, layout):
    write(origin, tmp_path / "to", layout, QUANTS["int8"])
    said = json.loads((tmp_path / "to/model.json").read_text())
    del said["quant"]
    (tmp_path / "to/model.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="does not hold the parameters of its settings"):
        loaded(tmp_path / "to", layout)


def test_the_origin_is_not_written_over(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "to.unfinished")
    before = sorted((tmp_path / "to.unfinished").rglob("*"))
    with (
        pytest.raises(ValueError, match="which is written; name another --to"),
        smaller.new(tmp_path / "to", tmp_path / "to.unfinished", 0),
    ):
        pass
    assert sorted((tmp_path / "to.unfinished").rglob("*")) == before


def test_two_do_not_write_one_folder(origin, tmp_path):
    with (
        smaller.new(tmp_path / "to", origin, 0) as place,
        pytest.raises(ValueError, match="another conversion is writing"),
        smaller.new(tmp_path / "to", origin, 0),
    ):
        pass
    assert not place.exists()
    assert (tmp_path / "to").is_dir()


def test_what_was_killed_is_begun_again_and_an_error_leaves_nothing(origin, tmp_path, layout):
    place = tmp_path / "to.unfinished"
    place.mkdir()
    (place / smaller._MARK).touch()
    (place / "params").mkdir()
    (place / "params/half").write_text("of it")
    with pytest.raises(KeyboardInterrupt), smaller.new(tmp_path / "to", origin, 0):
        assert [file.name for file in place.iterdir()] == [smaller._MARK]
        raise KeyboardInterrupt
    assert not place.exists()
    assert not (tmp_path / "to").exists()


def test_a_disk_that_is_too_small_is_said_before_the_work(origin, tmp_path):
    with pytest.raises(OSError, match="GiB more, but"), smaller.new(tmp_path / "to", origin, 1e18):
        pass
    assert not (tmp_path / "to.unfinished").exists()
