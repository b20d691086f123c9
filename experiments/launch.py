"""Rent a slice, start a run on all its hosts, watch it, rent it again when it is taken away.

    python -m experiments.launch --tpu=NAME --zone=ZONE --config=configs/7b.py:v4_32 \\
        --workdir='~/bucket/7b' --bucket=BUCKET --spot

prints the commands, and with --go runs them. Interrupted, or started again, it finds the slice and goes on
watching. A run that ends with exit code 1 or 2 has met an error that it would meet again, and is given up;
any other end is followed by a new start. When a run is finished or given up, --give_back deletes the slice,
which is the default with --spot. A config on GPU nodes (`configs/7b.py:h100_64`) gives a SLURM job instead;
--go submits it.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # launching touches no device

from absl import flags

from experiments import cli
from llama_jax import config
from llama_jax.analysis import hardware
from llama_jax.plan import figures
from llama_jax.run import cloud, provenance

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
GIVE_BACK = flags.DEFINE_bool(
    "give_back", None, "Delete the slice when the run is finished or given up; so with --spot."
)
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
# Exit codes of errors that a new start meets again, unless the slice is being taken.
FINAL = ("1", "2")


class LaunchError(Exception):
    """A command failed, or the run did."""


class IdleError(LaunchError):
    """The same, and nothing is running on the slice."""


ON_TPU = (TPU, ZONE, PROJECT, SPOT, DIRECT, BUCKET, GIVE_BACK, SECRETS, POLL)
ON_SLURM = (TIME, PARTITION, ACCOUNT)


def main() -> int:
    run = cli.frozen(CONFIG)
    name = cli.slice_of(run)
    slice_ = hardware.find_slice(name)
    rents = slice_.device in cloud.IMAGES
    for flag in ON_SLURM if rents else ON_TPU:
        if flag.present:
            where = "SLURM runs it" if not rents else "a TPU slice is rented"
            raise ValueError(f"--{flag.name} has no effect on {slice_.accelerator}: {where}")
    check_fit(run, name)
    return on_tpu(run, slice_) if rents else on_slurm(run, slice_)


def check_fit(run: config.Run, name: str) -> None:
    """ValueError, before anything costs money, if the formulas say that it does not fit."""
    plan = figures.plan(run, name, compile=False)
    if not plan.fits:
        raise ValueError(
            f"this run needs {plan.hbm_gib_per_chip:.1f} GiB a chip and {name} has {plan.hbm_limit_gib:g}; "
            "python -m experiments.plan --suggest says what fits"
        )


def on_slurm(run: config.Run, slice_: hardware.Slice) -> int:
    workdir = WORKDIR.value
    if "://" in workdir or (slice_.hosts > 1 and workdir.startswith("/") and cloud.is_own(workdir)):
        raise ValueError(
            f"--workdir={workdir!r} must be a folder that all {slice_.hosts} nodes see: one of the "
            "cluster's file system"
        )
    name = re.sub(r"[^\w.-]+", "_", Path(workdir).absolute().name) or "run"
    script = cloud.sbatch(
        name, slice_.hosts, arguments(), workdir, time=TIME.value, partition=PARTITION.value,
        account=ACCOUNT.value,
    )  # fmt: skip
    lacking = [path for path in data_files(run) if not Path(path).expanduser().exists()]
    if not GO.value:
        print(script, end="")
        if lacking:
            say(f"note: {expected(lacking)} not here")
        return 0
    if lacking:
        raise ValueError(f"{expected(lacking)} not here; {recipe(run)}")
    need("sbatch")
    done = subprocess.run(["sbatch"], input=script, text=True, check=False)
    return done.returncode


def recipe(run: config.Run) -> str:
    """What to do about files that the hosts lack."""
    settings = ["--config.data.sources.NAME.path", "--config.data.tokenizer.path"]
    settings += ["--config.train.init_from"] if run.train.init_from else []
    return f"point {', '.join(settings[:-1])} and {settings[-1]} to where they are"


def expected(paths: list[str]) -> str:
    return (
        f"the config reads {', '.join(paths)}, and {'that is' if len(paths) == 1 else 'those are'}"
    )


def data_files(run: config.Run) -> list[str]:
    """What the run reads besides its code."""
    paths = [source.path for source in run.data.sources if source.kind in ("files", "rows")]
    return paths + [path for path in (run.data.tokenizer.path, run.train.init_from) if path]


def need(program: str) -> None:
    if not shutil.which(program):
        raise ValueError(f"--go runs {program}, which is not on this machine's PATH")


def on_tpu(run: config.Run, slice_: hardware.Slice) -> int:
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
    if BUCKET.value:
        cloud.check_bucket(BUCKET.value)
    gives_back = SPOT.value if GIVE_BACK.value is None else GIVE_BACK.value
    lost = ""
    if slice_.hosts > 1:
        lost = f"is another folder on each of the {slice_.hosts} hosts"
    elif SPOT.value:
        lost = "is lost when a spot slice is taken away"
    elif gives_back:
        lost = "is deleted with the slice that --give_back gives back"
    cloud.check_workdir(WORKDIR.value, BUCKET.value, lost)
    arguments()  # before anything costs money
    lacking = cloud.absent(data_files(run), copied(), BUCKET.value)
    if not GO.value:
        print("\n".join(described(rental, lacking, recipe(run))))
        return 0
    if lacking:
        raise ValueError(
            f"{expected(lacking)} not among the files that are copied to the hosts (git's, without what it "
            f"ignores); put it into a bucket and {recipe(run)}, as ~/bucket/{lacking[0].lstrip('~/')}"
        )
    need("gcloud")
    with only_one(rental):
        check_bucket(run)
        return watched(rental, gives_back)


def watched(rental: cloud.Rental, gives_back: bool) -> int:
    """Drive the rental; at the end the slice is given back if asked and idle, else the user is told how."""
    idle = False
    try:
        code = drive(rental)
        idle = True
    except KeyboardInterrupt:
        say("not watching any more; the slice stays rented and the run goes on")
        code = 130
    except IdleError:
        idle = True
        raise
    finally:
        if idle and gives_back and given_back(rental):
            say(f"{rental.name} is given back")
        else:
            say(f"to give the slice back:\n  {spoken(rental.delete())}")
    return code


@contextlib.contextmanager
def only_one(rental: cloud.Rental):
    """ValueError while another launch on this machine has a slice of that name."""
    parts = (
        f"llama_jax_launch_{os.getuid()}",
        rental.project or "default",
        rental.zone,
        rental.name,
    )
    name = "_".join(parts)
    with open(Path(tempfile.gettempdir(), f"{name}.lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--tpu={rental.name}: another launch on this machine is watching it; end that one first, "
                "or give another name"
            ) from None
        yield


def check_bucket(run: config.Run) -> None:
    """ValueError if there is no such bucket, or not in it what the run reads from it."""
    if not BUCKET.value:
        return
    asked = cloud.describe_bucket(BUCKET.value)
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    create = spoken(cloud.create_bucket(BUCKET.value, ZONE.value))
    if done.returncode and re.search("not found|404", done.stderr):
        raise ValueError(f"--bucket={BUCKET.value}: there is none; to create it:\n  {create}")
    if not done.returncode and done.stdout.strip() != "True":
        say(
            f"note: --bucket={BUCKET.value} is flat: a host that is lost while it finishes a checkpoint "
            f"leaves a part of it; one with folders does not:\n  {create}"
        )
    for path in data_files(run):
        if cloud.in_bucket(path):
            asked = cloud.list_objects(path, BUCKET.value)
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode and "matched no objects" in done.stderr:
                where = cloud.object_of(path, BUCKET.value)
                raise ValueError(f"{expected([path])} not in the bucket: {where} is not there")


def copied() -> list[str]:
    """The files that every host gets. ValueError where git does not know them."""
    done = subprocess.run(
        ["bash", "-c", cloud.listed()], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"launch copies the files that git lists here: {done.stderr.strip()}")
    return done.stdout.split("\0")


def described(rental: cloud.Rental, lacking: list[str], advice: str) -> list[str]:
    """What --go would do, as a script to read. advice: what to do about the files that the hosts lack."""
    archive = "llama_jax.tgz"
    code = [cloud.pack(archive), *copies(rental, archive, "SECRETS")]
    lost = ", ".join(sorted(cloud.GONE))
    look_once = cloud.look(WORKDIR.value, 1, arguments())
    bucket = [cloud.create_bucket(BUCKET.value, ZONE.value)] if BUCKET.value else []
    steps = [
        *([("if there is no such bucket: one whose folders are renamed at once, as a checkpoint's is when it "
            "is finished", bucket)] if bucket else []),
        *([(f"not among the files that are copied, so put them there: {', '.join(lacking)}; "
            f"{advice}", [])] if lacking else []),
        ("rent the slice", [rental.create()]),
        ("wait until this prints ACTIVE (READY with --direct)", [rental.state()]),
        ("the code, to every host", code),
        ("end what is left of a run, set every host up", rental.run(set_up())),
        ("start on every host; one alone gives up, with the reason",
         rental.run(training())),
        ("watch: a word on the run, then the end of its log", [rental.ask(look_once)]),
        (f"when it is taken away ({lost}): this, then from the start, and the run resumes; the same gives it "
         "back when the run is finished",
         [rental.delete()]),
    ]  # fmt: skip
    lines = ["#!/bin/sh"]
    for number, (what, commands) in enumerate(steps, 1):
        joined = (one if isinstance(one, str) else spoken(one) for one in commands)
        lines += [f"# {number}. {what}", *joined]
    return lines


def drive(rental: cloud.Rental) -> int:
    """Rent, fill, start, watch; again whenever the slice is taken away. 0 when the run is finished.

    A run that ends by itself with an error is not started again, but for one that ended before this watch
    began. LaunchError when the cloud refuses, IdleError when a slice cannot be had or set up.
    """
    said, ended, failed, silent, ours = "", 0, 0, 0, False
    with tempfile.TemporaryDirectory() as folder:
        run(["bash", "-o", "pipefail", "-c", cloud.pack(f"{folder}/llama_jax.tgz")])
        while True:
            if bring(rental):
                ours = False
            seen = look(rental, 1)
            silent = silent + 1 if isinstance(seen, str) else 0
            if isinstance(seen, str):
                if silent == PATIENCE:
                    say(f"{rental.name} is ready but does not answer; still asking:\n{seen}")
            elif seen.word == "other":
                raise LaunchError(
                    f"{rental.name} is running another command; wait for its end, or give another --tpu"
                )
            elif seen.word == "running":
                ours = True
                if seen.log != said:
                    said, ended = seen.log, 0
                    print(redacted(said), flush=True)
            elif seen.word == "finished":
                report(rental, seen)
                return 0
            else:
                if ours:
                    ended += 1
                    report(rental, seen)
                    if ended >= PATIENCE or (seen.word in FINAL and still_ready(rental)):
                        return int(seen.word) if seen.word.isdecimal() and seen.word != "0" else 1
                problem = fill(rental, folder)
                ours = not problem
                if problem:
                    say(problem)
                    # What fails because the slice is taken is no error.
                    failed = failed + 1 if still_ready(rental) else 0
                    if failed == PATIENCE:
                        raise IdleError(
                            f"{rental.name} could not be set up, {PATIENCE} times in a row"
                        )
            time.sleep(POLL.value)


def report(rental: cloud.Rental, seen: "Seen") -> None:
    tail = look(rental, 20)
    how = "its host has started again" if seen.word == "-" else seen.word
    log = (seen if isinstance(tail, str) else tail).log
    say(f"the run has ended: {how}; the end of its log:\n{log}")


def bring(rental: cloud.Rental) -> bool:
    """Wait until the slice is ours, renting it, or giving a lost one back and renting again.

    Whether it was not ours.
    """
    said, left = "", PATIENCE
    while (state := state_of(rental) or "absent") not in cloud.READY:
        if state == "absent":
            say(f"renting {rental.name}: {rental.slice_.accelerator} in {rental.zone}")
            left = attempt(rental.create(), left)
        elif state == "FAILED":
            why = run([word for word in rental.state() if not word.startswith("--format")])
            raise IdleError(f"{rental.name} could not be had:\n{why}")
        elif state in cloud.GONE:
            say(f"{rental.name} is {state}: giving it back, renting again")
            left = attempt(rental.delete(), left)
        elif state != said:
            say(f"{rental.name} is {state}; waiting")
        said = state
        time.sleep(POLL.value)
    return bool(said)


def attempt(command: list[str], left: int) -> int:
    """Run what the cloud may fail to do for a moment, or has done already; how many more failures to bear.

    LaunchError for what it will refuse again, or when none is left.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    deletes = "delete" in command
    if done.returncode == 0 or ("NOT_FOUND" if deletes else "ALREADY_EXISTS") in done.stderr:
        return PATIENCE
    refused = refuses(done.stderr, *(() if deletes else ("NOT_FOUND", "RESOURCE_EXHAUSTED")))
    if left <= 1 or refused:
        raise LaunchError(f"{spoken(command)}\n{redacted(done.stderr.strip())}")
    say(f"{done.stderr.strip()}; trying again")
    return left - 1


