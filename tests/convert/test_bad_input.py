"""What is wrong with a checkpoint is said in one line that names file and tensor, and nothing is written."""

import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import synthetic
from llama_jax import config, sharding
from llama_jax.convert import folder, formats, meta_params, names, native, pth, safetensors, stage
from llama_jax.model import transformer
from tests.convert import small
from tests.convert.small import MODEL

# What Orbax was still reading when it met the damage dies later, each piece with a traceback.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

GATE = "model.layers.1.mlp.gate_proj.weight"
WQ = "layers.1.attention.wq.weight"


@pytest.fixture
def to(tmp_path):
    return tmp_path / "to"


def refused(came: Path, to: Path, *words: str, kind: str = "native", dtype=None) -> str:
    """The message of the refusal, which must have all the words; nothing may be written."""
    with pytest.raises(ValueError, match=r".") as error:
        small.convert(came, to, kind, dtype)
    small.assert_nothing_written(to)
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    return message


def nested(depth: int) -> list:
    """A list that json reads, but whose repr fails or fills pages."""
    return json.loads("[" * depth + "]" * depth)


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
    "biases": {"attention_bias": True},
    "biases of the feed-forward": {"mlp_bias": True},
    "quantised": {"quantization_config": {"bits": 4}},
    "a part of a head turned": {"partial_rotary_factor": 0.5},
    "a part of a head turned, said elsewhere": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "another rope scaling": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "an older rope scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
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
    word = {"rope_scaling": "rope scaling", "num_key_value_heads": "model.kv_heads=4"}.get(
        name, name
    )
    if "partial_rotary_factor" in str(others):
        word = "partial_rotary_factor=0.5 is not LLaMA's"
    refused(came, to, word)


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3 |= {"original_max_position_embeddings": 8192}
NUMBER, WHOLE = "must be a positive number up to 1e+15", "must be a positive whole number up to"
VALUES = [
    *(("rope_theta", value, NUMBER) for value in (None, "abc", [1], {}, True, np.inf, np.nan, 0)),
    *(
        ("rms_norm_eps", value, NUMBER) for value in ("x", np.inf, 10**400)
    ),  # no float is that large
    *(("hidden_size", value, WHOLE) for value in ("24", 24.0, True, -24, 10**30, [[]])),
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


DEEP = '{"a":' * 100_000  # json's scanner calls itself


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


# Meta's files


@pytest.fixture
def meta(tmp_path):
    synthetic.write(tmp_path / "meta", MODEL, 2, np.dtype(np.float32))
    return tmp_path / "meta"


def hostile(what) -> bytes:
    class Evil:
        def __reduce__(self):
            return what

    return pickle.dumps({"tok_embeddings.weight": Evil()}, protocol=2)


def rezip(file: Path, content: bytes, member: str = "data.pkl", **options) -> None:
    """The file again, its pickle (or another member) replaced."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith(member) else old)


@pytest.mark.parametrize(
    ("what", "asked"),
    [
        ((os.system, ("touch {}/ran",)), "posix.system"),
        ((eval, ("open('{}/ran', 'w')",)), "builtins.eval"),
        ((getattr, (dict, "clear")), "builtins.getattr"),
    ],
    ids=["system", "eval", "getattr"],
)
def test_a_hostile_pickle_is_refused_and_not_run(meta, tmp_path, to, what, asked):
    function, arguments = what
    arguments = tuple(a.format(tmp_path) if isinstance(a, str) else a for a in arguments)
    file = meta / "consolidated.00.pth"
    rezip(file, hostile((function, arguments)))
    module, _, name = asked.partition(".")
    message = refused(meta, to, str(file), name, "refused")
    assert module in message.replace("__builtin__", "builtins")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02K\x01.",
        b"garbage",
        pickle.dumps([1, 2]),
        b"\x80\x02X\xff\xff\xff\x7f",
    ],
)
def test_a_damaged_pickle(meta, to, content):
    rezip(meta / "consolidated.01.pth", content)
    refused(meta, to, str(meta / "consolidated.01.pth"))


def test_a_pickle_that_hides_a_function_behind_a_storage(meta, to):
    """A persistent id is data: what it names is not called."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", "torch.FloatStorage", "0", "cpu", 4) if value == "x" else None

    raw = io.BytesIO()
    Writer(raw, protocol=2).dump({"a": "x"})
    rezip(meta / "consolidated.00.pth", raw.getvalue())
    refused(meta, to, "consolidated.00.pth", "not a storage")


