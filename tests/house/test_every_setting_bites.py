"""Change each setting of a run, of decoding, of quantising and of a study: something that is seen must change.

Of a run's settings those that say what is computed change the traced step, the schedule, the rows or the first
parameters; those that say how change what one part of the program does with them. A setting that only a command
reads is looked for in the code, as `decode.rows`. The model's own are in test_every_field_bites.py.
"""

import ast
import dataclasses
import functools
import json
import re
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import config, sharding
from llama_jax.config.aspects import ASPECT, HOW, WHAT, WHERE
from llama_jax.data import iterator, prepare
from llama_jax.decode import engine, generate, sample
from llama_jax.model import transformer
from llama_jax.quant import network
from llama_jax.run import hosts, loading, prompt_file, session, warm_start
from llama_jax.study import grid, report, schema
from llama_jax.tokenizer import byte, sp
from llama_jax.train import checkpoint, loop, objective, optim, program
from tests.data import small
from tests.run import test_session
from tests.study import test_grid
from tests.train import test_loop

ROOT = Path(__file__).resolve().parents[2]
PIECES = 283  # vocabulary size of the SentencePiece models trained here
MODEL = config.Model(
    vocab_size=259, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=12,
    compute_dtype="float32",
)  # fmt: skip


class World(typing.NamedTuple):
    """What the settings of the base name: folders of texts, of rows, files of tokenizers."""

    folder: Path
    base: config.Run
    layout: sharding.Layout


@pytest.fixture(scope="module")
def world(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("settings")
    for seed, name in enumerate(("one", "two", "other")):
        small.write_texts(folder / name, 26, seed=seed, lines=9)
        lines = [
            line for file in (folder / name).iterdir() for line in file.read_text().split("\n")
        ]
        if name != "one":
            sp.train(lines, PIECES, str(folder / f"{name}.model"), 1)
    records = ({"text": f"text {n} " * 9, "more": f"more {n} " * 9} for n in range(200))
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources = (small.files(folder / "one"), small.files(folder / "two", "second"))
    base = config.Run(
        model=MODEL,
        data=small.data_of(folder, *sources, seq_len=12),
        optim=config.Optim(warmup_steps=4),
        train=config.Train(steps=20, batch_size=8),
        eval=config.Eval(rows=11),
    )
    return World(folder, base, layout)


# What is seen of a run. Each takes the run and the world.


def step(run, world):
    """The traced training step, without the addresses of functions in its text."""
    built = program.build(run, world.layout)
    traced = built.step.trace(built.state, built.frozen, built.batch)
    return re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))


def rates(run, world):
    return optim.rates(run.optim, run.train.steps, 20).tolist()


def prepared_of(run, world):
    return prepare.prepare(run.data, run.model.vocab_size, small.quiet)


def rows(run, world):
    """The first batch."""
    loaded = iterator.loader(run, prepared_of(run, world), np.arange(run.train.batch_size))(0)
    return jax.tree.map(np.ndarray.tolist, loaded.batch)


