"""config.json of transformers 4 and 5, read and written; torch's .bin; transformers loads what is exported."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs import sizes
from llama_jax import config
from llama_jax.convert import folder, formats, hf
from llama_jax.model import position
from tests.convert import small
from tests.convert.small import MODEL

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WIDE = dataclasses.replace(MODEL, vocab_size=300)  # room for a byte-level tokenizer
ROPE = config.Rope(theta=5e5, factor=32.0)
LINEAR = config.Rope(factor=4.0, scaling="linear")


@pytest.mark.parametrize(
    ("said", "rope"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, config.Rope(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, ROPE),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, ROPE),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, config.Rope(theta=1e6)),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3}, ROPE),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": LLAMA3,
                "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
            },
            ROPE,
        ),
        ({}, config.Rope()),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, LINEAR),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": None}}, LINEAR),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": None}, config.Rope()),
        ({"rope_scaling": {**LLAMA3, "factor": 1.0}}, config.Rope()),
        ({"rope_scaling": {"type": None}}, config.Rope()),
    ],
    ids=["4 plain", "4 scaled", "5 scaled", "5 plain", "both, theta apart", "both", "neither"]
    + ["4 linear", "5 linear", "no stretching", "no stretching of 3.1", "no type"],
)
def test_both_spellings_of_rotary_settings(said, rope):
    settings = small.settings()
    del settings["rope_theta"]
    assert hf.rope_of({**settings, **said}, Path("config.json")) == rope


PUBLISHED = {
    "Llama-2-7b-hf": sizes.LLAMA2_7B,
    "Llama-2-70b-hf": sizes.LLAMA2_70B,
    "Meta-Llama-3-8B": sizes.LLAMA3_8B,
    "Llama-3.1-8B-Instruct": sizes.LLAMA31_8B,
    "Llama-3.2-1B-Instruct": sizes.LLAMA32_1B,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_json_gives_our_published_settings(name, shared):
    settings = json.loads(shared(f"configs/hf/{name}.config.json").read_text())
    model, context = hf.model_of(settings, Path("config.json"))
    assert config.to_dict(model) == config.to_dict(
        dataclasses.replace(PUBLISHED[name], remat="none")
    )
    assert context == settings["max_position_embeddings"]


@pytest.mark.parametrize(
    "rope", [config.Rope(theta=5e5), ROPE, dataclasses.replace(ROPE, factor=8.0), LINEAR]
)
def test_what_is_written_is_read_back(rope):
    model = dataclasses.replace(MODEL, rope=rope, output="tied", compute_dtype="bfloat16")
    settings = json.loads(json.dumps(hf.settings_of(model, 77, np.dtype(np.float16), {})))
    assert hf.model_of(settings, Path("config.json")) == (model, 77)
    for left in ("rope_parameters", "rope_scaling"):  # as each version of transformers sees it
        part = {name: value for name, value in settings.items() if name != left}
        assert hf.model_of(part, Path("config.json")) == (model, 77)


@pytest.mark.parametrize("rope", [config.Rope(theta=5e5), ROPE])
def test_transformers_reads_the_same_numbers(rope, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(MODEL, rope=rope)
    settings = hf.settings_of(model, 64, np.dtype(np.float16), {"bos_token_id": 7})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == rope.theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if rope.factor > 1 else "default")
    if rope.factor > 1:
        for name, value in LLAMA3.items():
            assert theirs.rope_parameters[name] == value
    assert (theirs.hidden_size, theirs.head_dim, theirs.rms_norm_eps) == (24, 4, 1e-5)
    assert (theirs.num_key_value_heads, theirs.tie_word_embeddings) == (2, False)
    assert (theirs.max_position_embeddings, theirs.bos_token_id) == (64, 7)
    assert str(theirs.dtype) == "torch.float16"


def test_linear_scaling_is_that_of_transformers(tmp_path):
    """As exported, at positions beyond the original ones; exactly."""
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    model = dataclasses.replace(MODEL, rope=LINEAR)
    settings = hf.settings_of(model, 64, np.dtype(np.float16), {})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    inverse, grow = rope_utils.ROPE_INIT_FUNCTIONS["linear"](theirs, "cpu")
    ours = position.frequencies(MODEL.head_dim, LINEAR, np.float32)
    assert grow == 1.0
    np.testing.assert_array_equal(ours, inverse.numpy())


@pytest.mark.parametrize(
    ("others", "context"),
    [
        ({}, 64),
        ({"max_sequence_length": 256}, 256),  # as vicuna-7b-v1.5-16k has it
        ({"max_position_embeddings": 256}, 256),
    ],
)
def test_positions_of_linear_scaling(tmp_path, others, context):
    scaling = {"type": "linear", "factor": 4.0}
    source = formats.open_checkpoint(small.hf(tmp_path, rope_scaling=scaling, **others), "", "")
    assert source.context == context
    wanted = "" if "max_sequence_length" in others else f"--context={4 * context}"
    assert [note.rsplit(" ", 1)[1] for note in source.notes[1:]] == ([wanted] if wanted else [])


def test_what_transformers_takes_for_absent_or_whole_is_taken_so(tmp_path):
    others = {
        "attention_bias": None, "mlp_bias": None, "rope_theta": None, "quantization_config": {},
        "rms_norm_eps": None, "tie_word_embeddings": None, "initializer_range": 0.0,
        "num_attention_heads": 6.0, "hidden_size": 24.0, "rope_scaling": {},
    }  # fmt: skip
    found = formats.open_checkpoint(small.hf(tmp_path, **others), "", "").model
    assert found == dataclasses.replace(MODEL, norm_eps=1e-6)
    assert type(found.heads) is int


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_a_folder_that_transformers_wrote_comes_in_and_leaves_the_same(tmp_path, output):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{k: v for k, v in small.settings().items() if k != "rope_theta"},
            rope_parameters={**LLAMA3, "rope_theta": 5e5},
            tie_word_embeddings=output == "tied",
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    source = formats.open_checkpoint(tmp_path / "theirs", "", "")
    assert source.model == dataclasses.replace(MODEL, rope=ROPE, output=output)
    small.convert(tmp_path / "theirs", tmp_path / "native", "native")
    small.convert(tmp_path / "native", tmp_path / "ours", "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back) is type(theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    prompt = torch.tensor([[1, 5, 9, 2]])
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs.generate(prompt, **options), back.generate(prompt, **options))


def test_torchs_bin_files_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    came = small.hf(tmp_path / "hf")
    (came / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in small.state().items()}
    torch.save(tensors, came / "pytorch_model.bin")
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), small.state())
    parts = list(tensors.items())
    where = {}
    for i, part in enumerate((parts[:7], parts[7:])):
        file = f"pytorch_model-{i}.bin"
        torch.save(dict(part), came / file)
        where |= {name: file for name, _ in part}
    (came / "pytorch_model.bin").unlink()
    (came / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), small.state())


def test_a_tokenizer_that_is_given_wins_over_those_that_came_with_the_weights(tmp_path):
    came = small.hf(tmp_path / "came", small.state(WIDE), vocab_size=300)
    for name in ("generation_config.json", *hf.TOKENIZER):
        (came / name).write_text('{"theirs": 1}')
    given = small.sentencepiece(300)
    (tmp_path / "given.model").write_bytes(given)
    (came / "tokenizer.model").write_bytes(small.sentencepiece(260))
    tokenizer = str(tmp_path / "given.model")
    for kind in ("hf", "native"):
        source = formats.open_checkpoint(came, "", tokenizer)
        folder.convert(source, tmp_path / kind, kind, None, lambda n: None, print)
        assert (tmp_path / kind / "tokenizer.model").read_bytes() == given
        inside = [file for file in (tmp_path / kind).rglob("*.j*") if "params" not in file.parts]
        theirs = {file.name for file in inside if "theirs" in file.read_text()}
        assert theirs == {"generation_config.json"}
    small.convert(came, tmp_path / "theirs", "native")
    source = formats.open_checkpoint(tmp_path / "theirs", "", tokenizer)
    assert source.carried.keys() == {"config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        (None, {"bos_token_id": 5, "eos_token_id": [9, 10], "pad_token_id": 4}),
        ({"eos_token_id": 3}, {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 4}),
    ],
    ids=["config.json alone", "both"],
)
@pytest.mark.parametrize("tokenizer", [False, True])
def test_special_ids_go_along(tmp_path, generation, ids, tokenizer):
    """generation_config.json first, then config.json, then the tokenizer, whose begin is 1."""
    said = {"bos_token_id": 5, "eos_token_id": [9, 10], "pad_token_id": 4}
    came = small.hf(tmp_path / "hf", small.state(WIDE), vocab_size=300, **said)
    if generation:
        (came / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        (came / "tokenizer.model").write_bytes(small.sentencepiece(300))
    small.convert(came, tmp_path / "native", "native")
    small.convert(tmp_path / "native", tmp_path / "back", "hf")
    for place in ("back", "direct"):
        if place == "direct":
            small.convert(came, tmp_path / place, "hf")
        found = json.loads((tmp_path / place / "config.json").read_text())
        assert {name: found[name] for name in ids} == ids
        found = json.loads((tmp_path / place / "generation_config.json").read_text())
        assert {name: found[name] for name in found if name in ids} == (generation or ids)


def test_the_tokenizer_gives_the_special_ids_that_nothing_else_does(tmp_path):
    came = small.hf(tmp_path / "hf", small.state(WIDE), vocab_size=300, eos_token_id=7)
    (came / "tokenizer.model").write_bytes(small.sentencepiece(300))
    small.convert(came, tmp_path / "back", "hf")
    settings = json.loads((tmp_path / "back/config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 7)


@pytest.mark.parametrize("kind", ["hf", "native", "meta"])
def test_a_copy_of_a_tied_matrix_is_left_out(tmp_path, kind):
    model = dataclasses.replace(MODEL, output="tied")
    tensors = small.state(model)
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    came = small.hf(tmp_path / "hf", both, tie_word_embeddings=True)
    small.assert_same(small.tensors(small.convert(came, tmp_path / "to", kind)), tensors)


OTHER = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}}


def test_a_tokenizer_json_that_names_no_end_goes_along_unread(tmp_path):
    pytest.importorskip("tokenizers")
    came = small.hf(tmp_path / "hf")
    content = json.dumps({**OTHER, "added_tokens": [], "pre_tokenizer": None})
    (came / "tokenizer.json").write_text(content)
    source = formats.open_checkpoint(came, "", "")
    assert source.tokenizer is None
    assert f"not read here: {came}: tokenizer.json names no end token" in source.notes[-1]
    for i, kind in enumerate(("native", "hf")):
        came = (tmp_path / "hf", tmp_path / "native")[i]
        small.convert(came, tmp_path / f"{kind}{'-back' * i}", kind)
    assert (tmp_path / "hf-back/tokenizer.json").read_text() == content
    with pytest.raises(ValueError, match=r"tokenizer\.json names no end token"):
        formats.open_checkpoint(tmp_path / "hf", "", str(tmp_path / "hf/tokenizer.json"))


def files_of(place, tensors, how: str) -> None:
    """The weights of a folder, replaced."""
    (place / "model.safetensors").unlink()
    if how == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(tensors, place / "model.safetensors")
        return
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    torch.save(state if how == "bin" else {how: state, "epoch": 3}, place / "pytorch_model.bin")


@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_a_tied_network_may_hold_the_output_matrix_alone(tmp_path, how):
    """safetensors' save_model keeps the first name of two; transformers reads it with equal logits."""
    came = small.hf(tmp_path / "hf", tie_word_embeddings=True)
    tensors = small.state(dataclasses.replace(MODEL, output="tied"))
    renamed = {name.replace("model.embed_tokens", "lm_head"): a for name, a in tensors.items()}
    files_of(came, renamed, how)
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), tensors)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),  # LlamaModel with a head of its own
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("self_attn.", "_orig_mod.self_attn."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(
            "mlp", "_checkpoint_wrapped_module.mlp"
        ),
    ],
    ids=["no prefix", "compiled", "parallel", "compiled by layer", "sharded"],
)
def test_names_of_wrapped_modules(tmp_path, rename):
    came = small.hf(tmp_path / "hf")
    files_of(came, {rename(name): array for name, array in small.state().items()}, "safetensors")
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), small.state())