PROTO, STORAGE, ORDERED = b"\x80\x02", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(
    shape=b"K\x02K\x02", strides=b"K\x02K\x01", start=b"K\x00", key=None, name=None
) -> bytes:
    """{name: a tensor} as torch pickles it; each part is given by its instructions."""
    key, name = key or text("0"), name or text("tok_embeddings.weight")
    storage = b"(" + text("storage") + STORAGE + key + text("cpu") + b"K\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start
    tensor += b"(" + shape + b"t(" + strides + b"t\x89" + ORDERED + b"tR"
    return PROTO + ORDERED + name + tensor + b"s."


def laughs(levels: int) -> bytes:
    """((1, 1), (1, 1)) and so on: each level takes five bytes and doubles what is printed or hashed."""
    return b"K\x01" + b"q\x01h\x01\x86" * levels


def attribute(name: str) -> bytes:
    """The state of BUILD that sets an attribute."""
    return b"N}" + text(name) + STORAGE + b"s\x86b"


PICKLES = {
    "strides of another length": (pickled(strides=b"K\x01"), "tok_embeddings.weight must have"),
    "a negative start": (pickled(start=b"J\xff\xff\xff\xff"), "tok_embeddings.weight must have"),
    "a shape beyond 63 bits": (
        pickled(shape=b"\x8a\x09" + b"\x7f" * 9 + b"K\x01"),
        "tok_embeddings.weight must have",
    ),
    "a shape of 9,600 digits": (
        pickled(shape=b"\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000 + b"K\x01"),
        "instruction b'\\x8b'",
    ),
    "a shape of words": (pickled(shape=text("a") + text("b")), "tok_embeddings.weight must have"),
    "a shape that doubles": (pickled(shape=laughs(20)), "tok_embeddings.weight must have"),
    "a storage that doubles": (pickled(key=laughs(20)), "refers to a tuple that is not a storage"),
    "a reference that doubles": (PROTO + laughs(20) + b"Q.", "refers to a tuple"),
    "a name that doubles": (pickled(name=laughs(20)), "under a tuple"),
    "a reference of a list": (PROTO + b"]Q.", "refers to a list"),
    "an object": (PROTO + STORAGE + b")\x81.", "instruction b'\\x81'"),
    "a name behind a dot": (b"\x80\x04" + text("os") + text("x.y") + b"\x93.", "b'\\x93'"),
    "a hidden get": (PROTO + ORDERED + attribute("get") + b".", "holds no tensors"),
    "a hidden items": (PROTO + ORDERED + attribute("items") + b".", "holds no tensors"),
    "code of ours": (
        PROTO + b"ctorch._utils\n_rebuild_tensor_v2\n" + attribute("__kwdefaults__") + b".",
        "holds a function",
    ),
    "five megabytes": (PROTO + b"}" * (5 << 20) + b".", "over 4,194,304"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_torch_does_not_write(meta, to, case):
    content, word = PICKLES[case]
    rezip(meta / "consolidated.00.pth", content)
    message = refused(meta, to, f"{meta / 'consolidated.00.pth'}", word)
    assert len(message) < 400


def test_the_pickle_of_these_tests_is_read(meta):
    rezip(meta / "consolidated.00.pth", pickled())
    found = pth.read_names(meta / "consolidated.00.pth")
    assert found["tok_embeddings.weight"].shape == (2, 2)


def test_a_memo_of_a_few_bytes_takes_no_gigabytes(meta, to):
    """Its largest index is 2^24; the unpickler in C reserves 16 bytes for each up to it."""
    rezip(meta / "consolidated.00.pth", PROTO + b"}r" + struct.pack("<I", 2**24) + b".")
    tracemalloc.start()
    try:
        refused(meta, to, "consolidated.00.pth holds no tensors")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0"])
def test_a_compressed_member(meta, to, member):
    """Six kilobytes of it can be six megabytes of names."""
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            how = zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED
            archive.writestr(name, content, how)
    refused(meta, to, str(file), f"{member} is compressed")


def offset(value: int):
    """A place in the field of large files (PKWARE's appnote 4.5.3) of the last member."""

    def change(raw: bytearray, at: int) -> None:
        length = struct.unpack_from("<H", raw, at + 28)[0]
        extra = struct.pack("<HHQ", 1, 8, value)
        raw[at + 42 : at + 46] = b"\xff" * 4
        raw[at + 30 : at + 32] = struct.pack("<H", len(extra))
        raw[at + 46 + length : at + 46 + length] = extra
        end = raw.rindex(b"PK\x05\x06")
        size = struct.unpack_from("<I", raw, end + 12)[0]
        struct.pack_into("<I", raw, end + 12, size + len(extra))

    return change


def not_utf8(raw: bytearray, at: int) -> None:
    raw[at + 8 : at + 10], raw[at + 46] = b"\x00\x08", 0xFF


def place(at: int, content: bytes):
    return lambda raw, entry: raw.__setitem__(slice(entry + at, entry + at + len(content)), content)


ENTRIES = {
    "a version that is needed": place(6, b"\xff\x00"),
    "encrypted": place(8, b"\x01\x00"),
    "a compression of another kind": place(10, b"\x63\x00"),
    "a size of another kind": place(20, b"\xff\xff\xff\x7f"),
    "a place behind the end": place(42, b"\xf0\xff\xff\x7f"),
    "a name that is not UTF-8": not_utf8,
    "a place beyond 63 bits": offset(2**63 - 10),
    "a place beyond 64 bits": offset(2**64 - 1),
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0"])
def test_an_entry_of_the_zip_that_torch_does_not_write(meta, to, member, change):
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    raw = bytearray(file.read_bytes())
    change(raw, raw.index(member.encode(), raw.index(b"PK\x01\x02")) - 46)
    file.write_bytes(raw)
    refused(meta, to, str(file))


@pytest.mark.parametrize("order", [b"big", b"", b"little "])
def test_bytes_of_another_order(meta, to, order):
    file = meta / "consolidated.01.pth"
    rezip(file, b"little", member="byteorder")
    assert formats.open_checkpoint(meta, "", "").model == MODEL
    rezip(file, order, member="byteorder")
    refused(meta, to, str(file), f"byteorder is {order!r}")


@pytest.mark.parametrize("keep", [10, 2000, -30])
def test_a_truncated_pth(meta, to, keep):
    file = meta / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:keep])
    refused(meta, to, str(file))


def test_a_pth_whose_index_promises_more_than_its_data(meta, to):
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:-4] if name == "archive/data/0" else content)
    refused(meta, to, str(file), "tok_embeddings.weight", "needs")


