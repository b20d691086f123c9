"""Torch's files: what torch.save writes is read without torch, what we write is read by torch.load."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from benchmarks import synthetic
from configs import sizes
from llama_jax import config
from llama_jax.convert import formats, meta_params, names, pth
from tests.convert import small
from tests.convert.small import MODEL


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_views_of_one_storage_are_found_where_they_lie(tmp_path, torch):
    """As in Meta's 13B and larger, whose tensors are slices of a flat parameter."""
    flat = torch.arange(100.0).bfloat16()
    saved = {"a": flat[10:22].reshape(3, 4), "b": flat[50:52], "c": torch.arange(6).half()}
    torch.save(saved, tmp_path / "x.pth")
    found = pth.read_names(tmp_path / "x.pth")
    for name, tensor in saved.items():
        rows = found[name].rows(0, tensor.shape[0])
        assert str(rows.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(rows.astype(np.float32), tensor.float().numpy())
    np.testing.assert_array_equal(found["a"].rows(1, 2)[0].astype(int), [14, 15, 16, 17])


def test_parameters_and_a_nested_model_are_read(tmp_path, torch):
    inside = {"w": torch.nn.Parameter(torch.ones(2, 3))}
    torch.save({"model": inside, "step": 3}, tmp_path / "x.pth")
    assert pth.read_names(tmp_path / "x.pth")["w"].shape == (2, 3)


def test_a_parameter_with_an_attribute_is_read(tmp_path, torch):
    """As tensor-parallel trainers mark them; torch pickles it by _rebuild_parameter_with_state."""
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    parameter.tensor_model_parallel = True
    torch.save({"w": parameter}, tmp_path / "x.pth")
    rows = pth.read_names(tmp_path / "x.pth")["w"].rows(0, 2)
    np.testing.assert_array_equal(rows, parameter.detach().numpy())


def test_a_file_without_tensors_names_its_keys(tmp_path, torch):
    torch.save({"module": {"weights": [1], "step": 3}}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match="no tensors under 'module'; its keys are 'weights', 'step'"
    ):
        pth.read_names(tmp_path / "x.pth")


def test_the_state_of_a_module_is_read(tmp_path, torch):
    """An OrderedDict with an attribute, _metadata; a training checkpoint has more beside it."""
    module = torch.nn.Linear(3, 2)
    whole = {"model": module.state_dict(), "epoch": 1, "lr": 1e-3, "seen": [1, None, {2: True}]}
    for saved in (module.state_dict(), whole):
        torch.save(saved, tmp_path / "x.pth")
        found = pth.read_names(tmp_path / "x.pth")
        assert {name: tensor.shape for name, tensor in found.items()} == {
            "weight": (2, 3),
            "bias": (2,),
        }


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda torch: torch.ones(3, 4).T, "not stored row by row"),
        (lambda torch: torch.ones(3, dtype=torch.int64), "w is of int64; weights must be"),
        (lambda torch: torch.ones(3, dtype=torch.float64), "w is of float64"),
        (lambda torch: torch.ones(3).to(torch.float8_e4m3fn), "w is of float8_e4m3fn"),
        (lambda torch: torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
    ],
    ids=["transposed", "integers", "double", "8-bit", "complex"],
)
def test_tensors_that_are_no_weights(tmp_path, torch, make, word):
    torch.save({"w": make(torch)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=word):
        pth.read_names(tmp_path / "x.pth")


def test_the_format_before_torch_1_6(tmp_path, torch):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"since 1\.6"):
        pth.read_names(tmp_path / "x.pth")


@pytest.mark.parametrize("output", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_torch_loads_what_is_exported(tmp_path, torch, output, dtype):
    model = dataclasses.replace(MODEL, output=output)
    came = small.hf(
        tmp_path / "hf", small.state(model, dtype), tie_word_embeddings=output == "tied"
    )
    small.convert(came, tmp_path / "meta", "meta")
    for mmap in (False, True):
        found = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True, mmap=mmap)
        for unit in names.units(model):
            wanted = small.state(model, dtype)[unit.hf]
            if unit.row.pairs:
                wanted = names.interleave(wanted, model.head_dim)
            np.testing.assert_array_equal(found[unit.meta].numpy(), wanted)
        if output == "tied":
            same = found["output.weight"].data_ptr() == found["tok_embeddings.weight"].data_ptr()
            assert same


