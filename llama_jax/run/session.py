"""One run in its workdir: started or gone on with, trained, recorded.

A workdir holds run.json (the config), tokenizer.model, checkpoints/, metrics.jsonl, tensorboard/, audit.jsonl
when asked, and at the end runcard.json and runcard.md; lease.json while a process trains in it (lease.py);
tokenizer_additions.json and huggingface/ where it began with a model that had them. On several hosts the
first one writes.
"""

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import config, files, sharding, tree
from llama_jax.analysis import flops, hardware, memory, runcard
from llama_jax.convert import native
from llama_jax.data import iterator, mixture, prepare
from llama_jax.interrupt import Interrupt
from llama_jax.run import hosts, provenance, warm_start
from llama_jax.run.lease import Held, Lease
from llama_jax.tokenizer import in_folder
from llama_jax.tokenizer.added import NONE
from llama_jax.train import checkpoint, loop, metrics, optim
from llama_jax.train import program as programs
from llama_jax.train import state as train_state


class Machine:
    """The program of a run on the devices that are here, compiled when it is first used.

    Seeds are not in it: runs that differ in them alone may share one.
    """

    def __init__(self, run: config.Run):
        """ValueError if the run does not fit onto the devices, or into their memory."""
        devices = jax.devices()
        self.kind = devices[0].device_kind
        layout = sharding.make(run.mesh, devices)
        self.program = programs.build(run, layout)
        need = memory.need(run, layout, self.program.state, self.kind, self.program.frozen)
        memory.check(need, memory.available(devices))

    @functools.cached_property
    def advance(self) -> Any:
        """(state, frozen, batch) -> (state, metrics)"""
        program, options = self.program, hardware.compiler_options(self.kind)
        return program.step.lower(program.state, program.frozen, program.batch).compile(options)

    @functools.cached_property
    def evaluate(self) -> Any:
        """(trained, frozen, batch) -> Sums"""
        return jax.jit(self.program.objective.sums)


@contextlib.contextmanager
def holding(workdir: Path, run: config.Run) -> Iterator[Lease]:
    """The workdir is this run's and no other process's meanwhile.

    Held, on every host, while another process trains in it. ValueError if it is another run's, or cannot
    be written.
    """
    lease = Lease(workdir)
    try:
        hosts.together(lambda: check_writable(workdir))
        _ask_first(lease.take)
        hosts.together(lambda: check_same(workdir, run))
        yield lease
    finally:
        lease.release()


def _ask_first(refusal: Callable[[], str]) -> None:
    """Held on every host if the first one's answer is a reason."""
    why = hosts.together(refusal if hosts.first() else lambda: "")
    if hosts.first_says(bool(why)):
        raise Held(why or "the first host says why this run cannot go on")


def check_writable(workdir: Path) -> None:
    """ValueError unless the workdir, made if it is not there, can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable_{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


def check_same(workdir: Path, run: config.Run) -> None:
    """ValueError if the workdir is another run's.

    More steps, and another end of the schedule, are the same run where no step that was made would have
    had another learning rate. Without run.json nothing is compared: a new run may begin from checkpoints that
    were taken into its workdir.
    """
    path, steps = workdir / "run.json", files.committed(workdir / "checkpoints")
    if not steps or not path.exists():
        return
    old = config.from_dict(json.loads(path.read_text()))
    differing = config.diff(old, run, essential=True)
    if any(line.partition(":")[0] not in AHEAD for line in differing):
        raise another(workdir, "run", differing)
    if differing:
        check_schedule(workdir, old, run, steps, ", ".join(differing))


# Settings that are read by the schedule alone, and that some schedules read late.
AHEAD = ("train.steps", "optim.schedule", "optim.final_fraction", "optim.decay_fraction")


def check_schedule(
    workdir: Path, old: config.Run, new: config.Run, steps: list[int], changes: str
) -> None:
    """ValueError unless the steps up to the newest checkpoint have the learning rates that they had."""
    reached = steps[-1]
    if new.train.steps < reached:
        raise ValueError(
            f"--workdir={workdir} is at step {reached} already, beyond train.steps={new.train.steps}; "
            "give a new --workdir, or more steps"
        )
    was, would = (optim.rates(run.optim, run.train.steps, reached) for run in (old, new))
    (others,) = np.nonzero(was != would)
    if not others.size:
        return
    first = int(others[0])
    before = [step for step in steps if step <= first]
    way = (
        f"; or move the checkpoints after {before[-1]} out of {workdir / 'checkpoints'}, to go on from there"
        if before
        else ""
    )
    raise ValueError(
        f"--workdir={workdir} is at step {reached}, and with {changes} step {first + 1} would have had the "
        f"learning rate {would[first]:.4g} instead of {was[first]:.4g}: optim.schedule="
        f"{new.optim.schedule!r} looks ahead. A run can be given more steps with 'inverse_sqrt', and with "
        "'wsd' before its decay begins; give a new --workdir, or the settings of the run that is there"
        f"{way}"
    )


def another(workdir: Path, what: str, differing: list[str]) -> ValueError:
    return ValueError(
        f"--workdir={workdir} holds another {what}; it differs in\n  "
        + "\n  ".join(differing)
        + f"\ngive a new --workdir, or the settings of the {what} that is there"
    )


def check_shared(workdir: Path) -> None:
    """ValueError on every host unless the first one's files are seen by all."""
    if not hosts.agree(sees_the_firsts(workdir)):
        raise ValueError(
            f"--workdir={workdir} is not the same folder on all {jax.process_count()} hosts; checkpoints "
            "need one that all of them see: a mounted bucket or a network file system"
        )


