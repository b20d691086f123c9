"""llama2.c's files: the three versions of one trained network, and what is wrong with damaged ones."""

import dataclasses
import json
import struct

import numpy as np
import pytest

from llama_jax.convert import carried, formats, llama2c, names
from tests.convert import small
from tests.convert.small import MODEL

FOLDER = "checkpoints/stories260K/"


def opened(path):
    return formats.open_checkpoint(path, "", "")


def test_version_1_holds_the_weights_of_version_0(shared):
    old = opened(shared(FOLDER + "stories260K.bin"))
    new = opened(shared(FOLDER + "stories260K_v1.bin"))
    assert old.model == new.model
    small.assert_same(small.tensors(old), small.tensors(new))


def test_version_2_holds_them_rounded_to_int8_in_groups(shared):
    exact = small.tensors(opened(shared(FOLDER + "stories260K.bin")))
    rounded = small.tensors(opened(shared(FOLDER + "stories260K-q8.bin")))
    for name, array in exact.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(rounded[name], array)
            continue
        # A value is at most half a step off; a step is the largest of its group / 127.
        assert np.abs(rounded[name] - array).max() <= np.abs(array).max() / 127 * 0.501, name
        assert np.abs(rounded[name] - array).max() > 0, name


def test_settings_come_from_the_header(shared):
    source = opened(shared(FOLDER + "stories260K.bin"))
    model = source.model
    sizes = (model.dim, model.ffn_dim, model.layers, model.heads, model.kv_heads, model.vocab_size)
    assert sizes == (64, 172, 5, 8, 4, 512)
    assert (model.output, source.context, model.norm_eps) == ("tied", 512, 1e-5)
    assert source.tokenizer is not None


def write(file, version: int, model=MODEL, context=16, group=4, theta=10_000.0, random=None):
    """A file by the format's description; random weights in Meta's layout, by name."""
    random = random or np.random.default_rng(0)
    size = {u.meta: names.torch_shape(u.row, model) for u in names.units(model)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in size.items()}
    tied = model.output == "tied"
    vocab = model.vocab_size * (1 if tied or version else -1)
    head = struct.pack(
        "<7i", model.dim, model.ffn_dim, model.layers, model.heads, model.kv_heads, vocab, context
    )
    if version:
        head = struct.pack("<Ii", 0x616B3432, version) + head + struct.pack("<B", tied)
        head += struct.pack("<i", group) if version == 2 else b""
        head = head.ljust(256, b"\0")

    def layers(name):
        return [f"layers.{i}.{name}.weight" for i in range(model.layers)]

    attention = [n for w in ("wq", "wk", "wv", "wo") for n in layers(f"attention.{w}")]
    ffn = [n for w in ("w1", "w2", "w3") for n in layers(f"feed_forward.{w}")]
    norms = layers("attention_norm"), layers("ffn_norm"), ["norm.weight"]
    if version == 0:
        order = [
            "tok_embeddings.weight",
            *norms[0],
            *attention,
            *norms[1],
            *ffn,
            *norms[2],
            "rotary",
        ]
    else:
        order = [*norms[0], *norms[1], *norms[2], "tok_embeddings.weight", *attention, *ffn]
    order += [] if tied else ["output.weight"]
    body = b""
    for name in order:
        if name == "rotary":
            angles = np.outer(
                np.arange(context), theta ** -(np.arange(0, model.head_dim, 2) / model.head_dim)
            )
            body += np.cos(angles).astype("<f4").tobytes() + np.sin(angles).astype("<f4").tobytes()
        elif version == 2 and weights[name].ndim == 2:
            grouped = weights[name].reshape(-1, group)
            scale = np.abs(grouped).max(axis=1) / 127
            values = np.round(grouped / scale[:, None]).astype(np.int8)
            weights[name] = (values * scale[:, None]).astype(np.float32).reshape(size[name])
            body += values.tobytes() + scale.astype("<f4").tobytes()
        else:
            body += weights[name].tobytes()
    file.write_bytes(head + body)
    return weights


