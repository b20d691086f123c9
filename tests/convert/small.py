"""Small models and checkpoints of them, in each format, for the tests of this room."""

import json
import struct
from pathlib import Path

import numpy as np

from llama_jax import config
from llama_jax.convert import folder, formats, names, native
from llama_jax.model import transformer

# All sizes different; kv heads and every width divide by 2.
MODEL = config.Model(
    vocab_size=48,
    dim=24,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=4,
    ffn_dim=20,
    norm_eps=1e-5,
    compute_dtype="float32",
)


def state(model: config.Model = MODEL, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A random tensor of torch's layout under each of Hugging Face's names."""
    random = np.random.default_rng(seed)
    return {
        unit.hf: random.normal(size=names.torch_shape(unit.row, model)).astype(dtype)
        for unit in names.units(model)
    }


def safetensors(file: Path, tensors: dict[str, np.ndarray], change=lambda header: None) -> None:
    """A file by the format's description, without the library's writer; `change` may damage the header."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def settings(model: config.Model = MODEL, **others) -> dict:
    """A config.json as transformers 4 wrote it."""
    return {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "max_position_embeddings": 64,
        **others,
    }


def hf(place: Path, tensors: dict[str, np.ndarray] | None = None, **others) -> Path:
    """A Hugging Face folder of one file."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(settings(**others)))
    safetensors(place / "model.safetensors", state() if tensors is None else tensors)
    return place


def hf_shards(place: Path, **others) -> Path:
    """A Hugging Face folder of two files and an index."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(settings(**others)))
    items, where = list(state().items()), {}
    for i, part in enumerate((items[:9], items[9:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors(place / file, dict(part))
        where |= {name: file for name, _ in part}
    index = {"metadata": {}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def sentencepiece(pieces: int = 5, kind: str = "BPE") -> bytes:
    """A SentencePiece model of <unk>, <s>, </s>, the bytes that there is room for, and letters."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model, kinds = proto.ModelProto(), proto.ModelProto.SentencePiece
    special = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
    for i in range(pieces):
        name, type_ = special.get(i, (chr(ord("a") + i), kinds.NORMAL))
        if 3 <= i < 259 <= pieces:
            name, type_ = f"<0x{i - 3:02X}>", kinds.BYTE
        model.pieces.add(piece=name, score=-i, type=type_)
    model.trainer_spec.model_type = getattr(proto.TrainerSpec, kind)
    model.trainer_spec.byte_fallback = pieces >= 259
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def convert(came: Path, to: Path, kind: str, dtype=None, progress=lambda n: None, report=print):
    """What the command does, without its process; the opened result."""
    source = formats.open_checkpoint(came, "", "")
    folder.convert(source, to, kind, dtype, progress, report)
    return formats.open_checkpoint(to, kind, "")


def tensors(source) -> dict[str, np.ndarray]:
    """Every tensor of an opened checkpoint, under Hugging Face's names."""
    return {
        unit.hf: source.read(unit, 0, names.torch_shape(unit.row, source.model)[0])
        for unit in names.units(source.model)
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bit by bit."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == np.ascontiguousarray(other[name]).tobytes(), name


def assert_nothing_written(to: Path) -> None:
    assert not to.exists()
    assert not to.with_name(to.name + ".unfinished").exists()


def stories(shared, layout, to):
    """The real small network, imported: its source, module and parameters."""
    source = convert(shared("checkpoints/stories260K/stories260K.bin"), to, "native")
    module = transformer.build(source.model, layout)
    return source, module, native.load(to, module)
