"""Joining the processes of a run that spans hosts, one process a host; before JAX's first array.

On the hosts of a TPU slice the same command finds its peers by itself. Elsewhere each process says where
process 0 listens and which one it is:

    python -m experiments.train ... --coordinator=10.0.0.2:8476 --processes=2 --process=0
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from llama_jax import config
from llama_jax.analysis import hardware

COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT on which process 0 listens; a TPU slice knows it by itself."
)
PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Processes of the run, one a host; a TPU slice knows it by itself."
)
PROCESS = flags.DEFINE_integer("process", -1, "Which of --processes this is, from 0.")
TIMEOUT = flags.DEFINE_integer(
    "host_timeout", 60, "Seconds to wait until every host has started.", lower_bound=1
)

T = TypeVar("T")

# A process whose peers died waits so long at exit, instead of JAX's 300 s.
SHUTDOWN_SECONDS = 120


def join(slice_name: str) -> None:
    """Meet the other processes, if the command line or the slice says that there are any.

    Exits with 1 and the reason when they have not all come after --host_timeout seconds. ValueError if
    the flags contradict each other. All but the first process are silent from here on.
    """
    given = (bool(COORDINATOR.value), PROCESSES.value > 0, PROCESS.value >= 0)
    if any(given):
        if not all(given) or PROCESS.value >= PROCESSES.value:
            raise ValueError(
                f"--coordinator={COORDINATOR.value!r} --processes={PROCESSES.value} "
                f"--process={PROCESS.value}: give all three, --process from 0 to --processes - 1"
            )
        hosts, where = PROCESSES.value, f" at {COORDINATOR.value}"
        asked = (COORDINATOR.value, hosts, PROCESS.value)
    else:
        named = slice_name != "any"
        hosts = hardware.find_slice(slice_name, "mesh.hardware").hosts if named else 1
        where, asked = f" of {slice_name}", (None, None, None)
    if hosts == 1:
        return
    # JAX would abort with a stack trace, or wait for ever in the accelerator's own rendezvous.
    watchdog = threading.Timer(TIMEOUT.value, _give_up, (hosts, where))
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            *asked,
            initialization_timeout=10 * TIMEOUT.value,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError:  # no cluster that JAX knows: the check of the devices says what is missing
        if any(given):
            raise
    finally:
        watchdog.cancel()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for the rest of the process


def check(mesh: config.Mesh) -> None:
    """ValueError unless the devices are those of the slice that `mesh` was laid out for, if it was."""
    if mesh.hardware == "any":
        return
    wanted = hardware.find_slice(mesh.hardware, "mesh.hardware")
    kind, count = jax.devices()[0].device_kind, jax.device_count()
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


def agree(here: bool) -> bool:
    """Whether it is so on every host. All must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


def together(work: Callable[[], T]) -> T:
    """`work()` on every host; where it fails on one, all of them stop with a reason. All must call it."""
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = caught
    if agree(error is None):
        return result
    raise error or ValueError("another host could not go on; what it printed says why")


def first_says(value: int) -> int:
    """The first process's value. All must call it."""
    return int(first_lists(np.asarray(value, np.int32)))


def first_lists(values: np.ndarray) -> np.ndarray:
    """The first process's values, of one shape everywhere. All must call it."""
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def _give_up(hosts: int, where: str) -> None:
    me = f"process {PROCESS.value}" if PROCESS.value >= 0 else "this host"
    print(
        f"error: {me} waited {TIMEOUT.value} s, but not all {hosts} hosts{where} have started: start the "
        "same command on every host (python -m experiments.launch does), or look why another one ended; "
        "--host_timeout waits longer",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