def save_parts(torch, folder: Path, model, parts: int, embed_axis: int, repeat_kv: int = 1):
    """Meta's files by torch.save: what fairscale's layers would hold on each rank."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(meta_params.params_of(model)))
    whole = {
        u.meta: synthetic.tensor(u, model, np.dtype(np.float32), 0) for u in names.units(model)
    }
    columns = ("attention.wo.weight", "feed_forward.w2.weight")
    for rank in range(parts):
        part = {"rope.freqs": torch.ones(model.head_dim // 2)}
        for name, array in whole.items():
            if array.ndim == 2:
                axis = embed_axis if name.startswith("tok_") else int(name.endswith(columns))
                if name.endswith(("wk.weight", "wv.weight")):
                    array = np.split(array, parts // repeat_kv, axis)[rank // repeat_kv]
                else:
                    array = np.split(array, parts, axis)[rank]
            part[name] = torch.from_numpy(array.copy())
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return whole


@pytest.mark.parametrize("embed_axis", [0, 1], ids=["Llama 3", "LLaMA and Llama 2"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_merged_along_the_right_axis(tmp_path, torch, parts, embed_axis):
    model = dataclasses.replace(MODEL, heads=8, kv_heads=4, head_dim=6, dim=48)
    whole = save_parts(torch, tmp_path / "meta", model, parts, embed_axis)
    assert_merged(tmp_path / "meta", model, whole)


def test_keys_that_several_parts_repeat_are_taken_once(tmp_path, torch):
    """Llama 3.1 405B in 16 parts has 8 key heads."""
    model = dataclasses.replace(MODEL, heads=8, kv_heads=2, head_dim=6, dim=48)
    whole = save_parts(torch, tmp_path / "meta", model, 4, 0, repeat_kv=2)
    assert_merged(tmp_path / "meta", model, whole)


def assert_merged(folder: Path, model, whole):
    source = formats.open_checkpoint(folder, "", "")
    assert source.model == model
    for unit in names.units(model):
        wanted = whole[unit.meta]
        if unit.row.pairs:
            wanted = names.half_split(wanted, model.head_dim)
        np.testing.assert_array_equal(source.read(unit, 0, len(wanted)), wanted, unit.meta)


# params.json

PUBLISHED = {
    "llama1/7B": sizes.LLAMA_7B,
    "llama1/13B": sizes.LLAMA_13B,
    "llama1/30B": sizes.LLAMA_33B,
    "llama1/65B": sizes.LLAMA_65B,
    "llama3_1/8B": sizes.LLAMA31_8B,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_our_published_settings(name, shared):
    params = meta_params.read(shared(f"configs/{name}/params.json"))
    model = PUBLISHED[name]
    assert meta_params.ffn_width(params) == model.ffn_dim
    assert params["norm_eps"] == model.norm_eps
    assert params.get("n_kv_heads", params["n_heads"]) == model.kv_heads
    assert meta_params.rope_of(params, tied=False)[0] == model.rope
    context = {"llama1": 2048, "llama3_1": 131_072}[name.split("/")[0]]
    assert meta_params.context_of(params) == context


@pytest.mark.parametrize(
    "model",
    [getattr(sizes, name) for name in dir(sizes) if name.isupper() and not name.startswith("_")],
)
def test_the_settings_of_every_network_can_be_said_in_params(model):
    params = json.loads(json.dumps(meta_params.params_of(model)))
    assert meta_params.ffn_width(params) == model.ffn_dim
    assert meta_params.rope_of(params, tied=False)[0] == model.rope


def test_any_width_can_be_said_in_params():
    for ffn_dim in (1, 20, 63, 64, 65, 1000, 11_007):
        settings = meta_params.ffn_settings(24, ffn_dim)
        assert meta_params.ffn_width({"dim": 24, **settings}) == ffn_dim


def test_a_factor_that_params_leave_out_is_told_from_the_kind_and_said():
    params = {"use_scaled_rope": True, "rope_theta": 5e5}
    rope, note = meta_params.rope_of(params, tied=True)
    assert rope == config.Rope(theta=5e5, factor=32.0)
    assert "32" in note[0]
    rope, note = meta_params.rope_of(params, tied=False)
    assert rope == config.Rope(theta=5e5, factor=8.0)
    assert "8" in note[0]


def test_a_vocabulary_of_minus_one_is_that_of_the_tokenizer(tmp_path, shared):
    import shutil

    model = dataclasses.replace(MODEL, vocab_size=512)
    synthetic.write(tmp_path / "models/7B", model, 2, np.dtype(np.float16))
    params = json.loads((tmp_path / "models/7B/params.json").read_text())
    (tmp_path / "models/7B/params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    shutil.copy(shared("checkpoints/stories260K/tok512.bin"), tmp_path / "tokenizer.bin")
    source = formats.open_checkpoint(tmp_path / "models/7B", "", str(tmp_path / "tokenizer.bin"))
    assert source.model.vocab_size == 512
    assert any("512 pieces of the tokenizer" in note for note in source.notes)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_output_matrix_that_is_a_copy_of_the_embedding_is_tied(tmp_path, parts, monkeypatch):
    """As of a Llama 3.2 1B that was saved again: two storages, and the rope factor is that of tied ones."""
    own = synthetic.tensor
    model = dataclasses.replace(MODEL, rope=config.Rope(theta=5e5, factor=32.0))

    def copied(unit, *rest):
        return own(
            names.unit_of(names.EMBEDDING, 0, model) if unit.row.path == "output" else unit, *rest
        )

    monkeypatch.setattr(synthetic, "tensor", copied)
    synthetic.write(tmp_path / "meta", model, parts, np.dtype(np.float16))
    file = tmp_path / "meta/params.json"
    params = json.loads(file.read_text())
    del params["rope_scaling_factor"]
    file.write_text(json.dumps(params))
    found = formats.open_checkpoint(tmp_path / "meta", "", "").model
    assert (found.output, found.rope.factor) == ("tied", 32.0)


@pytest.mark.parametrize(
    ("others", "context"),
    [
        ({"norm_eps": 1e-5, "rope_theta": 1e6}, 16_384),  # Code Llama
        ({"norm_eps": 1e-6}, 2048),
        ({"norm_eps": 1e-5}, 4096),
    ],
)
def test_positions_by_the_other_settings(others, context):
    assert meta_params.context_of({"n_layers": 32, **others}) == context


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_first_chat_model_of_llama2_is_asked_for_its_epsilon(tmp_path, dtype):
    model = dataclasses.replace(MODEL, norm_eps=1e-6)
    synthetic.write(tmp_path / "meta", model, 1, np.dtype(dtype))
    notes = formats.open_checkpoint(tmp_path / "meta", "", "").notes
    assert any("norm_eps to 1e-05" in note for note in notes) == (dtype is ml_dtypes.bfloat16)
