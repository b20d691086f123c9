"""The command lines that rent, fill, start and watch machines, and the rules of the names in them.

Pure functions, nothing is run here. TPU slices through gcloud's TPU API, as a queued resource or at once; GPU
nodes through SLURM.
"""

import dataclasses
import fnmatch
import re
import shlex
from collections.abc import Iterable

from llama_jax.analysis.hardware import GPUS_PER_NODE, Slice

# The system image of each generation (Google Cloud's documentation, "TPU software versions").
IMAGES = {
    **dict.fromkeys(("TPU v2", "TPU v3", "TPU v4"), "tpu-ubuntu2204-base"),
    "TPU v5 lite": "v2-alpha-tpuv5-lite",
    "TPU v5": "v2-alpha-tpuv5",
    "TPU v6 lite": "v2-alpha-tpuv6e",
    "TPU7x": "v2-alpha-tpu7-ubuntu2404",
}
# What the API answers when a slice is no longer ours, and when it is. While it is SUSPENDING, STOPPING or
# DELETING it cannot be deleted yet.
GONE = frozenset({"PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDED"})
READY = frozenset({"READY", "ACTIVE"})
# In what it answers to a command that will fail again.
REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT")

CODE, SECRETS = "llama_jax", ".llama_jax_env"
LOG, PROCESS, DONE, COMMAND = "train.log", "train.pid", "train.done", "train.command"
BUCKET = "~/bucket"  # where a bucket is mounted on every host
GCSFUSE = "3.8.0"  # installed where a host has none
# Folders that every machine has for itself, and so has what launch rents, empty.
OWN = ("/tmp", "/var/tmp", "/dev/shm", "/home", "/root")