def test_a_storage_that_is_not_there(meta, to):
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            if name != "archive/data/0":
                archive.writestr(name, content)
    refused(meta, to, str(file), "tok_embeddings.weight", "missing")


def test_a_missing_part_in_the_middle(tmp_path, to):
    model = dataclasses.replace(MODEL, heads=8, kv_heads=4)
    synthetic.write(tmp_path / "meta", model, 4, np.dtype(np.float32))
    (tmp_path / "meta/consolidated.02.pth").unlink()
    refused(tmp_path / "meta", to, "consolidated.02.pth is missing")


def test_a_missing_last_part(meta, to):
    (meta / "consolidated.01.pth").unlink()
    refused(meta, to, "consolidated.00.pth", "1 of 2 files are missing")


def test_a_part_that_is_a_copy_of_another(meta, to):
    shutil.copy(meta / "consolidated.00.pth", meta / "consolidated.01.pth")
    refused(meta, to, "consolidated.01.pth", "copy", "consolidated.00.pth")


def test_a_part_under_a_strange_name(meta, to):
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.01 (1).pth")
    refused(meta, to, "consolidated.01 (1).pth")


def test_a_part_of_another_model(meta, tmp_path, to):
    """Repeated norms must be the same in every part."""
    synthetic.write(tmp_path / "other", MODEL, 2, np.dtype(np.float32), seed=1)
    shutil.copy(tmp_path / "other/consolidated.01.pth", meta / "consolidated.01.pth")
    refused(meta, to, "consolidated.01.pth", "attention_norm.weight differs")


@pytest.mark.parametrize("with_it", [0, 1])
def test_an_output_matrix_in_some_parts_only(meta, tmp_path, to, with_it):
    tied = dataclasses.replace(MODEL, output="tied")
    synthetic.write(tmp_path / "tied", tied, 2, np.dtype(np.float32))
    part = f"consolidated.0{1 - with_it}.pth"
    shutil.copy(tmp_path / "tied" / part, meta / part)
    refused(meta, to, f"consolidated.0{with_it}.pth has an output.weight", f"{part} has none")


