"""What is wrong with a Hugging Face checkpoint is said in one line that names file and tensor, and nothing is written."""

import json
import shutil
import struct
import time

import numpy as np
import pytest

from llama_jax.convert import safetensors
from tests.convert import small
from tests.convert.refusals import DEEP, GATE, NUMBER, WHOLE, nested, refused

# What Orbax was still reading when it met the damage dies later, each piece with a traceback.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# safetensors


OFFSETS = {
    "overlapping": lambda h: h[GATE].update(data_offsets=[n - 4 for n in h[GATE]["data_offsets"]]),
    "negative": lambda h: h[GATE].update(
        data_offsets=[-8, h[GATE]["data_offsets"][1] - h[GATE]["data_offsets"][0] - 8]
    ),
    "beyond the file": lambda h: h[GATE].update(
        data_offsets=[n + 10**9 for n in h[GATE]["data_offsets"]]
    ),
    "not whole": lambda h: h[GATE].update(data_offsets=[0.5, 7]),
    "not two": lambda h: h[GATE].update(data_offsets=[1, 2, 3]),
    "too short for the shape": lambda h: h[GATE].update(shape=[20, 25]),
    "of a dtype that is not a weight's": lambda h: h[GATE].update(dtype="I8"),
    "of a dtype that is a list": lambda h: h[GATE].update(dtype=[]),
    "of a dtype that is an object": lambda h: h[GATE].update(dtype={}),
    "without a shape": lambda h: h[GATE].pop("shape"),
    "of a nested shape": lambda h: h[GATE].update(shape=nested(900)),
    "of a shape beyond 64 bits": lambda h: h[GATE].update(shape=[0, 2**70], data_offsets=[0, 0]),
    "of a shape of 6,000 digits": lambda h: h[GATE].update(shape=[10**3000, 10**3000]),
    "of a shape of many axes": lambda h: h[GATE].update(shape=[2**62] * 1000),
    "beyond 64 bits": lambda h: h[GATE].update(data_offsets=[2**64, 2**64 + 1920]),
}


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_safetensors(tmp_path, to, change):
    came = small.hf(tmp_path / "hf")
    small.safetensors(came / "model.safetensors", small.state(), change)
    refused(came, to, str(came / "model.safetensors"), GATE)


def test_a_name_that_is_twice_in_a_header(tmp_path, to):
    came = small.hf(tmp_path / "hf")
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    raw = f"{{{entry}, {entry}}}".encode()
    data = struct.pack("<Q", len(raw)) + raw + bytes(4)
    (came / "model.safetensors").write_bytes(data)
    refused(came, to, "model.safetensors", "'a' is there twice")


def test_a_name_that_is_twice_among_many(tmp_path):
    """Counting each name in the list of all took a second for ten thousand."""
    raw = ("{" + "".join(f'"{i}":0,' for i in range(100_000)) + '"x":0,"x":0}').encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    start = time.process_time()
    with pytest.raises(ValueError, match="'x' is there twice"):
        safetensors.read_header(tmp_path / "x.safetensors")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("cut", [4, 100, -1], ids=["in the length", "in the header", "in the data"])
def test_truncated_safetensors(tmp_path, to, cut):
    came = small.hf(tmp_path / "hf")
    file = came / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(came, to, str(file), "cut off")


def test_bytes_behind_the_last_tensor(tmp_path, to):
    came = small.hf(tmp_path / "hf")
    with open(came / "model.safetensors", "ab") as file:
        file.write(b"more")
    refused(came, to, "model.safetensors", "lm_head.weight")


# Hugging Face's index and settings


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "..", "a/b", 3, [], {}, None]
)
def test_an_index_that_points_outside_its_folder(tmp_path, to, name):
    came = small.hf_shards(tmp_path / "hf")
    index = came / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"][GATE] = name
    index.write_text(json.dumps(where))
    refused(came, to, str(index), repr(name))


