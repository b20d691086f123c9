"""Train a network: `python -m experiments.train --config=configs/7b.py --workdir=DIR`.

Started again with the same command, a run goes on from its last checkpoint. SIGINT and SIGTERM save and
exit 0. On a slice of several hosts the command runs on each of them (hosts.py), and the first one writes.
What a run writes into its workdir: run.json (the config), tokenizer.model, checkpoints/, metrics.jsonl,
tensorboard/, loss.png, runcard.json and .md, audit.jsonl when asked.
"""

import functools
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, hosts, provenance
from llama_jax import config, sharding, tree
from llama_jax.analysis import baseline, flops, hardware, memory, runcard
from llama_jax.convert import native
from llama_jax.data import iterator, mixture, prepare
from llama_jax.decode import generate
from llama_jax.train import checkpoint, loop, metrics
from llama_jax.train import program as programs
from llama_jax.train import state as train_state

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps everything it writes.", required=True
)

BASELINE_TOKENS = 10_000_000  # the counting models see at most so many training tokens
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 24, 64, 0.8


def main() -> int:
    run = cli.frozen(CONFIG)
    hosts.join(run.mesh.hardware)
    cli.tune_for_cpu()
    check_hardware(run)
    workdir = Path(WORKDIR.value).expanduser().absolute()
    hosts.together(lambda: claim(workdir, run))
    if jax.process_count() > 1:
        check_shared(workdir)
    jax.config.update("jax_compilation_cache_dir", str(Path(run.data.cache).expanduser() / "xla"))

    program = programs.build(run, sharding.make(run.mesh, jax.devices()))
    kind = jax.devices()[0].device_kind
    memory.check(memory.need(run, program.state, kind), memory.available(jax.devices()))
    parameters = tree.count(program.state.params)
    print(f"{parameters:,} parameters on {jax.device_count()} x {kind}")

    prepared = prepare_once(run)
    if prepared.tokenizer_config.path and hosts.first():
        shutil.copyfile(prepared.tokenizer_config.path, workdir / native.TOKENIZER)
    record = {"provenance": provenance.describe(prepared), "run": config.to_dict(run)}
    with loop.Interrupt() as interrupt:
        code = train(run, workdir, program, prepared, record, interrupt)
    hosts.agree(True)  # the others wait while the first one writes the results
    return code


def train(run, workdir, program, prepared, record, interrupt) -> int:
    module, layout = program.module, program.module.layout
    checkpoints = checkpoint.Checkpoints(workdir, run.checkpoint)
    state, seconds = start(run, program, checkpoints, prepared)
    first = int(state.step)

    rates = figures(run, module)
    console = metrics.Console(first, run.train.steps, quiet=not hosts.first())
    writers, audit = [], None
    if hosts.first():
        writers.append(metrics.jsonl(workdir / "metrics.jsonl", first))
        if run.log.tensorboard == "on":
            writers.append(metrics.tensorboard(workdir / "tensorboard", first))
        if run.log.wandb == "on":
            writers.append(metrics.wandb(workdir, record["run"]))
        if run.log.audit == "on":
            audit = metrics.jsonl(workdir / "audit.jsonl", first)
    recorder = loop.Recorder(run, rates, writers, console, seconds)

    evaluate = functools.partial(
        validation, jax.jit(program.objective), run, prepared, layout, interrupt=interrupt
    )

    def save(done: int, state: Any, seconds: float) -> None:
        checkpoints.save(done, state, {**record, "next_step": done, "seconds": seconds})

    try:
        if first < run.train.steps:
            batches = iterator.train(run, prepared, layout, first)
            options = hardware.compiler_options(jax.devices()[0].device_kind)
            advance = program.step.lower(program.state, program.batch).compile(options)
            recorder.pause()
            state, done = loop.run(
                run, state, advance, batches, evaluate=evaluate, save=save,
                recorder=recorder, interrupt=interrupt, audit=audit,
            )  # fmt: skip
            checkpoints.wait()
        elif hosts.first_says((workdir / "runcard.json").exists()):
            print(f"already trained to step {first}: {workdir / 'runcard.md'} has the results")
            return 0
        else:
            done = first
    finally:
        console.close()
    if done < run.train.steps:
        saved = f"saved step {done} of {run.train.steps} in {checkpoints.folder}"
        print(
            f"{interrupt.signal}: {saved if done else 'nothing was trained yet'}; "
            f"run the same command to go on:\n  {command()}"
        )
        return 0
    interrupt.signal = ""  # whatever cut the last evaluation short, the results are wanted now
    finish(run, workdir, module, state, prepared, record, rates, recorder.seconds, evaluate)
    return 0