def test_a_part_with_other_shapes(meta, tmp_path, to):
    model = dataclasses.replace(MODEL, kv_heads=6)
    synthetic.write(tmp_path / "other", model, 2, np.dtype(np.float32))
    shutil.copy(tmp_path / "other/consolidated.01.pth", meta / "consolidated.01.pth")
    refused(meta, to, "consolidated.01.pth", "layers.0.attention.wk.weight")


@pytest.mark.parametrize("layers", [10**9, len(small.state()) + 1])
def test_more_layers_than_tensors(tmp_path, meta, to, layers):
    """Before anything is made for each of them."""
    came = small.hf(tmp_path / "hf", num_hidden_layers=layers)
    words = (str(came / "config.json"), f"num_hidden_layers={layers}", "21 tensors")
    refused(came, to, *words)
    small.convert(small.hf(tmp_path / "other"), tmp_path / "native", "native")
    said = json.loads((tmp_path / "native/model.json").read_text())
    said["model"]["layers"] = layers
    (tmp_path / "native/model.json").write_text(json.dumps(said))
    refused(tmp_path / "native", to, "hold [2] layer groups", f"say {layers}")
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, "n_layers": layers}))
    refused(meta, to, str(meta / "params.json"), f"n_layers={layers}", "21 tensors")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_heads": 5}, "n_heads=5"),
        ({"dim": "24"}, "dim='24'"),
        ({"dim": 48}, "tok_embeddings.weight"),
        ({"vocab_size": 50}, "tok_embeddings.weight"),
        ({"multiple_of": 64}, "feed_forward.w1.weight"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight"),
        ({"n_layers": 1}, "layers.1.attention"),
        ({"n_kv_heads": 3}, "attention.wk.weight"),
    ],
    ids=str,
)
def test_params_that_do_not_fit_the_tensors(meta, to, change, word):
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, **change}))
    refused(meta, to, word)


PARAMS = [
    *(("norm_eps", value, NUMBER) for value in (None, "x", np.inf)),
    *(("n_kv_heads", value, WHOLE) for value in ("2", 2.0, -2, True)),
    *(("head_dim", value, WHOLE) for value in ("4", 4.0)),
    *(("multiple_of", value, WHOLE) for value in (0, "256", None)),
    *(("vocab_size", value, WHOLE) for value in ("48", -2, 48.0, -1.0, False)),
    *(("rope_theta", value, NUMBER) for value in (None, "a", 0, True)),
    *(("use_scaled_rope", value, "must be true or false") for value in ("no", 0)),
    ("ffn_dim_multiplier", "x", NUMBER),
    ("ffn_dim_multiplier", 1e300, NUMBER),
    ("rope_scaling_factor", [], NUMBER),
    ("rope_high_freq_factor", "4", NUMBER),
    ("model", 5, "must be an object"),
]


@pytest.mark.parametrize(("name", "value", "rule"), PARAMS)
def test_a_parameter_of_another_type(meta, to, name, value, rule):
    file = meta / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    refused(meta, to, f"{file}: {name}={value!r} {rule}")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"n_kv_heads": 4}, "model.kv_heads=4 must divide"),
        ({"use_scaled_rope": True, "rope_high_freq_factor": 1}, "model.rope.high_freq_factor=1.0"),
    ],
)
def test_a_rule_of_ours_that_params_break_names_the_file(meta, to, change, rule):
    file = meta / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(meta, to, f"{file}: {rule}")


@pytest.mark.parametrize("name", ["n_kv_heads", "ffn_dim_multiplier", "rope_scaling_factor"])
def test_a_parameter_that_is_null_is_absent(meta, name):
    file = meta / "params.json"
    params = {k: v for k, v in json.loads(file.read_text()).items() if k != "n_kv_heads"}
    file.write_text(json.dumps({**params, "ffn_dim_multiplier": 1.0, name: None}))
    meta_params.read(file)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", DEEP])
def test_params_that_are_missing_or_damaged(meta, to, content):
    (meta / "params.json").unlink()
    if content is not None:
        (meta / "params.json").write_text(content)
    refused(meta, to, str(meta / "params.json"))