def start(run, world):
    """The parameters that a run of one parameter starts from."""
    one = objective.Objective(
        sums=None, tokens=None, init=lambda key: {"w": jax.random.normal(key, (8,))}, letters={"w": "D"},
        frozen={}, params=None, batch=None,
    )  # fmt: skip
    made = SimpleNamespace(
        objective=one, tx=optax.sgd(0.1), state=None, module=SimpleNamespace(layout=world.layout)
    )
    read = lambda run, program, trained: {"w": jnp.full(8, float(len(run.train.init_from)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "check", lambda run, program, prepared: None)
        patch.setattr(warm_start, "weights", read)
        state, *_ = session.start(run, made, SimpleNamespace(latest=lambda state: None), None, "")
    return state.params["w"].tolist()


def pinned(run, world):
    """The weights that a run begins with, told by their checksum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "_newest", lambda folder: 7)
        patch.setattr(warm_start.native, "is_native", lambda folder: True)
        patch.setattr(warm_start.native, "identity", lambda folder, step: f"step {step}")
        return warm_start.pinned(run, lambda: None).train.init_checksum


def store(run, world):
    """Where the rows are kept."""
    return prepared_of(run, world).sources[0].store.folder


def readers(run, world):
    """How rows are read ahead."""
    asked, make = [], grain.ReadOptions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grain, "ReadOptions", lambda **of: asked.append(of) or make(**of))
        next(iterator.train(run, prepared_of(run, world), world.layout, 0))
    return asked


def held_out(run, world):
    """The rows that evaluations read."""
    batches = iterator.validation_here(run, prepared_of(run, world))
    return [(source, batch.tokens_BT.tolist()) for source, batch in batches]


def looped(run, world, bad=()):
    """Steps that are recorded, saved and evaluated; the updates of steps in `bad` are left out."""

    def step(state, batch):
        n = state.step + 1
        in_a_row = n - bad[0] + 1 if n in bad else 0
        return test_loop.State(n), test_loop.metrics(1.0, float(n in bad), in_a_row)

    try:
        result, console, saves, evaluations, _ = test_loop.play(run, step=step)
    except loop.Anomaly as error:
        return str(error)
    return result, [row["step"] for row in console.rows], saves, len(evaluations)


anomalies = functools.partial(looped, bad=(3, 4, 5))


def shards(run, world):
    """A part of a parameter, of a batch and of an activation, on one of eight devices."""
    layout = sharding.make(run.mesh, jax.devices())
    activations = jax.NamedSharding(layout.mesh, sharding._spec(layout.tables.activations, "BTD"))
    of = (layout.param("DF"), (64, 64)), (layout.batch("BT"), (64, 64)), (activations, (64,) * 3)
    return [place.shard_shape(shape) for place, shape in of]


def checked_hosts(run, world):
    return hosts.check(run.mesh)


def kept(run, world):
    """The checkpoints that are there after three."""
    kept = checkpoint.Checkpoints(tempfile.mkdtemp(dir=world.folder), run.checkpoint)
    for n in (1, 2, 3):
        kept.save(n, {"step": jax.device_put(np.int32(n), world.layout.replicated)}, {})
    kept.wait()
    return sorted(path.name for path in kept.folder.iterdir())


def writers(run, world):
    """Where a session writes rows, and whether it lists what each step consumed."""
    seen = []

    def run_loop(run, state, *_, recorder, audit, **__):
        seen.extend([recorder._writers[2:], audit is not None])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("tensorboard", "wandb"):
            patch.setattr(session.metrics, name, lambda *_, name=name: name)
        folder = Path(tempfile.mkdtemp(dir=world.folder))
        test_session.play(patch, folder, run_loop, test_session.Checkpoints(), run=run)
    return seen


def figures(run, world):
    module = transformer.build(run.model, world.layout)
    return session.figures(run, SimpleNamespace(module=module, frozen={}))


def card(run, world):
    """What the run card says of the hardware."""
    ended = SimpleNamespace(state=SimpleNamespace(step=1), params={}, results={}, seconds=1.0)
    ended.rates, ended.tokens = loop.FlopRates(1.0, 0.0), 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.provenance, "describe", lambda prepared: {})
        return session.card(run, ended, prepared_of(run, world), "")["hardware"]


# place: what is seen, another value, other settings of the base that it needs. A callable is given the world.
RUN = {
    WHAT: {
        "data.sources.name": (rows, "another"),
        "data.sources.weight": (rows, 3.0),
        "data.tokenizer.kind": (rows, "sp", {"model.vocab_size": PIECES}),
        "data.seq_len": (rows, 14),
        "data.packing": (rows, "best_fit"),
        "data.segments": (step, "document"),
        "data.validation_fraction": (rows, 0.4),
        "data.seed": (rows, 1),
        "optim.name": (step, "lion"),
        "optim.learning_rate": (rates, 1e-3),
        "optim.schedule": (rates, "linear"),
        "optim.warmup_steps": (rates, 5),
        "optim.final_fraction": (rates, 0.2),
        "optim.decay_fraction": (rates, 0.5, {"optim.schedule": "wsd"}),
        "optim.beta1": (step, 0.8),
        "optim.beta2": (step, 0.9),
        "optim.eps": (step, 1e-6),
        "optim.weight_decay": (step, 0.2),
        "optim.clip_norm": (step, 2.0),
        "optim.train": (step, ("*/attention/*",), {"train.init_from": "there"}),
        "train.steps": (rates, 30),
        "train.batch_size": (step, 16),
        "train.z_loss": (step, 1e-4),
        "train.seed": (start, 1),
        "train.spike_nats": (step, 2.0),
        "train.init_checksum": (pinned, "b", {"train.init_from": "there"}),
    },
    HOW: {
        "data.cache": (store, lambda world: str(world.folder / "elsewhere")),
        "data.threads": (readers, 3),
        "train.microbatches": (step, 2),
        "train.loss_chunks": (step, 2),
        "train.on_anomaly": (anomalies, "skip"),
        "train.max_skips": (anomalies, 2, {"train.on_anomaly": "skip"}),
        "mesh.slices": (shards, 2),
        "mesh.data": (shards, 2),
        "mesh.fsdp": (shards, 4, {"mesh.fsdp": 1, "mesh.data": -1}),
        "mesh.context": (shards, 2),
        "mesh.tensor": (shards, 2),
        "mesh.hardware": (checked_hosts, "v4_8"),
        "checkpoint.every": (looped, 7),
        "checkpoint.keep": (kept, 1),
        "eval.every": (looped, 7),
        "eval.rows": (held_out, 8),
        "log.every": (looped, 7),
        "log.tensorboard": (writers, "off"),
        "log.wandb": (writers, "on"),
        "log.audit": (writers, "on"),
        "log.peak_tflops": (figures, 7.0),
        "log.watts_per_chip": (card, 7.0),
    },
    WHERE: {
        "data.sources.kind": (rows, "rows"),
        "data.sources.path": (rows, lambda world: f"{world.folder}/other/*.txt"),
        "data.sources.text_field": (
            rows,
            "more",
            {"data.sources.path": lambda world: f"{world.folder}/records.jsonl"},
        ),
        "data.tokenizer.path": (
            rows,
            lambda world: f"{world.folder}/other.model",
            {
                "model.vocab_size": PIECES,
                "data.tokenizer.kind": "sp",
                "data.tokenizer.path": lambda world: f"{world.folder}/two.model",
            },
        ),
        "train.init_from": (start, "there"),
        "train.init_step": (pinned, 3, {"train.init_from": "there"}),
    },
}
OF_RUN = {place: row for rows in RUN.values() for place, row in rows.items()}


# What is seen of decoding: each takes the part and the world.


def draws(decode, world):
    """Tokens of one step, with logits of few ties."""
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(scale=2, size=(64, 41)), jnp.float32)
    seen_BV = None if decode.repetition_penalty == 1 else logits_BV > 1
    keys_B = jax.random.split(jax.random.key(0), 64)
    slots = engine.BatchSlots(None, jnp.zeros(64, jnp.int32), jnp.arange(64), keys_B, seen_BV)
    found, *_ = engine._said(sample.settings(decode), logits_BV, slots)
    return found.token_B.tolist()


def requests(decode, world):
    """What is asked of the decoder for a file of prompts."""
    loaded = SimpleNamespace(
        engine=SimpleNamespace(decode=decode), tokenizer=byte.Byte(), context=999, ends=frozenset(),
        identity="", draft="", folder=world.folder,
    )  # fmt: skip
    source = world.folder / "prompts.jsonl"
    source.write_text('{"prompt": "a"}\n')
    target = Path(tempfile.mkdtemp(dir=world.folder)) / "texts.jsonl"
    return prompt_file.begin(loaded, source, target, None)[1]


def continued(decode, world):
    """A sequence of the decoder that is given the bytes of a text."""
    idle = SimpleNamespace(decode=decode, rows=lambda number, length: None)
    decoder = generate.Decoder(idle, byte.Byte(), (), 1, 99)
    text = decoder._text(generate.Request([1], 99))
    return [text.feed(token) for token in byte.Byte().encode("abc def")], text.end


def caches(decode, world):
    made = engine.Engine(transformer.build(MODEL, world.layout), decode).rows(2, 16).cache
    return [str(leaf.dtype) for leaf in jax.tree.leaves(made)]


def loaded(decode, world):
    """A network's dtype, and what ends its texts."""
    tokenizer = byte.Byte()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "settings", lambda folder: (MODEL, 99, tokenizer))
        patch.setattr(loading, "newest", lambda folder: 1)
        patch.setattr(loading, "decode_params", lambda folder, module, step: None)
        patch.setattr(loading, "identity", lambda *_: "")
        found = loading.load(world.folder, decode, config.Mesh())
    return found.engine.module.config.compute_dtype, found.ends


DRAWN = {"temperature": 1.0}
DECODE = {
    "max_new_tokens": (requests, 7),
    "temperature": (draws, 1.0),
    "top_k": (draws, 2, DRAWN),
    "top_p": (draws, 0.5, DRAWN),
    "min_p": (draws, 0.5, DRAWN),
    "repetition_penalty": (draws, 9.0),
    "seed": (requests, 1, DRAWN),
    "samples": (requests, 2, DRAWN),
    "stop": (continued, ("c d",)),
    "stop_tokens": (loaded, ("<pad>",)),
    "cache": (caches, "int8"),
    "compute_dtype": (loaded, "bfloat16"),
}


def smaller(quant, world):
    """A matrix, quantised."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (8, 64))
    made = network._parameter("w", w, "DF", quant, x @ x.T)
    return made.dense("float32").tolist(), made.activations


QUANT = {
    "bits": (smaller, 4),
    "group": (smaller, 16, {"bits": 4}),
    "method": (smaller, "nearest", {"bits": 4}),
    "activations": (smaller, "int16"),
}


def combinations(study, world):
    return [grid._name(combination) for combination in grid._combinations(study)]


def widths(study, world):
    return [(cell.name, cell.run.model.ffn_dim) for cell in grid.cells(study)]


def runs(study, world):
    return grid.runs(study, ["cell"])


def concludes(study, world):
    return report.concludes(study)


AXES = {"position": test_grid.POSITION, "ffn": test_grid.FFN}
STUDY = {
    "base": (widths, lambda world: dataclasses.replace(_study().base, model=_narrower())),
    "axes": (combinations, lambda world: test_grid.study({"ffn": test_grid.FFN}).axes),
    "grid": (combinations, "full"),
    "cells": (combinations, ("gelu+alibi",), {"grid": "listed"}),
    "seeds": (runs, 5),
    "match": (widths, "parameters"),
    "preset": (concludes, "quick"),
}


def _study():
    return test_grid.study(AXES, grid="listed", cells=("gelu+rope",))


def _narrower():
    return dataclasses.replace(_study().base.model, ffn_dim=80)


# Read by commands alone.
READ = ("decode.rows", "quant.rows", "quant.row_tokens", "study.rows", "study.lengths")


@functools.cache
def attributes() -> frozenset[str]:
    """Dotted attributes that the code reads, outside the schemas and in no message."""
    found = set()
    for folder in ("llama_jax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            if "config" not in path.parts and path.name != "schema.py":
                tree = ast.parse(path.read_text())
                quoted = {
                    node
                    for text in ast.walk(tree)
                    if isinstance(text, ast.JoinedStr)
                    for node in ast.walk(text)
                }
                found |= {
                    f"{getattr(node.value, 'attr', '')}{getattr(node.value, 'id', '')}.{node.attr}"
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Attribute) and node not in quoted
                }
    return frozenset(found)


def change(part: Any, place: str, value: Any) -> Any:
    """A part with another value at a place; of several sources at the first."""
    name, _, rest = place.partition(".")
    if rest:
        old = getattr(part, name)
        first = change(old[0] if isinstance(old, tuple) else old, rest, value)
        value = (first, *old[1:]) if isinstance(old, tuple) else first
    return dataclasses.replace(part, **{name: value})


@functools.cache
def outcome(see: Callable, part: Any, world: World) -> Any:
    """What is seen, or the refusal of a user's mistake."""
    try:
        return see(part, world)
    except ValueError as error:
        return str(error)


def bites(part: Any, place: str, row: tuple, world: World) -> bool:
    see, value, needs = (*row, {})[:3]
    own = lambda value: value(world) if callable(value) else value
    for name, needed in needs.items():
        part = change(part, name, own(needed))
    other = change(part, place, own(value))
    assert other != part, f"{place} is the base's own"
    before, after = outcome(see, part, world), outcome(see, other, world)
    return before != after


@pytest.mark.parametrize("place", OF_RUN)
def test_a_setting_of_a_run_changes_something(place, world):
    assert bites(world.base, place, OF_RUN[place], world)


@pytest.mark.parametrize("place", DECODE)
def test_a_setting_of_decoding_changes_something(place, world):
    assert bites(config.Decode(), place, DECODE[place], world)


@pytest.mark.parametrize("place", QUANT)
def test_a_setting_of_quantising_changes_something(place, world):
    assert bites(config.Quant(), place, QUANT[place], world)


@pytest.mark.parametrize("place", STUDY)
def test_a_setting_of_a_study_changes_something(place, world):
    base = _study() if place in ("base", "match", "seeds", "preset") else test_grid.study(AXES)
    if place == "cells":
        base = dataclasses.replace(base, grid="listed", cells=("gelu+none",))
    assert bites(base, place, (*STUDY[place][:2],), world)


@pytest.mark.parametrize("place", READ)
def test_a_setting_of_a_command_is_read(place):
    assert place in attributes()


@pytest.mark.parametrize("see", [step, rows, start])
def test_what_is_seen_of_the_same_run_is_the_same(see, world):
    assert outcome(see, world.base, world) == see(world.base, world)


def places(kind: type, before: str = "", aspect: str = WHAT) -> Iterator[tuple[str, str]]:
    """Each setting of a part, and whether it says what, how or where."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        of, place = types[field.name], f"{before}{field.name}"
        part = next(iter(typing.get_args(of)), of)  # of tuple[Source, ...] Source
        own = field.metadata.get(ASPECT, aspect)
        if dataclasses.is_dataclass(part):
            yield from places(part, f"{place}.", own)
        else:
            yield place, own


def test_every_setting_is_tried():
    for aspect, tried in RUN.items():
        of_run = {place for place, own in places(config.Run) if own == aspect}
        assert {p for p in of_run if not p.startswith("model.")} == set(tried), aspect
    for kind, name, tried in (
        (config.Decode, "decode", DECODE),
        (config.Quant, "quant", QUANT),
        (schema.Study, "study", STUDY),
    ):
        read = {place.removeprefix(f"{name}.") for place in READ if place.startswith(f"{name}.")}
        assert {field.name for field in dataclasses.fields(kind)} == {*tried} | read, name
        assert not {*tried} & read, name
