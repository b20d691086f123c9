"""Weights through every format and back, bit by bit; sharded on the way in; resumed after a kill."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from benchmarks import synthetic
from llama_jax import config, sharding, tree
from llama_jax.convert import folder, formats, job, names, native, stored
from llama_jax.model import transformer
from tests.convert import small
from tests.convert.small import MODEL

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def meta(tmp_path):
    """Two model-parallel parts in bfloat16."""
    synthetic.write(tmp_path / "meta", MODEL, 2, BFLOAT16)
    return tmp_path / "meta"


def test_meta_native_hf_native_meta_is_exact(meta, tmp_path):
    start = small.tensors(formats.open_checkpoint(meta, "", ""))
    came = meta
    for i, kind in enumerate(("native", "hf", "native", "meta")):
        to = tmp_path / f"{i}-{kind}"
        small.assert_same(small.tensors(small.convert(came, to, kind)), start)
        came = to


def test_the_merged_parts_are_the_whole_tensors(meta):
    source = formats.open_checkpoint(meta, "", "")
    found = small.tensors(source)
    for unit in names.units(MODEL):
        whole = synthetic.tensor(unit, MODEL, BFLOAT16, 0)
        if unit.row.pairs:
            order = [h * 4 + i for h in range(len(whole) // 4) for i in (0, 2, 1, 3)]
            whole = whole[order]
        assert found[unit.hf].tobytes() == whole.tobytes(), unit.hf


def test_parts_follow_one_another_by_number(tmp_path):
    """Also where the numbers are not padded, as they are in names: 0, 1, 10, 11, 2."""
    model = dataclasses.replace(MODEL, vocab_size=36, dim=48, heads=12, kv_heads=12, ffn_dim=60)
    synthetic.write(tmp_path / "meta", model, 12, BFLOAT16)
    start = small.tensors(formats.open_checkpoint(tmp_path / "meta", "", ""))
    for file in (tmp_path / "meta").glob("*.pth"):
        number = int(file.name.split(".")[1])
        file.rename(file.with_name(f"consolidated.{number}.pth"))
    small.assert_same(small.tensors(formats.open_checkpoint(tmp_path / "meta", "", "")), start)


def test_rotary_tables_of_llama_1_are_left_out(tmp_path):
    """Of Meta's 7B: one in each layer, and one of the whole in later files."""
    torch = pytest.importorskip("torch")
    synthetic.write(tmp_path / "meta", MODEL, 1, np.dtype(np.float32))
    start = small.tensors(formats.open_checkpoint(tmp_path / "meta", "", ""))
    file = tmp_path / "meta/consolidated.00.pth"
    state = dict(torch.load(file))
    for i in range(MODEL.layers):
        state[f"layers.{i}.attention.inner_attention.rope.freqs"] = torch.ones(2)
    torch.save({**state, "rope.freqs": torch.ones(2)}, file)
    small.assert_same(small.tensors(formats.open_checkpoint(tmp_path / "meta", "", "")), start)


@pytest.mark.parametrize("rows", [3, 7, 10_000])
def test_the_size_of_blocks_does_not_matter(meta, tmp_path, monkeypatch, rows):
    """Uneven last pieces, one block, one piece a layer."""
    monkeypatch.setattr(job, "BLOCK_BYTES", rows * 4 * MODEL.dim)
    wanted = small.tensors(formats.open_checkpoint(meta, "", ""))
    for kind in ("native", "hf", "meta"):
        to = tmp_path / f"to-{kind}"
        small.assert_same(small.tensors(small.convert(meta, to, kind)), wanted)


def test_parameters_are_restored_into_shards(tmp_path):
    small.convert(small.hf(tmp_path / "hf"), tmp_path / "native", "native")
    layout = sharding.make(config.Mesh(data=1, fsdp=4, tensor=2), jax.devices())
    module = transformer.build(MODEL, layout)
    params = native.load(tmp_path / "native", module)
    wanted = tree.paths(names.from_state_dict(small.state(), MODEL))
    letters = tree.paths(transformer.letters(module))
    for name, array in tree.paths(params).items():
        assert array.sharding == layout.param(letters[name]), name
        np.testing.assert_array_equal(array, wanted[name])
    gate = params["groups"]["self_0"]["ffn"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 6, 10)}


