"""A study on two hosts, with signals and errors at one of them, in one start of two processes (test_hosts.py).

Takes the flags of experiments.ablate. Each process has two devices, in an order in which the rows of a host lie
apart; process 1 gets the signals, process 0 the error. What they saw is in the workdir: seen-0.json,
seen-1.json. Started alone, as one process with one device, it does the same undisturbed.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import ablate, cli
from llama_jax import config, sharding
from llama_jax.convert import native
from llama_jax.run import hosts, loading, prompt_file, session, warm_start
from llama_jax.study import schema
from llama_jax.train import metrics
from tests.run import apart

ORDER = (0, 2, 1, 3)  # devices 0 and 1 are those of process 0
RUN = "rms+pre-seed0"
PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]


def main() -> int:
    cli.join("any")
    cli.join = lambda _: None  # ablate.main, called several times, finds that they have met
    ablate.make = lambda *_: None
    ablate.write = lambda *_: 0
    cli.tune_for_cpu()
    workdir, seen = Path(flags.FLAGS.workdir), {}
    if jax.process_count() == 1:
        study(RUN)
        answer(workdir)
        begin_again(workdir)
        return 0
    check_rows()
    apart.reorder(ORDER)
    seen["compare"] = refusal(
        lambda: hosts.compare(lambda: {"a": 1, "optim.learning_rate": 0.3 + jax.process_index()})
    )
    seen["together"] = refusal(lambda: hosts.together(fails_at(1)))
    seen["outcome"] = str(hosts.outcome(ValueError("mine") if jax.process_index() else None))

    start = session.start
    session.start = signalled(start)
    study(RUN)  # its first step is done, then it stops
    session.start = start
    checkpoints = workdir / "runs" / RUN / "checkpoints"
    seen["restoring"] = sorted(folder.name for folder in checkpoints.glob("[0-9]*"))

    finish = ablate.finish
    ablate.finish = signalled(finish)
    study("1/4")  # two runs: the first goes on and is scored, the second is not begun
    ablate.finish = finish
    seen["between"] = sorted(folder.name for folder in (workdir / "runs").iterdir())

    add = prompt_file.Partial.add
    prompt_file.Partial.add = signalled(add)
    answer(workdir)
    prompt_file.Partial.add = add
    seen["decoding"] = sorted(file.name for file in workdir.glob("texts*"))
    answer(workdir)

    begin_again(workdir)
    for name, function, value in (("lacks", "is_native", False), ("differs", "identity", "0123")):
        with at_process_1(native, function, value):
            seen[name] = refusal(lambda: begun(workdir, "refused", ("*",)))

    (workdir / f"seen-{jax.process_index()}.json").write_text(json.dumps(seen))
    hosts.agree(True)
    metrics.jsonl, hosts.OUTCOME_SECONDS = full_at(3), 2
    study("rms+pre-seed1")
    return 0


def study(only: str) -> None:
    flags.FLAGS.only = only
    ablate.main()


def answer(workdir: Path) -> None:
    source = workdir / "prompts.jsonl"
    if hosts.first():
        source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    hosts.agree(True)
    decode = config.Decode(max_new_tokens=12, rows=2, temperature=0.0)
    loaded = loading.load(workdir / "runs" / RUN, decode, config.Mesh(fsdp=jax.device_count()))
    prompt_file.run(loaded, source, workdir / "texts.jsonl", None)


def begin_again(workdir: Path) -> None:
    """With the weights of the study's run: all of them trained, and a part."""
    for name, patterns in (("whole", ("*",)), ("part", ("*/attention/*",))):
        with at_process_1(native, "newest", 2):  # it sees an older checkpoint last
            run = begun(workdir, name, patterns)
        folder = workdir / name
        with session.holding(folder, run) as lease, hosts.interrupt() as interrupt:
            prepared = session.prepare_once(run.data, run.model.vocab_size)
            quiet = functools.partial(metrics.Console, quiet=True)
            machine = session.Machine(run)
            session.train(run, folder, lease, machine, prepared, interrupt, quiet)


def begun(workdir: Path, name: str, patterns: tuple[str, ...]) -> config.Run:
    """As experiments.train does it."""
    base = workdir / "runs" / RUN
    run = config.from_dict(json.loads((base / "run.json").read_text()))
    optim = dataclasses.replace(run.optim, train=patterns)
    train = dataclasses.replace(run.train, init_from=str(base))
    run = dataclasses.replace(run, optim=optim, train=train)
    run = warm_start.pinned(run, lambda: warm_start.recorded(workdir / name))
    hosts.compare(lambda: config.flatten(run))
    return run


@contextlib.contextmanager
def at_process_1(module, name: str, value):
    """A function of the module that gives `value` there."""
    own = getattr(module, name)
    if jax.process_index() == 1:
        setattr(module, name, lambda *_: value)
    yield
    setattr(module, name, own)


def signalled(work):
    """`work`, after which process 1 has had a SIGTERM, the first time."""
    numbers = [signal.SIGTERM]

    def both(*args):
        result = work(*args)
        if jax.process_index() == 1 and numbers:
            os.kill(os.getpid(), numbers.pop())
        return result

    return both


def fails_at(process: int):
    def work():
        if jax.process_index() == process:
            raise ValueError("its disk is gone")

    return work


def refusal(work) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def full_at(step: int):
    """metrics.jsonl on a disk that takes the rows before `step`."""

    def jsonl(path, after_step):
        def write(row):
            if row["step"] == step:
                (path.parents[2] / "failed").write_text(str(time.monotonic()))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return write

    return jsonl


def check_rows() -> None:
    """Under each order of devices what a host loads is put where it belongs."""
    for order in itertools.permutations(range(4)):
        for mesh in (config.Mesh(fsdp=4), config.Mesh(fsdp=2, context=2)):
            layout = sharding.make(mesh, [jax.devices()[i] for i in order])
            rows_BT = np.arange(24).reshape(8, 3)
            batch_BT = layout.put(rows_BT[layout.host_rows(8)], "BT", 8)
            for shard in batch_BT.addressable_shards:
                np.testing.assert_array_equal(shard.data, rows_BT[shard.index])


if __name__ == "__main__":
    cli.run(main, RuntimeError, settings=schema.settings())