@pytest.mark.parametrize("output", ["tied", "untied"])
@pytest.mark.parametrize(("version", "group"), [(0, 0), (1, 0), (2, 4), (2, 8)])
def test_every_tensor_is_found_in_every_version(tmp_path, version, group, output):
    """Rows of 20 in groups of 8: a group goes on in the next row."""
    model = dataclasses.replace(MODEL, output=output)
    weights = write(tmp_path / "model.bin", version, model, group=group)
    source = opened(tmp_path / "model.bin")
    assert source.model == model
    for unit in names.units(model):
        wanted = weights[unit.meta]
        if unit.row.pairs:
            wanted = wanted[[h * 4 + i for h in range(len(wanted) // 4) for i in (0, 2, 1, 3)]]
        found = source.read(unit, 0, len(wanted))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=unit.meta)


def test_begin_stays_an_end_token_on_the_way_through_other_formats(tmp_path):
    """llama2.c's run.c ends at id 1, its sample.py at 2; transformers ends at the ids of its config."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "model.bin", 1)
    small.convert(tmp_path / "model.bin", tmp_path / "native", "native")
    small.convert(tmp_path / "native", tmp_path / "hf", "hf")
    small.convert(tmp_path / "hf", tmp_path / "back", "native")
    for folder in ("native", "back"):
        assert carried.end_ids(tmp_path / folder) == {1, 2}
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == [2, 1]
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, [2, 1])


def test_a_tokenizer_with_more_ids_than_the_vocabulary(tmp_path):
    write(tmp_path / "model.bin", 1)
    (tmp_path / "many.model").write_bytes(small.sentencepiece(49))
    with pytest.raises(ValueError, match=r"has 49 ids, more than model\.vocab_size=48"):
        formats.open_checkpoint(tmp_path / "model.bin", "", str(tmp_path / "many.model"))


def refused(file, *words):
    with pytest.raises(ValueError, match=r".") as error:
        opened(file)
    for word in (str(file), *words):
        assert word in str(error.value), error.value


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_truncated_file_names_the_first_tensor_that_is_not_whole(tmp_path, version):
    file = tmp_path / "model.bin"
    write(file, version)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(file, "first tensor beyond its end is", ".weight")
    file.write_bytes(content + bytes(4))
    refused(file, "there is more behind the last")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_header_that_claims_millions_of_layers(tmp_path, version):
    """Before anything is made for each of them."""
    file = tmp_path / "model.bin"
    write(file, version)
    content, at = file.read_bytes(), 8 if version else 0
    file.write_bytes(content[: at + 8] + struct.pack("<i", 2**24) + content[at + 12 :])
    matrices, norms = 2 * 24 * 24 + 2 * 8 * 24 + 3 * 20 * 24, 2 * 24
    one = 4 * norms + (2 if version == 2 else 4) * matrices  # a byte, and 4 for a group of 4
    refused(file, f"should have {len(content) + (2**24 - 2) * one:,} bytes", ".weight")


def test_headers_that_are_not_one(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"short")
    refused(file, "5 bytes")
    file.write_bytes(bytes(300))
    refused(file, "not a llama2.c checkpoint")
    file.write_bytes(struct.pack("<Ii", llama2c.MAGIC, 7) + bytes(300))
    refused(file, "version 7")
    write(file, 2)
    content = bytearray(file.read_bytes())
    content[37:41] = struct.pack("<i", 5)
    file.write_bytes(content)
    refused(file, "groups of 5")


def test_a_rotary_table_of_another_base(tmp_path):
    file = tmp_path / "model.bin"
    write(file, 0, theta=500_000.0)
    refused(file, "base 500000")


@pytest.mark.parametrize(
    ("head_dim", "cos", "sin"),
    [(2, 0.5, 0.5), (4, [0.5, 1.0], [0.5, 0.0]), (128, 1.0, 1e-30), (4, np.nan, np.nan)],
    ids=["one pair", "no angle", "an angle too small", "not a number"],
)
def test_a_rotary_table_that_tells_no_base(tmp_path, head_dim, cos, sin):
    model = dataclasses.replace(MODEL, heads=2, kv_heads=2, head_dim=head_dim, dim=2 * head_dim)
    model = dataclasses.replace(model, output="tied")
    file = tmp_path / "model.bin"
    write(file, 0, model)
    raw = np.frombuffer(bytearray(file.read_bytes()), "<f4")
    tables = raw[-16 * head_dim :].reshape(2, 16, head_dim // 2)
    tables[0, 1], tables[1, 1] = cos, sin
    file.write_bytes(raw.tobytes())
    refused(file, "its rotary table has")


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((8, 8, 1, 8, 8, 8, 8), "model.head_dim=1 must be even"),
        ((8, 8, 1, 4, 3, 8, 8), "kv_heads=3"),
    ],
)
def test_a_rule_of_ours_that_a_header_breaks_names_the_file(tmp_path, sizes, rule):
    file = tmp_path / "model.bin"
    file.write_bytes(struct.pack("<7i", *sizes))
    refused(file, f"{file}: model.", rule)