def test_a_vocabulary_that_is_not_the_tokenizers(meta, to, shared):
    shutil.copy(shared("tokenizers/llama2/tokenizer.model"), meta / "tokenizer.model")
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    refused(meta, to, "tok_embeddings.weight", "48", "the tokenizer has 32000")


@pytest.mark.parametrize("kind", ["hf", "meta", "native"])
def test_a_tokenizer_with_more_ids_than_the_vocabulary(tmp_path, kind):
    came = small.hf(tmp_path / "hf")
    small.convert(came, tmp_path / kind / "of", kind)
    few, many = tmp_path / "few.model", tmp_path / "many.model"
    few.write_bytes(small.sentencepiece(40))
    many.write_bytes(small.sentencepiece(49))
    assert formats.open_checkpoint(tmp_path / kind / "of", "", str(few)).model == MODEL
    with pytest.raises(ValueError, match=r"has 49 ids, more than model\.vocab_size=48"):
        formats.open_checkpoint(tmp_path / kind / "of", "", str(many))
    shutil.copy(many, tmp_path / kind / "of/tokenizer.model")
    with pytest.raises(ValueError, match=r"has 49 ids, more than model\.vocab_size=48"):
        formats.open_checkpoint(tmp_path / kind / "of", "", "")


# Our own folders


@pytest.fixture
def ours(tmp_path):
    small.convert(small.hf(tmp_path / "hf"), tmp_path / "ours", "native")
    return tmp_path / "ours"


SAID = [
    *(("context", value, WHOLE) for value in ("abc", None, 0, 64.0)),
    *(("model", value, "model=") for value in ([], None, 5, nested(500))),
    *(("tokenizer", value, "tokenizer=") for value in (5, "BPE")),
]


@pytest.mark.parametrize(("name", "value", "rule"), SAID, ids=lambda value: str(value)[:20])
def test_a_model_json_that_says_something_else(ours, to, name, value, rule):
    said = json.loads((ours / "model.json").read_text())
    (ours / "model.json").write_text(json.dumps({**said, name: value}))
    message = refused(ours, to, str(ours), "its settings cannot be read", rule)
    assert len(message) < 2000


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 5}', DEEP])
@pytest.mark.parametrize("name", ["model.json", "run.json"])
def test_settings_of_ours_that_are_damaged(ours, to, name, content):
    (ours / "model.json").unlink()
    (ours / name).write_text(content)
    refused(ours, to, f"{ours}: its settings cannot be read")


@pytest.mark.parametrize(
    "cut", [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"[]"]
)
@pytest.mark.parametrize("name", ["_METADATA", "output/zarr.json"])
def test_arrays_whose_description_is_damaged(ours, to, name, cut):
    file = ours / "params" / name
    file.write_bytes(cut(file.read_bytes()))
    refused(ours, to, f"{ours / 'params'} is not a readable checkpoint")


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(b"half")])
def test_a_piece_of_an_array_that_is_missing_or_cut(ours, to, change, capfd):
    """Orbax's restore raises an Exception of forty lines, and prints two hundred later."""
    chunk = ours / "params/output/c/0/0"
    change(chunk)
    module = transformer.build(MODEL, sharding.make(config.Mesh(), jax.devices()[:1]))
    with pytest.raises(ValueError, match=rf"^{ours} is damaged \(.*{chunk}") as error:
        native.load(ours, module)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=str(chunk)):
        small.convert(ours, to, "hf")
    assert "Traceback" not in capfd.readouterr().err


# Where it comes from and where it goes


def test_a_file_that_is_not_the_one_its_folder_is_read_from(tmp_path, to, meta):
    came = small.hf(tmp_path / "hf")
    small.safetensors(came / "ema.safetensors", small.state(seed=1))
    shutil.copy(meta / "consolidated.00.pth", meta / "finetuned.pth")
    shutil.copy(meta / "consolidated.00.pth", came / "pytorch_model.bin")
    shards = small.hf_shards(tmp_path / "shards")
    (shards / "pytorch_model.bin.index.json").write_text("{}")
    words = "is not part of the checkpoint in"
    refused(came / "ema.safetensors", to, "ema.safetensors", words, "config.json, model.safe")
    refused(came / "pytorch_model.bin", to, "pytorch_model.bin", words, "model.safetensors")
    refused(shards / "pytorch_model.bin.index.json", to, words, "model.safetensors.index.json")
    refused(meta / "finetuned.pth", to, "finetuned.pth", words, "consolidated.01.pth")


