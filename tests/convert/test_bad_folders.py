"""What is wrong with our own folders, sources and destinations is said in one line; nothing is written."""

import dataclasses
import json
import resource
import shutil
import signal
from pathlib import Path

import jax
import pytest

from llama_jax import config, sharding
from llama_jax.convert import compare, folder, formats, names, native, stage
from llama_jax.model import transformer
from tests.convert import small
from tests.convert.refusals import DEEP, WHOLE, nested, refused
from tests.convert.small import MODEL

# What Orbax was still reading when it met the damage dies later, each piece with a traceback.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# Our own folders


@pytest.fixture
def ours(tmp_path):
    small.convert(small.hf(tmp_path / "hf"), tmp_path / "ours", "native")
    return tmp_path / "ours"


SAID = [
    *(("context", value, WHOLE) for value in ("abc", None, 0, 64.5)),
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
    with pytest.raises(ValueError, match="model_type=UNIGRAM must be BPE"):
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

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    written = small.convert(tmp_path / "hf", to, "hf")
    assert compare.sources(source, written, lambda n: None) == len(names.units(MODEL))
    raw = bytearray((to / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (to / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        compare.sources(source, written, lambda n: None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rms_norm_eps", 1e-6, r"model\.norm_eps is 1e-06, but 1e-05"),
        ("rope_theta", 5e5, r"model\.rope is Rope\(theta=500000\.0.*but Rope\(theta=10000\.0"),
        ("max_position_embeddings", 99, "context is 99, but 64"),
    ],
)
def test_check_finds_a_setting_that_differs(tmp_path, to, name, value, words):

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    small.convert(tmp_path / "hf", to, "hf")
    settings = {**json.loads((to / "config.json").read_text()), name: value}
    settings.pop("rope_parameters")
    (to / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words):
        compare.sources(source, formats.open_checkpoint(to, "hf", ""), lambda n: None)


@pytest.mark.parametrize("kind", ["native", "hf", "meta"])
def test_check_leaves_out_what_a_format_cannot_say(tmp_path, to, kind):
    """How it is computed, how training began it, and in Meta's the positions, which are announced."""

    source = formats.open_checkpoint(small.hf(tmp_path / "hf"), "", "")
    model = dataclasses.replace(source.model, init_std=0.5, remat="full", compute_dtype="bfloat16")
    source, said = dataclasses.replace(source, model=model), []
    folder.convert(source, to, kind, None, lambda n: None, said.append)
    written = formats.open_checkpoint(to, kind, "")
    assert compare.sources(source, written, lambda n: None) == len(names.units(MODEL))
    assert [("64 positions" in line, "with 4096" in line) for line in said] == (
        [(True, True)] if kind == "meta" else []
    )