def check_hardware(run: config.Run) -> None:
    """ValueError unless the devices are those of the slice that the page was laid out for, if it was."""
    if run.mesh.hardware == "any":
        return
    wanted = hardware.find_slice(run.mesh.hardware, "mesh.hardware")
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if (hardware.find(kind), count) != (hardware.DEVICES[wanted.device], wanted.devices):
        spread = "1 host" if wanted.hosts == 1 else f"{wanted.hosts} hosts"
        raise ValueError(
            f"this run is laid out for {run.mesh.hardware}: {wanted.devices} x {wanted.device} on {spread}; "
            f"here is {count} x {kind}: start the command on every host of the slice, or leave the slice "
            "out of --config"
        )


def claim(workdir: Path, run: config.Run) -> None:
    """Make the workdir this run's. ValueError if it is another's, or cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable_{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    path = workdir / "run.json"
    trained = any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*"))
    if trained and path.exists():
        differing = config.diff(config.from_dict(json.loads(path.read_text())), run, essential=True)
        if differing:
            raise ValueError(
                f"--workdir={workdir} holds another run; it differs in\n  "
                + "\n  ".join(differing)
                + "\ngive a new --workdir, or the settings of the run that is there"
            )
    if hosts.first():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(config.to_dict(run), indent=2) + "\n")
        temporary.replace(path)


def check_shared(workdir: Path) -> None:
    """ValueError on every host unless the first one's files are seen by all."""
    mark = workdir / f".shared_{hosts.first_says(time.time_ns() % 2**31)}"
    if hosts.first():
        mark.touch()
    hosts.agree(True)  # it is there now
    seen = hosts.agree(mark.exists())
    if hosts.first():
        mark.unlink()
    if not seen:
        raise ValueError(
            f"--workdir={workdir} is not the same folder on all {jax.process_count()} hosts; checkpoints "
            "need one that all of them see: a mounted bucket or a network file system"
        )


def prepare_once(run: config.Run) -> prepare.Prepared:
    """The text, prepared by the first host and read by the others, who prepare it again where the cache
    is a folder of their own."""
    work = lambda: prepare.prepare(run.data, run.model.vocab_size)  # noqa: E731
    prepared = hosts.together(work if hosts.first() else lambda: None)
    return hosts.together((lambda: prepared) if hosts.first() else work)


def start(run, program, checkpoints, prepared) -> tuple[Any, float]:
    """The newest checkpoint, or a fresh state; and the seconds of training behind it."""
    restored = checkpoints.latest(program.state)
    if restored is None:
        module = program.module
        return train_state.init(module, program.tx, module.layout, run.train.seed), 0.0
    trained_on = restored.record["provenance"]["data"]
    if trained_on != prepared.fingerprint:
        raise ValueError(
            f"the text has changed: the checkpoint was trained on data {trained_on}, now it is "
            f"{prepared.fingerprint}; give a new --workdir, or bring the old text back"
        )
    print(f"resuming at step {restored.record['next_step']} from {checkpoints.folder}")
    return restored.state, restored.record["seconds"]


def figures(run: config.Run, module) -> loop.Rates:
    devices = jax.devices()
    peak = run.log.peak_tflops or hardware.find(devices[0].device_kind).bf16_tflops
    return loop.Rates(flops.per_token(module, run.data.seq_len), peak * 1e12 * len(devices))