def sees_the_firsts(folder: Path) -> bool:
    """Whether this host sees what the first one writes into a folder. All must call it."""
    mark = folder / f".shared_{hosts.first_says(time.time_ns() % 2**31)}"
    if hosts.first():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    hosts.agree(True)  # it is there now
    seen = mark.exists()
    hosts.agree(True)  # all have looked
    if hosts.first():
        mark.unlink(missing_ok=True)
    return seen


def prepare_once(data: config.Data, vocab_size: int) -> prepare.Prepared:
    """The text, prepared by the first host and read by those that see its cache. Hosts with a cache of their
    own prepare it at the same time. ValueError unless all come to the same rows in the same order."""
    work = lambda: prepare.prepare(data, vocab_size)  # noqa: E731
    if jax.process_count() == 1:
        return work()
    reads = sees_the_firsts(Path(data.cache).expanduser()) and not hosts.first()
    own = hosts.together((lambda: None) if reads else work)
    prepared = hosts.together(lambda: own or work())
    hosts.compare(
        lambda: {
            **{f"text of data.sources.{of.name}": of.store.meta.text for of in prepared.sources},
            "tokenizer": prepared.tokenizer.fingerprint,
            "rows": prepared.fingerprint,
            "order of the rows": mixture.fingerprint(data, prepared),
        }
    )
    return prepared


class RunResult(NamedTuple):
    """What a run has come to."""

    state: Any
    params: Any  # the module's, frozen ones included
    rows: list[metrics.Row]  # of metrics.jsonl
    results: dict[str, float]  # of the last evaluation
    tokens: float  # trained on
    seconds: float  # of training
    seconds_here: float  # of these, in this session
    rates: loop.FlopRates
    first: int  # step, of this session
    interrupted: str = ""  # by the signal of that name, before the last step


