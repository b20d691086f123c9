"""The processes of a run that spans hosts, one process a host: how they meet, what they tell one another.

On the hosts of a TPU slice the same command finds its peers by itself, and so do the tasks of a SLURM step,
one a node (`srun --ntasks-per-node=1`). Elsewhere each process says where process 0 listens and which one it
is:

    python -m experiments.train ... --coordinator=10.0.0.2:8476 --processes=2 --process=0
"""

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from llama_jax import config, sharding
from llama_jax.analysis import hardware
from llama_jax.interrupt import Interrupt
from llama_jax.run import exchange

T = TypeVar("T")

# A process whose peers died waits so long at exit, instead of JAX's 300 s.
SHUTDOWN_SECONDS = 120
# A host that is silent so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 40
# A host on which something failed waits so long for the others to fail, too.
OUTCOME_SECONDS = 30
# Jobs of SLURM meet at one of the ports from here on, by their number.
FIRST_PORT = 61440


class Peers(NamedTuple):
    """What `jax.distributed.initialize` asks of a process."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int


def join(slice_name: str, peers: Peers | None = None, timeout: int = 0) -> bool:
    """Meet the other processes, if `peers`, SLURM or the slice says that there are any; whether there are.

    To be called before JAX's first array. Exits with 1 and the reason when they have not all come after
    `timeout` seconds (0: 60, and 5 more for each host). ValueError if SLURM contradicts the slice. All but
    the first process are silent from here on.
    """
    named = hardware.find_slice(slice_name) if slice_name != "any" else None
    asked = peers
    if peers:
        where = f" at {peers.coordinator}"
    else:
        asked = of_slurm()
        where = (
            f" of {slice_name}" if named else " of the SLURM step" if asked else " of this slice"
        )
        if named and asked and asked.processes != named.hosts:
            raise ValueError(
                f"{slice_name} has {named.hosts} nodes, but SLURM started {asked.processes} tasks: "
                f"srun --nodes={named.hosts} --ntasks-per-node=1"
            )
    hosts = asked.processes if asked else max(named.hosts if named else 1, tpu_hosts())
    if hosts == 1:
        return False
    seconds = timeout or 60 + 5 * hosts
    # JAX would abort with a stack trace, or wait for ever in the accelerator's own rendezvous.
    watchdog = threading.Timer(seconds, _give_up, (seconds, hosts, where, asked))
    watchdog.daemon = True
    watchdog.start()
    # It would take SIGTERM from Interrupt, and forget one that comes between two steps.
    jax.config.update("jax_enable_preemption_service", False)
    coordinator, processes, process = asked or (None, None, None)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # Where SLURM is found JAX would also take a process for that of one GPU, not of its host's.
            cluster_detection_method="deactivate" if asked else None,
            initialization_timeout=10 * seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError:  # no cluster that JAX knows: the check of the devices says what is missing
        if asked:
            raise
    finally:
        watchdog.cancel()
    if not jax.distributed.is_initialized():
        return False
    exchange.watch()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for the rest of the process
    return True


def of_slurm() -> Peers | None:
    """The other tasks of this SLURM step; None where there are none. ValueError for several on a node."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if tasks == 1:
        return None
    if tasks != nodes:
        raise ValueError(
            f"SLURM started {tasks} tasks on {nodes} nodes; a run has one process a node: "
            "srun --ntasks-per-node=1"
        )
    # The first of a list as node[001-004,007],login1 is node001.
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"]).partition(",")[0]
    port = FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % (2**16 - FIRST_PORT)
    return Peers(f"{first}:{port}", tasks, int(os.environ["SLURM_PROCID"]))


def tpu_hosts() -> int:
    """The hosts of this TPU slice, where the environment lists them; else 1."""
    settings: Any = jax.config  # has its flags as attributes, and not in its annotations
    if "tpu" not in (settings.jax_platforms or "tpu"):
        return 1
    listed = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return len(listed.split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)