def validation(evaluate, run, prepared, layout, params, *, interrupt) -> dict[str, float]:
    """Loss on held-out rows, nats a token and bits a byte; nothing if interrupted."""
    total = None
    for batch in iterator.validation(run, prepared, layout):
        if interrupt.signal:
            return {}
        sums = evaluate(params, batch)
        total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
    nats = float(total.nll / total.weight)
    return {"validation_loss": nats, "validation_bits_per_byte": bits_per_byte(nats, prepared)}


def bits_per_byte(nats: float, prepared) -> float:
    return nats / math.log(2) * prepared.validation_tokens / prepared.validation_bytes


def baselines(run: config.Run, prepared) -> dict[str, float]:
    """Unigram and bigram counts of the training rows, scored on the validation rows."""
    rows = max(BASELINE_TOKENS // run.data.seq_len, 1)
    train = np.concatenate([tokens[:-1] for tokens in mixture.first_rows(run.data, prepared, rows)])
    held_out = np.stack(mixture.validation_rows(prepared, run.eval.rows))
    contexts, targets = held_out[:, :-1].ravel(), held_out[:, 1:].ravel()
    size = run.model.vocab_size
    return {
        "unigram": baseline.unigram(train, targets, size),
        "bigram": baseline.bigram(train, contexts, targets, size),
    }


def finish(run, workdir, module, state, prepared, record, rates, seconds, evaluate) -> None:
    """What is left when the last step is done: plot, run card, a look at what the network writes."""
    rows = metrics.read(workdir / "metrics.jsonl") if hosts.first() else [{}]
    last = rows[-1]
    if hosts.first_says("validation_loss" not in last):
        last |= evaluate(state.params)
    prompt = mixture.validation_rows(prepared, 1)[0][:SAMPLE_PROMPT].tolist()
    tokens = generate.continue_text(
        module, state.params, prompt, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0
    )
    if not hosts.first():
        return
    from llama_jax.analysis import plots  # matplotlib is slow to import

    counted = baselines(run, prepared)
    results = {name: last[name] for name in ("validation_loss", "validation_bits_per_byte")}
    results |= {f"{name}_loss": nats for name, nats in counted.items()}
    parameters = tree.count(state.params)
    plots.loss(rows, counted, workdir / "loss.png", f"{workdir.name}: {parameters:,} parameters")
    device = hardware.find(jax.devices()[0].device_kind)
    card = runcard.make(
        run,
        command=command(),
        provenance=record["provenance"],
        device_kind=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        watts=run.log.watts_per_chip or device.watts,
        parameters=parameters,
        steps=int(state.step),
        flops_per_token=rates.flops_per_token,
        peak_flops=rates.peak_flops,
        seconds=seconds,
        epochs=mixture.epochs(prepared, int(state.step) * run.train.batch_size),
        results=results,
    )
    runcard.write(card, workdir)

    decode = prepared.tokenizer.decode
    print(f"\na sample at temperature {SAMPLE_TEMPERATURE}, from the first held-out row")
    print("  prompt:       " + indent(decode(prompt)))
    print("  continuation: " + indent(decode(tokens[len(prompt) :])))
    print(f"\n{'':14}nats/token  bits/byte")
    for name, nats in {"validation": last["validation_loss"], **counted}.items():
        print(f"{name:14}{nats:10.4f}{bits_per_byte(nats, prepared):11.4f}")
    print(f"\n{seconds:.0f} s of training; written to {workdir}:")
    for name in ("checkpoints", "metrics.jsonl", "loss.png", "runcard.md", "runcard.json"):
        print(f"  {workdir / name}")


def indent(text: str) -> str:
    return text.replace("\n", "\n" + " " * 16)


def command() -> str:
    return shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])


if __name__ == "__main__":
    cli.run(main, loop.Anomaly, checkpoint.SaveError, RuntimeError)