def test_bfloat16_weights_are_restored_as_float32(meta, tmp_path, layout):
    small.convert(meta, tmp_path / "native", "native")
    params = native.load(tmp_path / "native", transformer.build(MODEL, layout))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    whole = synthetic.tensor(names.units(MODEL)[0], MODEL, BFLOAT16, 0)
    np.testing.assert_array_equal(params["embed"], whole.astype(np.float32))


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_weights_are_read_in_the_dtype_they_are_computed_in(tmp_path, layout, stored):
    """The bits of reading float32 and casting then, and never a float32 array: half the memory."""
    small.convert(
        small.hf(tmp_path / "hf", small.state(dtype=np.dtype(stored))), tmp_path / "to", "native"
    )
    module = transformer.build(MODEL, layout)
    wanted = jax.tree.map(lambda w: w.astype("bfloat16"), native.load(tmp_path / "to", module))
    found = native.load(tmp_path / "to", module, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_tensors_of_zeros_are_restored(tmp_path, layout):
    """As block expansion makes them (LLaMA Pro, arXiv:2401.02415 section 3.2): new layers that add nothing."""
    tensors = small.state()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        tensors[name][:] = 0
    found = small.convert(small.hf(tmp_path / "hf", tensors), tmp_path / "native", "native")
    small.assert_same(small.tensors(found), tensors)
    params = native.load(tmp_path / "native", transformer.build(MODEL, layout))
    down = params["groups"]["self_0"]["ffn"]["down"]
    assert not np.any(down[1])
    np.testing.assert_array_equal(down[0], tensors["model.layers.0.mlp.down_proj.weight"].T)


def test_a_dtype_rounds_to_nearest_even(tmp_path):
    found = small.convert(small.hf(tmp_path / "hf"), tmp_path / "out", "native", BFLOAT16)
    for name, array in small.tensors(found).items():
        bits = small.state()[name].view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        np.testing.assert_array_equal(array.view(np.uint16), rounded, err_msg=name)


def test_settings_survive_every_format(tmp_path):
    model = dataclasses.replace(
        MODEL,
        output="tied",
        rope=config.Rope(theta=500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0),
    )
    tensors = small.state(model)
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    others = {"rope_theta": 5e5, "rope_scaling": scaling, "tie_word_embeddings": True}
    came = small.hf(tmp_path / "hf", tensors, **others)
    for kind in ("native", "hf", "meta", "native"):
        found = small.convert(came, tmp_path / f"to-{kind}-{came.name}", kind)
        assert found.model == model
        small.assert_same(small.tensors(found), tensors)
        came = tmp_path / f"to-{kind}-{came.name}"


def test_layers_of_different_dtypes_are_stacked_in_float32(tmp_path):
    tensors = small.state()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    found = small.tensors(
        small.convert(small.hf(tmp_path / "hf", tensors), tmp_path / "to", "native")
    )
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], tensors[name].astype(np.float32))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["native", "hf", "meta"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_goes_on(
    meta, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(job, "SYNC_BYTES", 1)
    done = []

    def kill(count):
        done.append(count)
        if len(done) == 8:
            raise _Killed

    with pytest.raises(_Killed):
        small.convert(meta, tmp_path / "to", kind, progress=kill)
    assert not (tmp_path / "to").exists()
    assert (tmp_path / "to.unfinished").is_dir()
    with pytest.raises(ValueError, match=r"no checkpoint that is known|config\.json|params\.json"):
        formats.open_checkpoint(tmp_path / "to.unfinished", "", "")

    source = formats.open_checkpoint(meta, "", "")
    read = []
    counted = dataclasses.replace(
        source, read=lambda unit, a, b: read.append(unit.hf) or source.read(unit, a, b)
    )
    folder.convert(counted, tmp_path / "to", kind, None, lambda n: None, print)
    assert len(read) == len(names.units(MODEL)) - 8
    assert not (tmp_path / "to.unfinished").exists()
    found = formats.open_checkpoint(tmp_path / "to", "", "")
    small.assert_same(small.tensors(found), small.tensors(source))


def test_an_interrupted_conversion_of_something_else_starts_anew(meta, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SYNC_BYTES", 1)

    def kill(count):
        raise _Killed

    with pytest.raises(_Killed):
        small.convert(meta, tmp_path / "to", "hf", progress=kill)
    synthetic.write(tmp_path / "other", MODEL, 1, BFLOAT16, seed=1)
    small.convert(tmp_path / "other", tmp_path / "to", "hf", report=pytest.fail)
    found = small.tensors(formats.open_checkpoint(tmp_path / "to", "", ""))
    other = small.tensors(formats.open_checkpoint(tmp_path / "other", "", ""))
    small.assert_same(found, other)


@pytest.mark.parametrize("wrong", [False, True], ids=["of another source", "refused half-way"])
def test_a_removal_that_was_killed_is_not_taken_for_tensors_that_are_there(
    tmp_path, monkeypatch, wrong
):
    """The journal goes last, and vouches for nothing by then."""
    monkeypatch.setattr(job, "SYNC_BYTES", 1)
    tensors = small.state()
    one, to = small.hf(tmp_path / "one"), tmp_path / "to"
    if wrong:
        tensors["lm_head.weight"][0, 0] = np.nan
        small.hf(one, tensors)
    else:
        with pytest.raises(_Killed):
            small.convert(one, to, "hf", progress=_kill)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(job.Path, "unlink", _kill)
        small.convert(one if wrong else small.hf(tmp_path / "two"), to, "hf")
    small.hf(one)
    small.assert_same(
        small.tensors(small.convert(one, to, "hf", report=pytest.fail)), small.state()
    )


def _kill(_):
    raise _Killed


def test_large_weights_are_exported_in_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.convert.hf.SHARD_BYTES", 9000)
    found = small.convert(small.hf(tmp_path / "hf"), tmp_path / "to", "hf")
    index = json.loads((tmp_path / "to/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "to").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in small.state().values())
    small.assert_same(small.tensors(found), small.state())


def test_small_files_of_hugging_face_leave_as_they_came(tmp_path):
    came = small.hf(tmp_path / "hf")
    (came / "chat_template.jinja").write_text("{{ messages }}")
    (came / "generation_config.json").write_text('{"eos_token_id": [3, 5], "bos_token_id": 1}')
    small.convert(came, tmp_path / "native", "native")
    small.convert(tmp_path / "native", tmp_path / "back", "hf")
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (came / name).read_bytes()
    settings = json.loads((tmp_path / "back/config.json").read_text())
    assert (settings["eos_token_id"], settings["bos_token_id"]) == ([3, 5], 1)


def narrow_with_wide_norms():
    return {
        name: array if "norm" in name else array.astype(ml_dtypes.bfloat16)
        for name, array in small.state().items()
    }


@pytest.mark.parametrize(
    ("tensors", "dtype", "computed"),
    [
        (small.state(), None, "float32"),
        (small.state(), "bfloat16", "bfloat16"),
        (small.state(dtype=np.float16), None, "bfloat16"),
        (small.state(dtype=np.float16), "float32", "float32"),
        (narrow_with_wide_norms(), None, "bfloat16"),  # common in fine-tunes
    ],
    ids=["float32", "rounded", "float16", "float16 kept", "norms in float32"],
)
def test_what_is_computed_in_follows_the_dtype_of_the_matrices(tmp_path, tensors, dtype, computed):
    came = small.hf(tmp_path / "hf", tensors)
    dtype = next((d for d in stored.DTYPES.values() if d.name == dtype), None)
    found = small.convert(came, tmp_path / "native", "native", dtype)
    assert found.model.compute_dtype == computed
    small.convert(tmp_path / "native", tmp_path / "again", "native")
    assert native.settings(tmp_path / "again")[0].compute_dtype == computed
