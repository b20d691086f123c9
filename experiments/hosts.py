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
        hosts = 1 if slice_name == "any" else hardware.SLICES[slice_name].hosts
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
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


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