def refuses(error: str, *more: str) -> bool:
    """Whether the cloud would answer the same again."""
    return any(word in error for word in (*cloud.REFUSALS, *more))


def given_back(rental: cloud.Rental) -> bool:
    """Whether the slice could be deleted."""
    left = PATIENCE
    try:
        while (state := state_of(rental)) and state != "DELETING":
            left = attempt(rental.delete(), left)
            time.sleep(POLL.value)
    except LaunchError as error:
        say(str(error))
        return False
    return True


def still_ready(rental: cloud.Rental) -> bool:
    time.sleep(POLL.value)
    return state_of(rental) in cloud.READY


def fill(rental: cloud.Rental, folder: str) -> str:
    """Code and secrets to every host, set up, start; what failed, or "".

    A slice may be taken, and a host may not answer yet.
    """
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
        return str(error)
    return ""


class Seen(NamedTuple):
    word: str  # of cloud.look
    log: str  # the end of it


def look(rental: cloud.Rental, lines: int) -> Seen | str:
    """What the first host says of the run; the error if it cannot be asked just now."""
    command = rental.ask(cloud.look(WORKDIR.value, lines, arguments()))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # A login may print something of its own before.
    found = re.search(r"^(finished|running|other|-|\d+)$\n?(.*)", done.stdout, re.M | re.S)
    if done.returncode or not found:
        return done.stderr.strip()
    return Seen(found[1], found[2].strip())


def state_of(rental: cloud.Rental) -> str:
    """A word; "" if there is no such slice. LaunchError when the cloud refuses, or stays away."""
    for left in reversed(range(PATIENCE)):
        done = subprocess.run(rental.state(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        if "NOT_FOUND" in done.stderr:
            return ""
        if refuses(done.stderr) or not left:
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
    return f"{cloud.stop()}; {cloud.set_up(BUCKET.value, ('wandb',) if wandb else ())}"


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
    """Without the values of --secrets, should one stand in a setting; one may be a part of another."""
    secrets = {name: os.environ[name] for name in SECRETS.value if os.environ.get(name)}
    for name in sorted(secrets, key=lambda name: -len(secrets[name])):
        text = text.replace(secrets[name], f"${name}")
    return text


def say(text: str) -> None:
    print(redacted(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, LaunchError)