def test_a_missing_shard(tmp_path, to):
    came = small.hf_shards(tmp_path / "hf")
    (came / "model-00002-of-00002.safetensors").unlink()
    refused(came, to, "model-00002-of-00002.safetensors is missing", "model.layers.0")


def test_a_shard_that_is_a_copy_of_another(tmp_path, to):
    came = small.hf_shards(tmp_path / "hf")
    shutil.copy(
        came / "model-00001-of-00002.safetensors", came / "model-00002-of-00002.safetensors"
    )
    refused(came, to, "model.embed_tokens.weight is in", "model-00002-of-00002.safetensors")


def test_an_index_that_names_a_tensor_that_is_not_there(tmp_path, to):
    came = small.hf_shards(tmp_path / "hf")
    index = came / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(where))
    refused(came, to, "model-00001-of-00002.safetensors lacks model.layers.7.mlp.up_proj.weight")


def test_a_missing_tensor(tmp_path, to):
    tensors = small.state()
    del tensors[GATE]
    refused(small.hf(tmp_path / "hf", tensors), to, "lacks", GATE)


def test_a_tensor_that_no_llama_has(tmp_path, to):
    tensors = {**small.state(), "model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    refused(small.hf(tmp_path / "hf", tensors), to, "q_proj.bias", "model.safetensors")


def test_a_wrong_shape(tmp_path, to):
    tensors = small.state()
    tensors[GATE] = tensors[GATE].T.copy()
    refused(small.hf(tmp_path / "hf", tensors), to, "model.safetensors", GATE, "[24, 20]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tensor_that_is_not_finite(tmp_path, to, value, dtype):
    tensors = small.state(dtype=dtype)
    tensors[GATE][3, 5] = value
    refused(
        small.hf(tmp_path / "hf", tensors), to, "model.safetensors", GATE, "1 values that are NaN"
    )


def test_values_that_a_narrower_dtype_cannot_hold(tmp_path, to):
    tensors = small.state()
    tensors[GATE][0, 0] = 1e6
    came = small.hf(tmp_path / "hf", tensors)
    refused(came, to, GATE, "float16 cannot hold", dtype=np.dtype(np.float16))


@pytest.mark.parametrize("place", [(0, 0), (47, 23)])
def test_an_output_matrix_that_a_tied_model_would_lose(tmp_path, to, monkeypatch, place):
    monkeypatch.setattr("llama_jax.convert.stored._COMPARED", 7 * 24 * 4)
    tensors = small.state()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][place] += 1
    came = small.hf(tmp_path / "hf", tensors, tie_word_embeddings=True)
    refused(came, to, f"{came / 'model.safetensors'}: lm_head.weight differs", "set tie_word")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:40]
    came = small.hf(tmp_path / "short", tensors, tie_word_embeddings=True)
    refused(came, to, f"{came / 'model.safetensors'}: lm_head.weight differs", "set tie_word")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] = np.array(1.0, np.float32)
    came = small.hf(tmp_path / "numbers", tensors, tie_word_embeddings=True)
    refused(came, to, "model.embed_tokens.weight has shape []")