def train(
    run: config.Run,
    workdir: Path,
    lease: Lease,
    machine: Machine,
    prepared: prepare.Prepared,
    interrupt: Interrupt,
    make_console: Callable[[int, int], metrics.Console],
) -> RunResult:
    """Train to the last step, from the newest checkpoint if there is one, in a workdir that is held.

    make_console(first, steps) shows how far it is.
    """
    program, layout = machine.program, machine.program.module.layout
    record = {
        "provenance": provenance.describe(prepared),
        "order": mixture.fingerprint(run.data, prepared),
        "run": config.to_dict(run),
    }
    _ask_first(lease.confirm)
    checkpoints = checkpoint.Checkpoints(workdir, run.checkpoint)
    if hosts.first() and (left := checkpoints.clean()):
        print(f"removed what interrupted saves left in {checkpoints.folder}: {', '.join(left)}")
    frozen = {}
    if program.frozen:
        frozen = hosts.together(lambda: warm_start.weights(run, program, trained=False))
    state, before = start(run, program, checkpoints, prepared, record["order"])
    first = int(state.step)
    hosts.together(lambda: describe(workdir, run, prepared, first == 0) if hosts.first() else None)

    console = make_console(first, run.train.steps)
    writers, boards, audit = [], [], None
    if hosts.first():
        writers = [lambda _: lease.check(), metrics.jsonl(workdir / "metrics.jsonl", first)]
        if run.log.tensorboard == "on":
            boards.append(metrics.tensorboard(workdir / "tensorboard", first))
        if run.log.wandb == "on":
            boards.append(metrics.wandb(workdir, record["run"]))
        if run.log.audit == "on":
            audit = metrics.jsonl(workdir / "audit.jsonl", first)
    rates = figures(run, program)
    recorder = loop.Recorder(run, rates, writers + boards, console, before)
    per_token = iterator.bytes_per_token(run, prepared)
    sums = lambda trained, batch: machine.evaluate(trained, frozen, batch)  # noqa: E731
    evaluate = functools.partial(validation, sums, run, prepared, layout, per_token)

    def save(done: int, state: Any) -> None:
        lease.check()
        checkpoints.save(done, state, {**record, "next_step": done, **_kept(recorder.progress)})

    def complete(step: int, params: Any, stopped: Callable[[], bool]) -> metrics.Row:
        """The row of a step, with the evaluation that a signal cut off, which is also written."""
        row = row_of(workdir, step)
        if hosts.first_says("validation_loss" in row):
            return row
        results = evaluate(stopped, params)
        if row and results:
            metrics.jsonl(workdir / "metrics.jsonl", step - 1)(row | results)
            for write in boards:
                write({"step": step, **results})
        return row | results

    done = first
    try:
        if first < run.train.steps:
            if hosts.first():
                runcard.retire(workdir)
            cut = first % run.eval.every == 0 and bool(row_of(workdir, first))
            if hosts.first_says(cut):
                complete(first, state.params, interrupt.due)
            batches = iterator.train(run, prepared, layout, first)
            advance = lambda state, batch: machine.advance(state, frozen, batch)  # noqa: E731
            recorder.pause()
            state, done = loop.run(
                run, state, advance, lambda step, state: next(batches),
                evaluate=functools.partial(evaluate, interrupt.due), save=save, recorder=recorder,
                interrupt=interrupt, audit=audit,
            )  # fmt: skip
        checkpoints.wait()
    except Exception:
        # A checkpoint that is being written is finished first: it may be minutes of work, or the only one.
        with contextlib.suppress(checkpoint.SaveError):
            checkpoints.wait()
        raise
    finally:
        console.close()
    results = {}
    if done == run.train.steps:
        # Whatever cut the last evaluation short, the results are wanted now.
        last = complete(done, state.params, lambda: False)
        results = {name: value for name, value in last.items() if name.startswith("validation_")}
    rows = metrics.read(workdir / "metrics.jsonl") if hosts.first() else []
    spent = (recorder.seconds, recorder.seconds - before.seconds)
    ended = "" if done == run.train.steps else interrupt.signal
    params = program.objective.params(state.params, frozen)
    return RunResult(state, params, rows, results, recorder.tokens, *spent, rates, first, ended)


def row_of(workdir: Path, step: int) -> metrics.Row:
    """What metrics.jsonl says of a step; empty if nothing, and on all hosts but the first."""
    rows = metrics.read(workdir / "metrics.jsonl") if hosts.first() else []
    return next((row for row in rows if row["step"] == step), {})


def describe(workdir: Path, run: config.Run, prepared: prepare.Prepared, begins: bool) -> None:
    """Write what says how to read the run's checkpoints: its settings, its tokenizer, and, when it begins
    with a model that came with Hugging Face's small files, these."""
    files.write(workdir / "run.json", json.dumps(config.to_dict(run), indent=2) + "\n")
    if path := prepared.tokenizer_config.path:
        files.write(workdir / native.TOKENIZER, Path(path).read_bytes())
    if prepared.additions == NONE:
        (workdir / in_folder.ADDITIONS).unlink(missing_ok=True)
    else:
        said = json.dumps(in_folder.to_dict(prepared.additions), indent=2) + "\n"
        files.write(workdir / in_folder.ADDITIONS, said)
    if begins and run.train.init_from:
        shutil.rmtree(workdir / native.CARRIED, ignore_errors=True)  # of a start from another model
        for name, content in native.carried_files(Path(run.train.init_from)).items():
            (workdir / native.CARRIED).mkdir(exist_ok=True)
            files.write(workdir / native.CARRIED / name, content)


def start(
    run: config.Run,
    program: programs.Program,
    checkpoints: checkpoint.Checkpoints,
    prepared: prepare.Prepared,
    order: str,
) -> tuple[Any, loop.Progress]:
    """The state of the newest checkpoint, or a fresh one, and the totals up to it."""
    restored = checkpoints.latest(program.state)
    if restored is None:
        layout = program.module.layout
        if run.train.init_from:
            hosts.together(lambda: warm_start.check(run, program, prepared))
            trained = hosts.together(lambda: warm_start.weights(run, program, trained=True))
            state = train_state.begin(program.objective, program.tx, layout, trained)
        else:
            state = train_state.init(program.objective, program.tx, layout, run.train.seed)
        return state, loop.Progress()
    trained_on = restored.record["provenance"]["data"]
    if trained_on != prepared.fingerprint:
        raise ValueError(
            f"the text has changed: the checkpoint was trained on data {trained_on}, now it is "
            f"{prepared.fingerprint}; give a new --workdir, or bring the old text back"
        )
    if restored.record.get("order") != order:  # absent in checkpoints of older code
        raise ValueError(
            "the order of the rows has changed since the checkpoint was written: this is other code or "
            f"another version of grain (it was {restored.record['provenance']['code']}; "
            f"{restored.record['provenance']['packages']}); go on with those, or give a new --workdir"
        )
    print(f"resuming at step {restored.record['next_step']} from {checkpoints.folder}")
    return restored.state, _progress(run, restored.record)