def check(mesh: config.Mesh) -> None:
    """ValueError unless the devices are those of the slice that `mesh` was laid out for, if it was, and their
    hosts have met."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if (hosts := jax.process_count()) > 1 and not jax.distributed.is_initialized():
        name = next(
            (
                name
                for name, of in hardware.SLICES.items()
                if (of.devices, of.hosts) == (count, hosts)
                and hardware.DEVICES[of.device] == hardware.find(kind)
            ),
            "v4_32",
        )
        raise ValueError(
            f"here is {count} x {kind} on {hosts} hosts, whose processes have not met: give the slice, "
            f"as in --config=configs/7b.py:{name} or --config.mesh.hardware={name}, or --coordinator, "
            "--processes and --process"
        )
    if mesh.hardware == "any":
        return
    wanted = hardware.find_slice(mesh.hardware, "mesh.hardware")
    if (hardware.find(kind), count) != (hardware.DEVICES[wanted.device], wanted.devices):
        spread = "1 host" if wanted.hosts == 1 else f"{wanted.hosts} hosts"
        raise ValueError(
            f"this run is laid out for {mesh.hardware}: {wanted.devices} x {wanted.device} on {spread}; "
            f"here is {count} x {kind}: start the command on every host of the slice, or leave the slice "
            "out of --config"
        )


def alone(command: str) -> None:
    """ValueError if there are other processes."""
    if jax.process_count() > 1:
        raise ValueError(f"{command} works on one host; here are {jax.process_count()}")


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def interrupt() -> Interrupt:
    """To be entered where work may be stopped, by all hosts, which ask it equally often."""
    return Interrupt(sharding.Largest() if jax.process_count() > 1 else None)


def agree(here: bool) -> bool:
    """Whether it is so on every host. All must call it."""
    return all(json.loads(told) for told in exchange.gather(json.dumps(bool(here))))


def together(work: Callable[[], T]) -> T:
    """`work()` on every host; where it fails on one, all of them stop with the reason. All must call it."""
    result: Any = None
    error = None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = caught
    reasons = exchange.gather(_reason(error))
    if not any(reasons):
        return result
    raise error or ValueError(_first_of(reasons))


def outcome(error: Exception | None) -> Exception | None:
    """What went wrong at work that all hosts have ended, each with its own `error` if it failed there.

    An error that not all hosts come here with is raised: the others wait for this host's devices. All must
    call it.
    """
    try:
        reasons = exchange.gather(_reason(error), math.inf if error is None else OUTCOME_SECONDS)
    except exchange.Absent:
        raise error or AssertionError("waits without end") from None
    return error or (RuntimeError(_first_of(reasons)) if any(reasons) else None)


def compare(settings: Callable[[], Mapping[str, Any]]) -> None:
    """ValueError on every host, with what differs, unless all have the same. All must call it."""
    if jax.process_count() == 1:
        return
    here = {name: str(value) for name, value in settings().items()}
    first_has = json.loads(exchange.broadcast(lambda: json.dumps(here)))
    told = exchange.gather(
        "\n  ".join(
            f"{name}: {first_has.get(name, 'absent')} -> {here.get(name, 'absent')}"
            for name in dict.fromkeys((*first_has, *here))
            if first_has.get(name) != here.get(name)
        )
    )
    differing = {}
    for host, text in enumerate(told):
        if text:
            differing.setdefault(text, []).append(str(host))
    if differing:
        raise ValueError(
            "the hosts do not run the same; from host 0 to "
            + "\nto ".join(f"host {', '.join(of)}:\n  {text}" for text, of in differing.items())
        )


def first_says(value: int) -> int:
    """The first process's value. All must call it."""
    return int(first_lists(np.asarray(value, np.int32)))


def first_lists(values: np.ndarray) -> np.ndarray:
    """The first process's values. All must call it."""
    return np.asarray(json.loads(exchange.broadcast(lambda: json.dumps(values.tolist()))))


def _reason(error: Exception | None) -> str:
    return "" if error is None else str(error).strip() or type(error).__name__


def _first_of(reasons: list[str]) -> str:
    host = next(host for host, reason in enumerate(reasons) if reason)
    return f"host {host} could not go on: {reasons[host]}"


def _give_up(seconds: int, hosts: int, where: str, asked: Peers | None) -> None:
    me = f"process {asked.process}" if asked else "this host"
    print(
        f"error: {me} waited {seconds} s, but not all {hosts} hosts{where} have started: start the "
        "same command on every host (python -m experiments.launch does), or look why another one ended; "
        "--host_timeout waits longer",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
