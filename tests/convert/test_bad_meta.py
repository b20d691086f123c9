"""What is wrong with Meta's files is said in one line that names file and tensor, and nothing is written."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from llama_jax.convert import formats, meta_params, pth
from tests.convert import small
from tests.convert.refusals import DEEP, NUMBER, WHOLE, refused
from tests.convert.small import MODEL

# What Orbax was still reading when it met the damage dies later, each piece with a traceback.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    *(("n_kv_heads", value, WHOLE) for value in ("2", 2.5, -2, True)),
    *(("head_dim", value, WHOLE) for value in ("4", 4.5)),
    *(("multiple_of", value, WHOLE) for value in (0, "256", None)),
    *(("vocab_size", value, WHOLE) for value in ("48", -2, 48.5, -1.0, False)),
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


def test_a_whole_number_may_be_written_as_a_float(meta):
    file = meta / "params.json"
    params = json.loads(file.read_text())
    file.write_text(json.dumps(params | {"n_heads": 6.0, "vocab_size": 48.0, "n_layers": 2.0}))
    assert formats.open_checkpoint(meta, "", "").model == MODEL


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