SINCE_ROW = "_since_row"  # ends the names of these means in a checkpoint's record


def _kept(progress: loop.Progress) -> dict[str, Any]:
    means = {name + SINCE_ROW: mean for name, mean in progress.means.items()}
    return {"seconds": progress.seconds, "tokens": progress.tokens, **means}


def _progress(run: config.Run, record: dict[str, Any]) -> loop.Progress:
    """The inverse of `_kept`. Records of older code have no count of tokens: all batches were full."""
    kept = {name: value for name, value in record.items() if name.endswith(SINCE_ROW)}
    means = {name.removesuffix(SINCE_ROW): loop.Mean(*value) for name, value in kept.items()}
    tokens = record.get("tokens", record["next_step"] * run.tokens_per_step)
    return loop.Progress(record["seconds"], tokens, means)


def figures(run: config.Run, program: programs.Program) -> loop.FlopRates:
    devices = jax.devices()
    peak = run.log.peak_tflops or hardware.find(devices[0].device_kind).bf16_tflops
    a_token = flops.per_token(program.module, run.data.seq_len, tree.paths(program.frozen))
    return loop.FlopRates(a_token, peak * 1e12 * len(devices))


def validation(
    evaluate: Callable[[Any, Any], Any],
    run: config.Run,
    prepared: prepare.Prepared,
    layout: sharding.Layout,
    bytes_per_token: dict[str, float],
    stopped: Callable[[], bool],
    params: Any,
) -> dict[str, float]:
    """Loss on held-out rows, nats a token, bits a byte, and the objective's other means.

    Nothing if `stopped()`, asked at each batch.
    """
    sums: dict[str, list[Any]] = {}
    for source, batch in iterator.validation(run, prepared, layout):
        if stopped():
            return {}
        sums.setdefault(source, []).append(evaluate(params, batch).reported)
    means: dict[str, dict[str, float]] = {}  # name -> source -> mean over that source's rows
    for source, batches in jax.device_get(sums).items():
        for name in batches[0]:
            pairs = zip(*(reported[name] for reported in batches), strict=True)
            total, weight = (sum(map(float, column)) for column in pairs)
            means.setdefault(name, {})[source] = total / (weight or 1.0)
    values = measured("validation", means.pop("loss"), bytes_per_token)
    for name, of in means.items():
        values |= _over_sources(f"validation_{name}", of)
    return values


def measured(
    name: str, nats: dict[str, float], bytes_per_token: dict[str, float]
) -> dict[str, float]:
    """NAME_loss, nats a token, and NAME_bits_per_byte of a model, from its nats in each source."""
    bits = {source: of / math.log(2) / bytes_per_token[source] for source, of in nats.items()}
    return _over_sources(f"{name}_loss", nats) | _over_sources(f"{name}_bits_per_byte", bits)


def _over_sources(name: str, of: dict[str, float]) -> dict[str, float]:
    """The mean over the sources; where there are several, NAME/SOURCE is of one."""
    each = {f"{name}/{source}": value for source, value in of.items()} if len(of) > 1 else {}
    return {name: sum(of.values()) / len(of), **each}


def card(
    run: config.Run,
    result: RunResult,
    prepared: prepare.Prepared,
    command: str,
    more: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The run card of a finished run; `more` results beside its own."""
    device = hardware.find(jax.devices()[0].device_kind)
    steps = int(result.state.step)
    return runcard.make(
        run,
        command=command,
        provenance=provenance.describe(prepared),
        device_kind=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        watts=run.log.watts_per_chip or device.watts,
        parameters=tree.count(result.params),
        steps=steps,
        tokens=round(result.tokens),
        flops_per_token=result.rates.flops_per_token,
        peak_flops=result.rates.peak_flops,
        seconds=result.seconds,
        epochs=mixture.epochs(prepared, steps * run.train.batch_size),
        results=result.results | (more or {}),
    )
