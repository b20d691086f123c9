"""Rent a slice, start a run on all its hosts, watch it, rent it again when it is taken away.

    python -m experiments.launch --tpu=NAME --zone=ZONE --config=configs/7b.py:v4_32 \\
        --workdir='~/bucket/7b' --bucket=BUCKET --spot

prints the commands, and with --go runs them. Interrupted, or started again, it finds the slice and goes on
watching. A page on a GPU node (`configs/7b.py:h100_8`) gives a SLURM job instead; --go submits it.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # launching touches no device

from absl import flags

from experiments import cli, cloud, provenance
from llama_jax import config
from llama_jax.analysis import hardware
from llama_jax.plan import figures

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps everything, as seen by every host.", required=True
)
TPU = flags.DEFINE_string("tpu", "", "Name of the slice to rent.")
ZONE = flags.DEFINE_string("zone", "", "Zone of the cloud that has it.")
PROJECT = flags.DEFINE_string("project", "", "Project that pays; gcloud's own setting if left out.")
SPOT = flags.DEFINE_bool("spot", False, "Cheaper, and may be taken away at any time.")
DIRECT = flags.DEFINE_bool("direct", False, "At once or not at all, not from the queue.")
BUCKET = flags.DEFINE_string("bucket", "", "Bucket to mount at ~/bucket on every host.")
SECRETS = flags.DEFINE_list(
    "secrets", [], "Environment variables to hand over, as WANDB_API_KEY; never printed."
)
TIME = flags.DEFINE_string("time", "24:00:00", "SLURM: the longest that a job may take.")
PARTITION = flags.DEFINE_string("partition", "", "SLURM: where to queue.")
ACCOUNT = flags.DEFINE_string("account", "", "SLURM: who pays.")
POLL = flags.DEFINE_float("poll", 60.0, "Seconds between two looks at a run.")
GO = flags.DEFINE_bool("go", False, "Run the commands instead of printing them.")


class LaunchError(Exception):
    """A command failed, or the run did."""


def main() -> int:
    run = cli.frozen(CONFIG)
    name = run.mesh.hardware
    if name == "any":
        raise ValueError(
            "launching needs a slice, as in --config=configs/7b.py:v4_32; there are "
            + ", ".join(hardware.SLICES)
        )
    check_fit(run, name)
    slice_ = hardware.SLICES[name]
    if slice_.device in cloud.IMAGES:
        return on_tpu(slice_)
    return on_slurm(slice_)


def check_fit(run: config.Run, name: str) -> None:
    """ValueError, before anything costs money, if the formulas say that it does not fit."""
    plan = figures.plan(run, name, compile=False)
    if not plan.fits:
        raise ValueError(
            f"this run needs {plan.hbm_gib_per_chip:.1f} GiB a chip and {name} has {plan.hbm_limit_gib:g}; "
            "python -m experiments.plan --suggest says what fits"
        )


def on_slurm(slice_: hardware.Slice) -> int:
    if TPU.value or ZONE.value:
        raise ValueError(f"--tpu and --zone have no effect on {slice_.accelerator}: SLURM runs it")
    name = Path(WORKDIR.value).name
    script = cloud.sbatch(
        name, slice_.devices, arguments(), WORKDIR.value, time=TIME.value, partition=PARTITION.value,
        account=ACCOUNT.value,
    )  # fmt: skip
    if not GO.value:
        print(script, end="")
        return 0
    done = subprocess.run(["sbatch"], input=script, text=True, check=False)
    return done.returncode


def on_tpu(slice_: hardware.Slice) -> int:
    if not TPU.value or not ZONE.value:
        raise ValueError(
            f"--tpu={TPU.value!r} --zone={ZONE.value!r}: a TPU slice needs both a name and a zone"
        )
    if slice_.slices > 1 and DIRECT.value:
        raise ValueError(
            "--direct rents one slice; joined slices come from the queue: leave --direct out"
        )
    missing = [secret for secret in SECRETS.value if secret not in os.environ]
    if missing:
        raise ValueError(f"--secrets={','.join(missing)}: not set in this environment")
    rental = cloud.Rental(TPU.value, ZONE.value, slice_, PROJECT.value, SPOT.value, DIRECT.value)
    if not GO.value:
        print("\n".join(described(rental)))
        return 0
    try:
        return drive(rental)
    except KeyboardInterrupt:
        say(f"not watching any more; the slice stays rented and the run goes on. To give it back:\n  "
            f"{shlex.join(rental.delete())}")  # fmt: skip
        return 130


def described(rental: cloud.Rental) -> list[str]:
    """What --go would do, as a script to read."""
    archive = "llama_jax.tgz"
    code = [cloud.pack(archive), *copies(rental, archive, "SECRETS")]
    lost = ", ".join(sorted(cloud.GONE))
    steps = [
        ("rent the slice", [rental.create()]),
        ("wait until this prints ACTIVE (READY with --direct)", [rental.state()]),
        ("the code, to every host", code),
        ("set every host up", rental.run(cloud.set_up(BUCKET.value))),
        ("start on every host; one alone gives up after a minute, with the reason",
         rental.run(training())),
        ("watch: the exit code or -, then the end of the log", [rental.ask(cloud.look(1))]),
        (f"when it is taken away ({lost}): this, then from the start; the run resumes",
         [rental.delete()]),
    ]  # fmt: skip
    lines = ["#!/bin/sh"]
    for number, (what, commands) in enumerate(steps, 1):
        joined = (one if isinstance(one, str) else shlex.join(one) for one in commands)
        lines += [f"# {number}. {what}", *joined]
    return [redacted(line) for line in lines]


def drive(rental: cloud.Rental) -> int:
    """Rent, fill, start, watch; again whenever the slice is taken away. The run's exit code."""
    while True:
        if not bring(rental):
            continue
        seen = look(rental, 1)
        if not seen or seen[0] != "-" or not seen[1]:  # nothing was started here, or it has ended
            fill(rental)
        code = watch(rental)
        if code is not None:
            say(f"the slice is still rented; to give it back:\n  {shlex.join(rental.delete())}")
            return code


