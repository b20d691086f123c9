"""Texts that the hosts of a run tell one another, and how an error on one of them ends all.

They go through the key-value store that `jax.distributed.initialize` starts on process 0. Unlike a collective
of devices that waits as long as it takes, lets signals through, and works while the devices compute, or hang
because a host has not come.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # JAX gives the store no public name

FAILED = "llama_jax/failed"  # the key under which the first host that fails says so
LOOK_SECONDS = 1.0  # between two looks at it
# Process 0 holds the store, and JAX aborts the other processes with a stack trace when it goes. So process 0
# waits at most LINGER_SECONDS for every process to announce its exit (5 s were too few on a busy host), then
# EXIT_SECONDS, because a process announces its exit before it exits.
LINGER_SECONDS = 20.0
EXIT_SECONDS = 2.0

_numbers = itertools.count()  # of what is told; every host counts alike
_over = threading.Event()


class Absent(RuntimeError):
    """Another host has not come in time."""


def gather(text: str, seconds: float = math.inf) -> list[str]:
    """Every host's text, by process. All must call it. Absent if they do not within so many seconds."""
    if jax.process_count() == 1:
        return [text]
    key, limit = f"llama_jax/{next(_numbers)}", time.monotonic() + seconds
    _store().key_value_set(f"{key}/{jax.process_index()}", text)
    if jax.process_index() == 0:
        texts = [_wait(f"{key}/{process}", limit) for process in range(jax.process_count())]
        _store().key_value_set(f"{key}/all", json.dumps(texts))
        return texts
    return json.loads(_wait(f"{key}/all", limit))


def broadcast(make: Callable[[], str]) -> str:
    """What process 0 has made. All must call it."""
    if jax.process_count() == 1:
        return make()
    key = f"llama_jax/{next(_numbers)}"
    if jax.process_index() == 0:
        text = make()
        _store().key_value_set(key, text)
        return text
    return _wait(key, math.inf)


def watch() -> None:
    """From now on an error that another host announces ends this process, whatever it is waiting for."""
    watcher = threading.Thread(target=_watch, daemon=True)
    watcher.start()

    @atexit.register  # before JAX takes the store away
    def end():
        _over.set()
        watcher.join()


def fail(message: str, code: int) -> None:
    """Announce an error of this host to the others and end this process with `code`, as they do.

    The usual end of a process of several would wait for the others, and they may be waiting for its devices.
    """
    _over.set()
    with contextlib.suppress(RuntimeError):  # another host was first
        _store().key_value_set(FAILED, json.dumps([jax.process_index(), message, code]))
    _leave(code)


def _watch() -> None:
    while not _over.wait(LOOK_SECONDS):
        try:
            who, message, code = json.loads(_store().key_value_try_get(FAILED))
        except RuntimeError:  # there is nothing; or no store, and then JAX ends this process
            continue
        print(f"error: host {who} ended: {message}", file=sys.stderr, flush=True)
        _leave(code)


def _leave(code: int) -> None:
    """Exit at once with `code`; process 0 exits last."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    keys = [f"llama_jax/left/{process}" for process in range(jax.process_count())]
    with contextlib.suppress(RuntimeError):  # not all of them still run
        _store().key_value_set(keys[jax.process_index()], "", allow_overwrite=True)
        if jax.process_index() == 0:
            limit = time.monotonic() + LINGER_SECONDS
            for key in keys:
                _wait(key, limit)
            time.sleep(EXIT_SECONDS)
    os._exit(code)


def _wait(key: str, limit: float) -> str:
    """The text under a key, once it is there. In short waits: Python handles signals in between."""
    while True:
        try:
            return _store().blocking_key_value_get(key, int(1000 * LOOK_SECONDS))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > limit:
            raise Absent("the other hosts have not come this far")


def _store() -> Any:
    return distributed.global_state.client