SETTINGS = {
    "another kind of model": {"model_type": "mistral"},
    "another activation": {"hidden_act": "gelu"},
    "quantised": {"quantization_config": {"bits": 4}},
    "scaling by the length of a text": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "a part of a head turned": {"partial_rotary_factor": 0.5},
    "a part of a head turned, said elsewhere": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "another rope scaling": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "a rope scaling without a factor": {"rope_scaling": {"type": "linear"}},
    "rope said twice, differently": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
    },
    "a number as a word": {"hidden_size": "24"},
    "no heads": {"num_attention_heads": None},
    "kv heads that do not divide": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("others", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_not_computed_here(tmp_path, to, others):
    came = small.hf(tmp_path / "hf", **others)
    name = next(iter(others))
    word = {
        "rope_scaling": "factor" if "linear" in str(others) else "rope scaling",
        "num_key_value_heads": "model.kv_heads=4",
    }.get(name, name)
    if "partial_rotary_factor" in str(others):
        word = "partial_rotary_factor=0.5 is not LLaMA's"
    refused(came, to, word)


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_biases_are_refused_before_the_weights_are_opened(tmp_path, to, name):
    came = small.hf(tmp_path / "hf", **{name: True})
    (came / "model.safetensors").write_bytes(b"not read")
    refused(came, to, f"config.json: {name}=True must be false: no LLaMA has biases")


def test_biases_that_the_settings_do_not_tell_are_not_lost(tmp_path, to):
    """As Qwen's, whose architecture has them without a setting."""
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    came = small.hf(tmp_path / "hf", small.state() | bias)
    refused(came, to, "model.layers.0.self_attn.q_proj.bias is not a tensor of a text LLaMA")


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3 |= {"original_max_position_embeddings": 8192}
VALUES = [
    *(("rope_theta", value, NUMBER) for value in ("abc", [1], {}, True, np.inf, np.nan, 0)),
    *(
        ("rms_norm_eps", value, NUMBER) for value in ("x", np.inf, 10**400)
    ),  # no float is that large
    *(("hidden_size", value, WHOLE) for value in ("24", 24.5, True, -24, 10**30, [[]])),
    *(("tie_word_embeddings", value, "must be true or false") for value in ("yes", 1, [])),
    ("initializer_range", -1.0, NUMBER),
    ("max_position_embeddings", 10**30, WHOLE),
]


@pytest.mark.parametrize(("name", "value", "rule"), VALUES, ids=lambda value: str(value)[:20])
def test_a_setting_of_another_type(tmp_path, to, name, value, rule):
    came = small.hf(tmp_path / "hf", **{name: value})
    refused(came, to, f"{came / 'config.json'}: {name}={repr(value)[:30]}", rule)


SCALINGS = [
    ("factor", None, NUMBER),
    ("factor", np.inf, NUMBER),
    ("low_freq_factor", "1", NUMBER),
    ("original_max_position_embeddings", [1], WHOLE),
    ("original_max_position_embeddings", 8192.5, WHOLE),
]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("name", "value", "rule"), SCALINGS)
def test_a_rope_scaling_of_another_type(tmp_path, to, spelling, name, value, rule):
    came = small.hf(tmp_path / "hf", **{spelling: {**LLAMA3, name: value}})
    refused(came, to, f"{came / 'config.json'}: {name}={value!r}", rule)


def test_a_rope_scaling_that_lacks_a_number(tmp_path, to):
    scaling = {name: value for name, value in LLAMA3.items() if name != "factor"}
    came = small.hf(tmp_path / "hf", rope_scaling=scaling)
    refused(came, to, f"{came / 'config.json'} lacks factor")


BROKEN = {  # rules of the schema, whose messages name our fields
    "model.kv_heads=4 must divide": {"num_key_value_heads": 4},
    "model.head_dim=5 must be even": {"head_dim": 5},
    "model.rope.high_freq_factor=4.0 must exceed": {
        "rope_scaling": {**LLAMA3, "low_freq_factor": 4}
    },
    "model.kv_heads=7 must divide": {  # a search through all numbers takes a minute
        "num_attention_heads": 2**31 - 2**20,
        "num_key_value_heads": 7,
        "head_dim": 4,
    },
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_of_ours_that_a_config_breaks_names_the_file(tmp_path, to, rule):
    came = small.hf(tmp_path / "hf", **BROKEN[rule])
    refused(came, to, f"{came / 'config.json'}: {rule}")


@pytest.mark.parametrize("name", ["model_type", "hidden_act", "rope_theta", "rope_scaling"])
def test_a_nested_value_is_shown_in_short(tmp_path, to, name):
    message = refused(small.hf(tmp_path / "hf", **{name: nested(500)}), to, "[[[...]]]")
    assert len(message) < 400


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", DEEP])
def test_a_config_that_is_missing_or_damaged(tmp_path, to, content):
    came = small.hf(tmp_path / "hf")
    (came / "config.json").unlink()
    if content is not None:
        (came / "config.json").write_text(content)
    refused(came, to, str(came / "config.json"))