def bring(rental: cloud.Rental) -> bool:
    """Wait for the slice, renting it if need be; False if it was lost and has been given back."""
    state = state_of(rental)
    if not state:
        say(f"renting {rental.name}: {rental.slice_.accelerator} in {rental.zone}")
        call(rental.create())
    said = ""
    while (state := state_of(rental)) not in cloud.READY:
        if state in cloud.GONE:
            say(f"{rental.name} is {state}: giving it back, renting again")
            call(rental.delete())
            return False
        if state != said:
            say(f"{rental.name} is {state or 'not there yet'}; waiting")
            said = state
        time.sleep(POLL.value)
    return True


def fill(rental: cloud.Rental) -> None:
    say("copying the code, setting the hosts up, starting the run")
    with tempfile.TemporaryDirectory() as folder:
        archive, secrets = f"{folder}/llama_jax.tgz", f"{folder}/secrets"
        call(["bash", "-o", "pipefail", "-c", cloud.pack(archive)])
        Path(secrets).touch(mode=0o600)
        lines = (f"{name}={shlex.quote(os.environ[name])}\n" for name in SECRETS.value)
        Path(secrets).write_text("".join(lines))
        for command in copies(rental, archive, secrets):
            call(command)
    for command in (*rental.run(cloud.set_up(BUCKET.value)), *rental.run(training())):
        call(command)


def watch(rental: cloud.Rental) -> int | None:
    """Until the run ends: its exit code; None if the slice is gone before."""
    said = ""
    while (state := state_of(rental)) in cloud.READY:
        seen = look(rental, 1)
        if seen and seen[0] != "-":
            tail = look(rental, 20) or seen
            say(f"the run ended with exit code {seen[0]}; the end of its log:\n{tail[1]}")
            return int(seen[0])
        if seen and seen[1] != said:
            said = seen[1]
            print(said, flush=True)
        time.sleep(POLL.value)
    say(f"{rental.name} is {state or 'gone'}")
    return None


def look(rental: cloud.Rental, lines: int) -> tuple[str, str] | None:
    """(exit code or -, end of the log) of the first host; None if it cannot be asked."""
    done = subprocess.run(
        rental.ask(cloud.look(lines)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    code, _, log = done.stdout.partition("\n")
    return code.strip(), log.strip()


def state_of(rental: cloud.Rental) -> str:
    """A word; "" if there is no such slice."""
    done = subprocess.run(rental.state(), capture_output=True, text=True, check=False)
    if done.returncode and "NOT_FOUND" not in done.stderr:
        raise LaunchError(f"{shlex.join(rental.state())}\n{done.stderr.strip()}")
    return done.stdout.strip()


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(redacted(f"{shlex.join(command)}\n{done.stderr.strip()}"))


def training() -> str:
    return cloud.start(arguments(), provenance.code(), bool(SECRETS.value))


def arguments() -> list[str]:
    """What of this command line is the run's."""
    theirs = [word for word in sys.argv[1:] if word.startswith("--config")]
    return [*theirs, f"--workdir={WORKDIR.value}"]


def copies(rental: cloud.Rental, archive: str, secrets: str) -> list[list[str]]:
    found = rental.copy(archive, "llama_jax.tgz")
    return found + (rental.copy(secrets, cloud.SECRETS) if SECRETS.value else [])


def redacted(text: str) -> str:
    """Without the values of --secrets, should one stand in a setting."""
    for name in SECRETS.value:
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${name}")
    return text


def say(text: str) -> None:
    print(redacted(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, LaunchError)
