import dataclasses
import json

import pytest

from llama_jax import config
from llama_jax.config import (
    Data,
    Eval,
    Mesh,
    Model,
    Optim,
    Rope,
    Run,
    Source,
    TokenizerConfig,
    Train,
    form,
)


def test_editing_form_and_back():
    run = Run()
    edited = config.edit(run)
    assert config.freeze(edited) == run
    edited.model.layers = 2
    edited.data.sources.corpus.weight = 3.0
    changed = config.freeze(edited)
    assert changed.model.layers == 2
    assert changed.data.sources[0].weight == 3.0
    assert config.diff(run, changed) == [
        "model.layers: 32 -> 2",
        "data.sources.corpus.weight: 1.0 -> 3.0",
    ]


def test_json_and_back():
    run = Run(model=Model(pattern=("self", "self")), data=Data(sources=(Source("b"), Source("a"))))
    back = config.from_dict(json.loads(json.dumps(config.to_dict(run))))
    assert back.model == run.model
    assert {s.name for s in back.data.sources} == {"a", "b"}
    assert hash(back) == hash(config.from_dict(config.to_dict(run)))


def test_the_editing_form_is_locked():
    with pytest.raises(AttributeError, match="dmi"):
        config.edit(Run()).model.dmi = 3


def test_sources_are_added_and_left_out():
    edited = config.edit(Run())
    config.add_sources(edited, ["books.kind", "books.path", "corpus.weight"])
    edited.data.sources.books.update(kind="files", path="books/*.txt")
    made = config.freeze(edited)
    assert made.data.sources == (Source("books", "files", "books/*.txt"), Source("corpus"))
    edited.data.sources.corpus.weight = 0.0
    assert config.freeze(edited).data.sources == (Source("books", "files", "books/*.txt"),)
    with pytest.raises(AttributeError):
        edited.data.sources.more = {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["boks.weight"], "boks.weight: there is no source 'boks' but corpus; a new one needs data.sources.boks.kind and"),
        (["corpus.paht"], "data.sources.corpus.paht is not a setting; nearest: data.sources.corpus.path"),
        (["my-books.kind"], "my-books.kind: the name of a source must be of letters, digits and _"),
        (["books"], "data.sources.books is not a setting"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_not_added(settings, message):
    edited = config.edit(Run())
    with pytest.raises(ValueError, match=message):
        config.add_sources(edited, settings)
    assert config.freeze(edited) == Run()


def test_how_a_run_is_carried_out_may_change():
    old = Run()
    new = dataclasses.replace(
        old, mesh=Mesh(fsdp=4), model=dataclasses.replace(old.model, remat="full")
    )
    assert config.diff(old, new) == ["model.remat: none -> full", "mesh.fsdp: -1 -> 4"]
    assert config.diff(old, new, essential=True) == []
    new = dataclasses.replace(old, optim=Optim(learning_rate=1e-4))
    assert config.diff(old, new, essential=True) == ["optim.learning_rate: 0.0003 -> 0.0001"]


def test_where_text_lies_is_not_what_it_says():
    """Checkpoints know the text by its fingerprint."""
    old = Run(data=Data(sources=(Source("a.b", "files", "/x/*.txt"),)))
    moved = (Source("a.b", "rows", "/y"),)
    tokenizer = TokenizerConfig("sp", "/y/tokenizer.model")
    new = dataclasses.replace(old, data=Data(sources=moved, tokenizer=tokenizer))
    assert len(config.diff(old, new)) == 3
    assert config.diff(old, new, essential=True) == []
    heavier = (Source("a.b", "rows", "/y", weight=2.0),)
    new = dataclasses.replace(old, data=Data(sources=heavier))
    assert config.diff(old, new, essential=True) == ["data.sources.a.b.weight: 1.0 -> 2.0"]


def test_what_is_not_essential():
    """Each setting that says how or where, changed alone; those of sources by any name."""
    old = Run(data=Data(sources=(Source("a.b", "files", "/x"),)))
    found = {place for place, _, aspect in form._settings(old) if aspect != "what"}
    how = {
        p for p in config.flatten(old) if p.startswith(("mesh.", "log.", "checkpoint.", "eval."))
    }
    how |= {f"model.{name}" for name in ("kernel", "remat", "unroll")}
    how |= {
        f"train.{name}"
        for name in (
            "microbatches",
            "loss_chunks",
            "on_anomaly",
            "max_skips",
            "init_from",
            "init_step",
        )
    }
    how |= {"data.cache", "data.threads", "data.tokenizer.path"}
    how |= {f"data.sources.a.b.{name}" for name in ("kind", "path", "text_field")}
    assert found == how


def test_any_part_has_an_editing_form():
    edited = config.edit(config.Decode())
    edited.temperature = 0.5
    assert config.freeze(edited, config.Decode, "decode") == config.Decode(temperature=0.5)
    edited.top_p = 2.0
    with pytest.raises(ValueError, match=r"decode.top_p=2.0 must be above 0"):
        config.freeze(edited, config.Decode, "decode")
    with pytest.raises(AttributeError):
        edited.temprature = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(kv_heads=3), r"model.kv_heads=3 must divide model.heads=32; try 1, 2, 4, 8, 16 or 32"),
        (lambda: Model(head_dim=5), r"model.head_dim=5 must be even.*try 6"),
        (lambda: Model(dim=0), r"model.dim=0 must be positive"),
        (lambda: Model(layers=5, pattern=("self", "self")), r"len\(model.pattern\)=2 must divide model.layers=5"),
        (lambda: Model(unroll=0), r"model.unroll=0 must be positive"),
        (lambda: Model(pattern=()), r"model.pattern=\(\) must name"),
        (lambda: Model(compute_dtype="bf16"), r"model.compute_dtype='bf16'.*nearest: 'bfloat16'"),
        (lambda: Model(output="tide"), r"model.output='tide'.*nearest: 'tied'"),
        (lambda: Rope(original_length=4096), r"original_length=4096 has no effect while model.rope.factor=1.0"),
        (lambda: Rope(factor=8.0, low_freq_factor=4.0), r"high_freq_factor=4.0 must exceed"),
        (lambda: TokenizerConfig("byte", "x"), r"tokenizer.path='x' has no effect on kind 'byte'"),
        (lambda: TokenizerConfig("bpe"), r"tokenizer.path='' must name the ranks"),
        (lambda: Source("a", "stdlib", "x"), r"data.sources.a.path='x' has no effect on kind 'stdlib'"),
        (lambda: Source("a", "files"), r"data.sources.a.path='' must be set for kind 'files'"),
        (lambda: Source("a", weight=0.0), r"data.sources.a.weight=0.0 must be positive"),
        (lambda: Source("a", "files", "gs://b/c.txt"), r"data.sources.a.path='gs://b/c.txt' must be a path on this machine; mount the bucket with `.*gcsfuse --implicit-dirs b ~/bucket` and give ~/bucket/c.txt"),
        (lambda: Source("a", "rows", "s3://b/c"), r"data.sources.a.path='s3://b/c' must be a path on this machine; mount what it names"),
        (lambda: TokenizerConfig("sp", "gs://b"), r"data.tokenizer.path='gs://b' must be a path .* give ~/bucket/NAME"),
        (lambda: Data(cache="gs://b/c"), r"data.cache='gs://b/c' must be a path"),
        (lambda: Data(sources=()), r"data.sources is empty"),
        (lambda: Data(sources=(Source(), Source())), r"must have different names"),
        (lambda: Data(validation_fraction=1.0), r"validation_fraction=1.0 must lie between 0 and 1"),
        (lambda: Data(packing="best"), r"data.packing='best'.*nearest: 'best_fit'"),
        (lambda: Optim(beta2=1.5), r"optim.beta2=1.5 must lie between 0 and 1"),
        (lambda: Train(batch_size=10, microbatches=3), r"train.microbatches=3 must divide train.batch_size=10"),
        (lambda: Train(on_anomaly="skp"), r"train.on_anomaly='skp'.*nearest: 'skip'"),
        (lambda: Train(init_step=4), r"train.init_step=4 has no effect while train.init_from=''"),
        (lambda: Mesh(data=-1, fsdp=-1), r"may leave one axis to be filled"),
        (lambda: Mesh(tensor=0), r"must be positive, or -1"),
        (lambda: Run(train=Train(steps=10)), r"optim.warmup_steps=2000 must be below train.steps=10"),
        (lambda: Run(data=Data(sources=(Source("a"), Source("b"))), eval=Eval(rows=1)), r"eval.rows=1 must be at least 2, one of each source"),
        (lambda: Run(train=Train(loss_chunks=3)), r"train.loss_chunks=3 must divide data.seq_len=2048"),
        (lambda: config.from_dict({"model": {"dmi": 3}}), r"model.dmi is not a setting; nearest: model.dim"),
        (lambda: config.from_dict({"model": {"dim": "a"}}), r"model.dim='a' must be int, not str"),
        (lambda: config.from_dict({"model": {"pattern": "self"}}), r"model.pattern='self' must be a tuple"),
        (lambda: config.from_dict({"model": 3}), r"model=3 must be a group of settings"),
        (lambda: config.from_dict({"data": {"sources": [1]}}), r"data.sources=\[1\] must be a dict of name"),
    ],
)  # fmt: skip
def test_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_default_is_none():
    """The command line cannot override a None."""
    assert None not in config.flatten(Run()).values()


def test_of_many_names_the_nearest_are_said():
    """Llama 3 has 256 special tokens."""
    names = [f"<|reserved_special_token_{i}|>" for i in range(255)] + ["<|eot_id|>"]
    with pytest.raises(ValueError, match="nearest") as error:
        config.choose(names, "<|eot|>", "decode.stop_tokens")
    assert str(error.value).startswith(
        "decode.stop_tokens='<|eot|>' is not one of the 256 that there are; nearest: '<|eot_id|>', '"
    )
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("layers", "unroll", "unrolled"), [(32, 5, 4), (2, 4, 2), (7, 4, 1), (6, 4, 3), (4, 4, 4)]
)
def test_unrolled_layers_divide_them_all(layers, unroll, unrolled):
    """So that a network of other depth needs no other unroll."""
    assert Model(layers=layers, unroll=unroll).unrolled == unrolled