@dataclasses.dataclass(frozen=True)
class Rental:
    """A TPU slice to be rented; `slice_` says which."""

    name: str
    zone: str
    slice_: Slice
    project: str = ""  # "": gcloud's own setting
    spot: bool = False
    direct: bool = False  # at once or not at all, instead of from the queue

    def __post_init__(self):
        _check_name(
            "tpu", self.name, r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "seven", "start with a letter"
        )
        if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]+-[a-z]", self.zone):
            raise ValueError(f"--zone={self.zone!r} must be a zone, as us-central2-b")

    @property
    def nodes(self) -> list[str]:
        """The TPU VMs' names: one of a slice, numbered where slices are joined."""
        count = self.slice_.slices
        return [self.name] if count == 1 else [f"{self.name}-{i}" for i in range(count)]

    def create(self) -> list[str]:
        image, kind = IMAGES[self.slice_.device], self.slice_.accelerator
        spot = ["--spot"] if self.spot else []
        if self.direct:
            return self._call(
                "tpu-vm", "create", f"--accelerator-type={kind}", f"--version={image}", *spot
            )
        count = self.slice_.slices
        nodes = (
            [f"--node-id={self.name}"]
            if count == 1
            else [f"--node-count={count}", f"--node-prefix={self.name}"]
        )
        return self._call(
            "queued-resources", "create", *nodes, f"--accelerator-type={kind}",
            f"--runtime-version={image}", *spot,
        )  # fmt: skip

    def state(self) -> list[str]:
        """Prints one word; fails if there is no such slice."""
        if self.direct:
            return self._call("tpu-vm", "describe", "--format=value(state)")
        return self._call("queued-resources", "describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        if self.direct:
            return self._call("tpu-vm", "delete")
        return self._call("queued-resources", "delete", "--force")

    def copy(self, file: str, to: str) -> list[list[str]]:
        """A file of this machine to the home of every host."""
        return [
            self._call("tpu-vm", "scp", "--worker=all", node=n, before=file, to=to)
            for n in self.nodes
        ]

    def run(self, command: str) -> list[list[str]]:
        """A shell command on every host."""
        return [
            self._call("tpu-vm", "ssh", "--worker=all", "--command", command, node=n)
            for n in self.nodes
        ]

    def ask(self, command: str) -> list[str]:
        """A shell command on the first host."""
        return self._call("tpu-vm", "ssh", "--worker=0", "--command", command, node=self.nodes[0])

    def _call(self, kind, verb, *flags, node="", before="", to="") -> list[str]:
        where = node or self.name
        names = [before, f"{where}:{to}"] if before else [where]
        common = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", kind, verb, *names, *common, "--quiet", *flags]


def check_bucket(name: str) -> None:
    """ValueError unless Cloud Storage takes the name."""
    if name.startswith("gs://"):
        raise ValueError(
            f"--bucket={name!r} must be the name alone; try --bucket={name[5:].split('/')[0]}"
        )
    form = r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
    _check_name("bucket", name, form, "my-bucket", "have 3 or more")


def _check_name(flag: str, name: str, form: str, example: str, more: str) -> None:
    if not re.fullmatch(form, name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        near = near if re.fullmatch(form, near) else example
        raise ValueError(
            f"--{flag}={name!r} must be small letters, digits and hyphens, at most 63, and {more}; "
            f"try --{flag}={near}"
        )


def check_workdir(workdir: str, bucket: str, lost: str) -> None:
    """ValueError unless it is a path that every host sees, and that stays.

    `lost` says what becomes of a folder that a host has for itself; "" if it may be one.
    """
    if "://" in workdir:
        name, _, rest = workdir.partition("://")[2].partition("/")
        raise ValueError(
            f"--workdir={workdir!r} must be a path on the hosts; try --bucket={name} "
            f"--workdir='{BUCKET}/{rest or 'run'}'"
        )
    if in_bucket(workdir):
        if not bucket:
            raise ValueError(f"--workdir={workdir!r} is in a bucket: name it with --bucket=NAME")
    elif lost and is_own(workdir):
        name = workdir.rstrip("/").rpartition("/")[2]
        raise ValueError(
            f"--workdir={workdir!r} {lost}; try --bucket=NAME --workdir='{BUCKET}/{name}'"
        )


def in_bucket(path: str) -> bool:
    return f"{path}/".startswith(f"{BUCKET}/")


def is_own(path: str) -> bool:
    """Whether a machine has this path for itself."""
    return not path.startswith("/") or f"{path}/".startswith(tuple(f"{folder}/" for folder in OWN))


def absent(paths: Iterable[str], copied: list[str], bucket: str) -> list[str]:
    """Those of the paths that are neither among the copied files nor where only the user can look."""
    found = lambda path: any(  # noqa: E731
        name == path or name.startswith(f"{path.rstrip('/')}/") or fnmatch.fnmatch(name, path)
        for name in copied
    )
    return [
        path
        for path in paths
        if is_own(path) and not found(path) and not (bucket and in_bucket(path))
    ]


def object_of(path: str, bucket: str) -> str:
    """The address in Cloud Storage of a path in the mounted bucket."""
    return f"gs://{bucket}/{path[len(BUCKET) + 1 :]}"


def create_bucket(bucket: str, zone: str) -> list[str]:
    """One whose folders are renamed at once, as a checkpoint's is when it is finished.

    In a flat bucket a folder is renamed object by object, and one that is interrupted looks complete.
    """
    return [
        *("gcloud", "storage", "buckets", "create", f"gs://{bucket}"),
        f"--location={zone.rpartition('-')[0]}",
        *("--uniform-bucket-level-access", "--enable-hierarchical-namespace"),
    ]


def describe_bucket(bucket: str) -> list[str]:
    """Prints True if its folders are renamed at once."""
    return [
        *("gcloud", "storage", "buckets", "describe", f"gs://{bucket}", "--raw"),
        "--format=value(hierarchicalNamespace.enabled)",
    ]


def list_objects(path: str, bucket: str) -> list[str]:
    return ["gcloud", "storage", "ls", object_of(path, bucket)]


def pack(archive: str) -> str:
    """The working tree as it is, without what git ignores, into one file; a shell pipeline."""
    return f"{listed()} | tar --null --ignore-failed-read -czf {shlex.quote(archive)} -T -"


def listed() -> str:
    """Prints the files that are copied, with a zero byte after each."""
    return "git ls-files -z --cached --others --exclude-standard"


def set_up(bucket: str = "", packages: tuple[str, ...] = ()) -> str:
    """On each host: unpack, a Python of its own, the pinned packages with libtpu, the bucket mounted."""
    steps = [
        f"mkdir -p {CODE} && tar xzf {CODE}.tgz -C {CODE}",
        "python3 -m pip install --quiet --user uv",
        f"cd {CODE}",
        "~/.local/bin/uv venv --quiet --clear --python 3.12 .venv",
        "~/.local/bin/uv pip install --quiet "
        + shlex.join(["-r", "requirements.txt", "-e", ".[tpu]", *packages]),
    ]
    if bucket:
        package = f"gcsfuse_{GCSFUSE}_amd64.deb"
        source = (
            f"https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v{GCSFUSE}/{package}"
        )
        steps += [
            "{ command -v gcsfuse > /dev/null || { "
            f"curl -fsSL -o /tmp/{package} {source} && sudo apt-get install -qq -y /tmp/{package}; }}; }}",
            # The hosts write one folder and must see each other's files at once; on TPU hosts gcsfuse would
            # keep what it knows of them for ever. A flat bucket's folders are renamed up to so many files.
            f"mkdir -p {BUCKET} && {{ mountpoint -q {BUCKET} || gcsfuse --implicit-dirs"
            " --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
            f" --rename-dir-limit=200000 {shlex.quote(bucket)} {BUCKET}; }}",
        ]
    return " && ".join(steps)


def stop() -> str:
    """On each host: end what is left of a run, whose group has the number of the process that was started."""
    return (
        f"for signal in TERM KILL; do {_alive()} || break; kill -s $signal -- -$(cat ~/{PROCESS}); "
        f"for second in $(seq 30); do {_alive()} || break; sleep 1; done; done"
    )


def start(arguments: list[str], code: str, secrets: bool = False) -> str:
    """On each host: train in the background, the output to a log, the exit code to a file at the end."""
    train = shlex.join([".venv/bin/python", "-u", "-m", "experiments.train", *arguments])
    inner = f"{train} >> ~/{LOG} 2>&1; echo $? > ~/{DONE}"
    if secrets:
        inner = f"set -a; . ~/{SECRETS}; set +a; {inner}"
    return (
        f"cd {CODE} && rm -f ~/{DONE} && echo {shlex.quote(shlex.join(arguments))} > ~/{COMMAND} && "
        f"{{ LLAMA_JAX_CODE={shlex.quote(code)} "
        f"nohup setsid sh -c {shlex.quote(inner)} > /dev/null 2>&1 < /dev/null & echo $! > ~/{PROCESS}; }}"
    )


def look(workdir: str, lines: int, arguments: list[str]) -> str:
    """On the first host: a word on the run, then the end of its log.

    The word: finished (its results are there), running, other (a run of other arguments is running), an exit
    code, or - if none was started or the machine has started again since.
    """
    code = f"code=$(cat {DONE} 2> /dev/null)"
    results = f"(cd {CODE} && test -e {shell_path(workdir)}/runcard.json)"
    same = f'test "$(cat {COMMAND} 2> /dev/null)" = {shlex.quote(shlex.join(arguments))}'
    return (
        f'{code}; if test "$code"; then if ! {same}; then echo -; elif test "$code" = 0 && {results}; '
        f"then echo finished; else echo $code; fi; "
        f"elif {_alive()}; then if {same}; then echo running; else echo other; fi; else echo -; fi; "
        f"tail -n {lines} {LOG} 2> /dev/null || true"
    )


def _alive() -> str:
    """Whether the process that was started is there, and not another that has its number by now."""
    return f"grep -qs experiments.train /proc/$(cat ~/{PROCESS} 2> /dev/null)/cmdline"


def shell_path(path: str) -> str:
    """Quoted, but for a home at its beginning."""
    home, rest = ("~/", path[2:]) if path.startswith("~/") else ("", path)
    return home + shlex.quote(rest)


def sbatch(
    name: str,
    nodes: int,
    arguments: list[str],
    workdir: str,
    *,
    time: str,
    partition: str,
    account: str,
) -> str:
    """A job script for nodes of GPUs, which puts itself back into the queue until the run is done.

    SLURM starts one task on each node (hosts.py), and its signal two minutes before the time is over makes
    the run save and end.
    """
    train = shlex.join([".venv/bin/python", "-u", "-m", "experiments.train", *arguments])
    options = [
        f"--job-name={name}", f"--nodes={nodes}", "--ntasks-per-node=1",
        f"--gres=gpu:{GPUS_PER_NODE}", "--exclusive",
        f"--time={time}", "--signal=TERM@120", "--requeue", "--open-mode=append",
        f"--output={name}-%j.log",
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={account}"] if account else []),
    ]  # fmt: skip
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        # What ends with an error on one node ends on all of them.
        f"srun --kill-on-bad-exit=1 {train}",
        f'test -e {shell_path(workdir)}/runcard.json || scontrol requeue "$SLURM_JOB_ID"',
        "",
    ])  # fmt: skip
