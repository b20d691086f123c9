"""Rent a slice, start a run on all its hosts, watch it, rent it again when it is taken away.

    python -m experiments.launch --tpu=NAME --zone=ZONE --config=configs/7b.py:v4_32 \\
        --workdir='~/bucket/7b' --bucket=BUCKET --spot

prints the commands, and with --go runs them. Interrupted, or started again, it finds the slice and goes on
watching. A page on a GPU node (`configs/7b.py:h100_8`) gives a SLURM job instead; --go submits it.
"""

import os
import re
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


# So often in a row the run may end before it is done, or the cloud not answer, before it is given up.
PATIENCE = 5


class LaunchError(Exception):
    """A command failed, or the run did."""


def main() -> int:
    run = cli.frozen(CONFIG)
    name = cli.slice_of(run)
    check_fit(run, name)
    slice_ = hardware.find_slice(name)
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
    name = re.sub(r"[^\w.-]+", "_", Path(WORKDIR.value).absolute().name) or "run"
    script = cloud.sbatch(
        name, slice_.hosts, arguments(), WORKDIR.value, time=TIME.value, partition=PARTITION.value,
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
    arguments()  # before anything costs money
    if not GO.value:
        print("\n".join(described(rental)))
        return 0
    give_back = f"to give the slice back:\n  {spoken(rental.delete())}"
    try:
        code = drive(rental)
    except KeyboardInterrupt:
        say("not watching any more; the slice stays rented and the run goes on")
        code = 130
    finally:
        say(give_back)
    return code


def described(rental: cloud.Rental) -> list[str]:
    """What --go would do, as a script to read."""
    archive = "llama_jax.tgz"
    code = [cloud.pack(archive), *copies(rental, archive, "SECRETS")]
    lost = ", ".join(sorted(cloud.GONE))
    steps = [
        ("rent the slice", [rental.create()]),
        ("wait until this prints ACTIVE (READY with --direct)", [rental.state()]),
        ("the code, to every host", code),
        ("set every host up", rental.run(set_up())),
        ("start on every host; one alone gives up, with the reason",
         rental.run(training())),
        ("watch: a word on the run, then the end of its log", [rental.ask(cloud.look(WORKDIR.value, 1))]),
        (f"when it is taken away ({lost}): this, then from the start; the run resumes",
         [rental.delete()]),
    ]  # fmt: skip
    lines = ["#!/bin/sh"]
    for number, (what, commands) in enumerate(steps, 1):
        joined = (one if isinstance(one, str) else spoken(one) for one in commands)
        lines += [f"# {number}. {what}", *joined]
    return lines


def drive(rental: cloud.Rental) -> int:
    """Rent, fill, start, watch; again whenever the slice is taken away. 0 when the run is finished.

    A run that ends by itself with an error is not started again. LaunchError when the cloud refuses.
    """
    said, ended = "", 0
    with tempfile.TemporaryDirectory() as folder:
        run(["bash", "-o", "pipefail", "-c", cloud.pack(f"{folder}/llama_jax.tgz")])
        while True:
            bring(rental)
            seen = look(rental, 1)
            if seen and seen[0] == "running":
                ended = 0 if seen[1] != said else ended
                if seen[1] != said:
                    said = seen[1]
                    print(redacted(said), flush=True)
            elif seen:
                if seen[0] != "-":
                    tail = look(rental, 20) or seen
                    say(f"the run has ended: {tail[0]}; the end of its log:\n{tail[1]}")
                    ended += 1
                    if seen[0] == "finished":
                        return 0
                    # 1 and 2 are errors that a new start meets again, unless the slice is being taken.
                    if ended >= PATIENCE or (seen[0] in ("1", "2") and still_ready(rental)):
                        return int(seen[0]) or 1
                fill(rental, folder)
            time.sleep(POLL.value)


def bring(rental: cloud.Rental) -> None:
    """Wait until the slice is ours, renting it, or giving a lost one back and renting again."""
    said = ""
    while (state := state_of(rental)) not in cloud.READY:
        if not state:
            say(f"renting {rental.name}: {rental.slice_.accelerator} in {rental.zone}")
            run(rental.create())
        elif state == "FAILED":
            why = run([word for word in rental.state() if not word.startswith("--format")])
            raise LaunchError(f"{rental.name} could not be had:\n{why}")
        elif state in cloud.GONE:
            say(f"{rental.name} is {state}: giving it back, renting again")
            run(rental.delete())
        elif state != said:
            say(f"{rental.name} is {state}; waiting")
        said = state
        time.sleep(POLL.value)


def still_ready(rental: cloud.Rental) -> bool:
    time.sleep(POLL.value)
    return state_of(rental) in cloud.READY


def fill(rental: cloud.Rental, folder: str) -> None:
    """Code and secrets to every host, set up, start. What fails because the slice is taken is no error."""
    say("copying the code, setting the hosts up, starting the run")
    secrets = Path(folder, "secrets")
    secrets.touch(mode=0o600)
    secrets.write_text(
        "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in SECRETS.value)
    )
    steps = [*copies(rental, f"{folder}/llama_jax.tgz", str(secrets)), *rental.run(set_up())]
    try:
        for command in (*steps, *rental.run(training())):
            run(command)
    except LaunchError as error:
        if still_ready(rental):
            raise
        say(str(error))


def look(rental: cloud.Rental, lines: int) -> tuple[str, str] | None:
    """(word on the run, end of its log) from the first host; None if it cannot be asked just now."""
    command = rental.ask(cloud.look(WORKDIR.value, lines))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    word, _, log = done.stdout.partition("\n")
    return word.strip(), log.strip()


def state_of(rental: cloud.Rental) -> str:
    """A word; "" if there is no such slice. LaunchError when the cloud refuses, or stays away."""
    for left in reversed(range(PATIENCE)):
        done = subprocess.run(rental.state(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        if "NOT_FOUND" in done.stderr:
            return ""
        if "PERMISSION_DENIED" in done.stderr or not left:
            raise LaunchError(f"{spoken(rental.state())}\n{redacted(done.stderr.strip())}")
        time.sleep(POLL.value)
    raise AssertionError("the last attempt returns or raises")


def run(command: list[str]) -> str:
    """Its output. LaunchError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{spoken(command)}\n{redacted(done.stderr.strip())}")
    return done.stdout.strip()


def set_up() -> str:
    wandb = cli.frozen(CONFIG).log.wandb == "on"
    return cloud.set_up(BUCKET.value, ("wandb",) if wandb else ())


def training() -> str:
    return cloud.start(arguments(), provenance.code(), bool(SECRETS.value))


def arguments() -> list[str]:
    """What of this command line is the run's."""
    theirs = [word for word in sys.argv[1:] if re.match("--?(no)?config", word)]
    if odd := next((word for word in theirs if not re.match(r"--config[\w.]*=", word)), ""):
        raise ValueError(f"{odd}: write it as --name=value, so that the hosts are told the same")
    return [*theirs, f"--workdir={WORKDIR.value}"]


def copies(rental: cloud.Rental, archive: str, secrets: str) -> list[list[str]]:
    found = rental.copy(archive, "llama_jax.tgz")
    return found + (rental.copy(secrets, cloud.SECRETS) if SECRETS.value else [])


def spoken(command: list[str]) -> str:
    """As typed into a shell, without secrets."""
    return shlex.join(redacted(word) for word in command)


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
