"""The command lines that rent, fill, start and watch machines: pure functions, nothing is run here.

TPU slices through gcloud's TPU API, as a queued resource or at once; GPU nodes through SLURM.
"""

import dataclasses
import shlex

from llama_jax.analysis.hardware import GPUS_PER_NODE, Slice

# The system image of each generation (Google Cloud's documentation, "TPU software versions").
IMAGES = {
    **dict.fromkeys(("TPU v2", "TPU v3", "TPU v4"), "tpu-ubuntu2204-base"),
    "TPU v5 lite": "v2-alpha-tpuv5-lite",
    "TPU v5": "v2-alpha-tpuv5",
    "TPU v6 lite": "v2-alpha-tpuv6e",
    "TPU7x": "v2-alpha-tpu7-ubuntu2404",
}
# What the API answers when a slice is no longer ours, and when it is.
GONE = frozenset({"PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDED", "SUSPENDING"})
READY = frozenset({"READY", "ACTIVE"})

CODE, SECRETS = "llama_jax", ".llama_jax_env"
LOG, PROCESS, DONE = "train.log", "train.pid", "train.done"


@dataclasses.dataclass(frozen=True)
class Rental:
    """A TPU slice to be rented; `slice_` says which."""

    name: str
    zone: str
    slice_: Slice
    project: str = ""  # "": gcloud's own setting
    spot: bool = False
    direct: bool = False  # at once or not at all, instead of from the queue

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


def pack(archive: str) -> str:
    """The working tree as it is, without what git ignores, into one file; a shell pipeline."""
    files = "git ls-files -z --cached --others --exclude-standard"
    return f"{files} | tar --null --ignore-failed-read -czf {shlex.quote(archive)} -T -"


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
        steps += [
            "{ command -v gcsfuse > /dev/null || { echo 'gcsfuse is not on this host: install it, or leave"
            " --bucket out' >&2; exit 1; }; }",
            # A damaged checkpoint is set aside by renaming its folder: of up to so many files.
            "mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs"
            f" --rename-dir-limit=200000 {shlex.quote(bucket)} ~/bucket; }}",
        ]
    return " && ".join(steps)


def start(arguments: list[str], code: str, secrets: bool = False) -> str:
    """On each host: train in the background, the output to a log, the exit code to a file at the end."""
    train = shlex.join([".venv/bin/python", "-u", "-m", "experiments.train", *arguments])
    inner = f"{train} >> ~/{LOG} 2>&1; echo $? > ~/{DONE}"
    if secrets:
        inner = f"set -a; . ~/{SECRETS}; set +a; {inner}"
    return (
        f"cd {CODE} && rm -f ~/{DONE} && {{ LLAMA_JAX_CODE={shlex.quote(code)} "
        f"nohup sh -c {shlex.quote(inner)} > /dev/null 2>&1 < /dev/null & echo $! > ~/{PROCESS}; }}"
    )


def look(workdir: str, lines: int) -> str:
    """On the first host: a word on the run, then the end of its log.

    The word: finished (its results are there), running, an exit code, or - if none was started or the
    machine has started again since.
    """
    code = f"code=$(cat {DONE} 2> /dev/null)"
    results = f"(cd {CODE} && test -e {shell_path(workdir)}/runcard.json)"
    alive = f"kill -0 $(cat {PROCESS} 2> /dev/null) 2> /dev/null"
    return (
        f'{code}; if test "$code" = 0 && {results}; then echo finished; elif test "$code"; then echo $code; '
        f"elif {alive}; then echo running; else echo -; fi; tail -n {lines} {LOG} 2> /dev/null || true"
    )


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