def test_every_file_of_a_checkpoint_may_be_named(tmp_path, meta):
    small.convert(meta, tmp_path / "native", "native")
    named = {
        "hf": (small.hf_shards(tmp_path / "hf"), "config.json", "model-00002-of-00002.safetensors"),
        "meta": (meta, "params.json", "consolidated.01.pth"),
        "native": (tmp_path / "native", "model.json"),
    }
    named["hf"] += ("model.safetensors.index.json",)
    for kind, (place, *files) in named.items():
        for file in files:
            assert formats.open_checkpoint(place / file, kind, "").format == kind


def test_a_place_that_does_not_exist(tmp_path, to):
    refused(tmp_path / "none", to, str(tmp_path / "none"), "does not exist")


def test_a_folder_without_weights(tmp_path, to):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").touch()
    refused(tmp_path / "empty", to, "no checkpoint that is known", "readme.txt")


def test_a_destination_that_is_there_is_left_alone(tmp_path):
    came = small.hf(tmp_path / "hf")
    (tmp_path / "to").mkdir()
    (tmp_path / "to/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        small.convert(came, tmp_path / "to", "native")
    assert (tmp_path / "to/mine.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["mine.txt"]


def kept(place: Path, came: Path, to: Path, words: str) -> None:
    """The conversion is refused, and the files of `place` stay as they are."""
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=words):
        small.convert(came, to, "hf")
    assert before == {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert before


@pytest.mark.parametrize("name", ["thesis.tex", "journal.jsonl", "sub/thesis.tex"])
def test_a_folder_of_the_stages_name_that_is_not_ours_is_left_alone(tmp_path, to, name):
    file = tmp_path / "to.unfinished" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}\n')
    kept(tmp_path, small.hf(tmp_path / "hf"), to, r"to\.unfinished is not an unfinished conversion")


def test_a_source_where_the_stage_would_be_is_left_alone(tmp_path, to):
    came = small.hf(tmp_path / "to.unfinished")
    (tmp_path / "link").symlink_to(came)
    kept(tmp_path, came, to, r"config\.json lies in .*to\.unfinished")
    kept(tmp_path, tmp_path / "link", to, r"config\.json lies in .*to\.unfinished")


def test_a_destination_that_is_no_folder(tmp_path):
    came = small.hf(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for to in (tmp_path / "link", tmp_path / "dangling", Path("/dev/null"), came / "config.json"):
        refused_at(came, to, f"{to} is a link or a file")
    with pytest.raises(ValueError, match="--to=/ is there already"):
        small.convert(came, Path("/"), "native")


def refused_at(came: Path, to: Path, words: str, kind: str = "native") -> None:
    """Refused, and no folder is left beside."""
    with pytest.raises(ValueError, match=words):
        small.convert(came, to, kind)
    assert not to.with_name(to.name + ".unfinished").exists()


def test_a_second_conversion_to_the_same_place_is_refused_while_one_writes(tmp_path, to):
    small.hf(tmp_path / "one")
    small.hf(tmp_path / "two", small.state(seed=1))

    def meanwhile(count):
        with pytest.raises(ValueError, match=r"another conversion is writing .*to\.unfinished"):
            small.convert(tmp_path / "two", to, "hf")

    found = small.convert(tmp_path / "one", to, "hf", progress=meanwhile)
    small.assert_same(small.tensors(found), small.state())
    assert {file.name for file in to.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json"),
    }


def test_a_folder_that_is_renamed_before_it_is_locked_is_not_written(tmp_path, to, monkeypatch):
    """Between opening and locking, the other conversion may have come to its end."""
    came = small.hf(tmp_path / "hf")
    monkeypatch.setattr(stage, "_lock", lambda _: bool(to.with_name("to.unfinished").rename(to)))
    with pytest.raises(ValueError, match="another conversion is writing"):
        small.convert(came, to, "hf")
    assert not any(to.iterdir())


def test_a_tokenizer_that_hugging_face_cannot_express_is_refused_first(tmp_path, to):
    came = small.hf(tmp_path / "hf")
    file = tmp_path / "unigram.model"
    file.write_bytes(small.sentencepiece(kind="UNIGRAM"))
    source = formats.open_checkpoint(came, "", str(file))
    with pytest.raises(ValueError, match="needs model_type BPE"):
        folder.convert(source, to, "hf", None, pytest.fail, print)
    small.assert_nothing_written(to)


@pytest.mark.parametrize("content", ["{", "[1]", "5", '{"a":' * 100_000], ids=lambda c: c[:4])
def test_a_damaged_generation_config(tmp_path, to, content):
    came = small.hf(tmp_path / "hf")
    (came / "generation_config.json").write_text(content)
    refused(came, to, f"generation_config.json of {came}", "JSON object", kind="hf")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    came = small.hf(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.0 GiB more"):
        small.convert(came, tmp_path / "to", "native")
    small.assert_nothing_written(tmp_path / "to")


@pytest.mark.parametrize("kind", ["native", "hf", "meta"])
def test_a_write_that_fails_keeps_what_is_there(tmp_path, kind):
    """As a disk does that fills up in the middle: an error that names the place, and it can go on."""
    came = small.hf(tmp_path / "hf")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
    try:
        with pytest.raises(OSError, match=r"to\.unfinished.*too large.*goes on"):
            small.convert(came, tmp_path / "to", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "to").exists()
    small.assert_same(small.tensors(small.convert(came, tmp_path / "to", kind)), small.state())


INEXPRESSIBLE = {
    "norm": "layer",
    "position": "none",
    "ffn": "gelu",
    "pattern": ("self", "self"),
}


@pytest.mark.parametrize("kind", ["hf", "meta"])
@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_an_ablated_model_that_the_format_cannot_express(tmp_path, to, kind, name):
    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    model = dataclasses.replace(source.model, **{name: INEXPRESSIBLE[name]})
    source = dataclasses.replace(source, model=model)
    with pytest.raises(ValueError, match=rf"model\.{name}=.*--format=native"):
        folder.convert(source, to, kind, None, lambda n: None, print)
    small.assert_nothing_written(to)


def test_meta_cannot_say_another_head_width_or_rope(tmp_path, to):
    model = dataclasses.replace(MODEL, head_dim=8)
    came = small.hf(tmp_path / "hf", small.state(model), head_dim=8)
    refused(came, to, "model.head_dim=8", kind="meta")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    came = small.hf(tmp_path / "other", rope_scaling=rope)
    refused(came, to, "model.rope.low_freq_factor=2.0", kind="meta")


def test_check_finds_a_flipped_bit(tmp_path, to):
    from llama_jax.convert import job

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    written = small.convert(tmp_path / "hf", to, "hf")
    assert job.compare(source, written, lambda n: None) == len(names.units(MODEL))
    raw = bytearray((to / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (to / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        job.compare(source, written, lambda n: None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rms_norm_eps", 1e-6, r"model\.norm_eps is 1e-06, but 1e-05"),
        ("rope_theta", 5e5, r"model\.rope is Rope\(theta=500000\.0.*but Rope\(theta=10000\.0"),
        ("max_position_embeddings", 99, "context is 99, but 64"),
    ],
)
def test_check_finds_a_setting_that_differs(tmp_path, to, name, value, words):
    from llama_jax.convert import job

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    small.convert(tmp_path / "hf", to, "hf")
    settings = {**json.loads((to / "config.json").read_text()), name: value}
    settings.pop("rope_parameters")
    (to / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words):
        job.compare(source, formats.open_checkpoint(to, "hf", ""), lambda n: None)


@pytest.mark.parametrize("kind", ["native", "hf", "meta"])
def test_check_leaves_out_what_a_format_cannot_say(tmp_path, to, kind):
    """How it is computed, how training began it, and in Meta's the positions, which are announced."""
    from llama_jax.convert import job

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    model = dataclasses.replace(source.model, init_std=0.5, remat="full", compute_dtype="bfloat16")
    source, said = dataclasses.replace(source, model=model), []
    folder.convert(source, to, kind, None, lambda n: None, said.append)
    written = formats.open_checkpoint(to, kind, "")
    assert job.compare(source, written, lambda n: None) == len(names.units(MODEL))
    assert [("64 positions" in line, "with 4096" in line) for line in said] == (
        [(True, True)] if kind == "meta" else []
    )