def test_what_is_there_instead_is_named(tmp_path):
    came = small.hf(tmp_path / "hf", {f"net.{name}": a for name, a in small.state().items()})
    with pytest.raises(ValueError, match=r"lacks model.*; it holds net\.lm_head\.weight, net\."):
        formats.open_checkpoint(came, "", "")


def test_a_name_that_is_there_with_and_without_a_wrapper(tmp_path):
    came = small.hf(tmp_path / "hf")
    twice = {"_orig_mod.lm_head.weight": small.state()["lm_head.weight"]}
    files_of(came, small.state() | twice, "safetensors")
    with pytest.raises(ValueError, match=r"are both lm_head\.weight"):
        formats.open_checkpoint(came, "", "")


@pytest.mark.parametrize("how", ["state_dict", "module", "model"])
def test_weights_inside_of_a_trainings_checkpoint(tmp_path, how):
    came = small.hf(tmp_path / "hf")
    files_of(came, small.state(), how)
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), small.state())


@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_buffers_of_any_dtype_are_left_out(tmp_path, how):
    came = small.hf(tmp_path / "hf")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float64),
        "model.position_ids": np.arange(7),
        "model.causal_mask": np.ones((3, 3), bool),
    }
    files_of(came, small.state() | buffers, how)
    small.assert_same(small.tensors(formats.open_checkpoint(came, "", "")), small.state())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("lm_head.weight"),
            ("lacks lm_head.weight; config.json",),
        ),
        (lambda t: t.update({"score.weight": t["lm_head.weight"]}), ("score.weight is not",)),
    ],
    ids=["no output matrix", "a matrix more"],
)
def test_the_class_of_other_networks_is_named(tmp_path, change, words):
    """As of a reward model."""
    tensors = small.state()
    change(tensors)
    architectures = ["LlamaForSequenceClassification"]
    came = small.hf(tmp_path / "hf", tensors, architectures=architectures)
    with pytest.raises(ValueError, match="only LlamaForCausalLM is read") as error:
        formats.open_checkpoint(came, "", "")
    assert all(word in str(error.value) for word in (*words, architectures[0]))
