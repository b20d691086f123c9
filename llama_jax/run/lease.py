"""The lease of a workdir: one process at a time trains in it.

`lease.json` names the process that holds the workdir. A thread of that process writes the file anew every
RENEW_SECONDS, also during a step or an evaluation of many minutes, and its end removes it. Whoever finds the
file takes the workdir over when the holder is dead: at once where its process can be looked up, which is on
the same host, otherwise when the file has not changed for EXPIRY_SECONDS. That is measured by watching it, so
clocks of hosts need not agree. No lock of the file system is used: mounted buckets have none.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax import files

FILE = "lease.json"
RENEW_SECONDS = 15.0
EXPIRY_SECONDS = 120.0  # mounted buckets and NFS may show a file as it was a minute ago
# Of two processes that start at once the last to write holds the workdir: each looks again so much later.
SETTLE_SECONDS = 0.5


class Held(ValueError):
    """Another process holds the workdir."""

    exit_code = (
        75  # EX_TEMPFAIL of sysexits.h: later it may work, and experiments.launch tries again
    )


class Lease:
    """What a process has of a workdir between `take` and `release`."""

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / FILE
        self._me = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "place": _place(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self._renewals = 0
        self._written = 0.0  # when, by this host's clock
        self._other = ""  # the reason, once another process has taken the workdir over
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, report: Callable[[str], None] = print) -> str:
        """Hold the workdir. "", or why that cannot be: who holds it. `report` is told of a wait."""
        try:
            if refusal := self._outlived(report):
                return refusal
            self._write()
        except OSError as error:
            why = f"--workdir={self._workdir} cannot be written: {error.strerror}"
            raise ValueError(why) from error
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return ""

    def confirm(self) -> str:
        """Look again before the first write into the workdir. "", or who was given it instead."""
        time.sleep(max(self._written + SETTLE_SECONDS - time.time(), 0.0))
        return self._renew() or self._other

    def check(self) -> None:
        """Held if another process has taken over what this one held: it was stopped for so long."""
        if self._thread is None:  # of a host that is not the first
            return
        if time.time() - self._written > EXPIRY_SECONDS / 2:
            with contextlib.suppress(OSError):
                self._renew()
        if self._other:
            raise Held(self._other)

    def release(self) -> None:
        """Give the workdir back, if it was held."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):
            if _holder(self._read()).get("id") == self._me["id"]:
                self._path.unlink()

    def _outlived(self, report: Callable[[str], None]) -> str:
        """Wait until nobody else holds the workdir; or who does."""
        seen = self._read()
        holder = _holder(seen)
        if seen == "" or (holder.get("place") == self._me["place"] and not _lives(holder)):
            return ""
        if holder.get("place") == self._me["place"]:
            return self._in_use(holder)
        report(
            f"{self._path} is of {_described(holder)}, which cannot be asked from here; the workdir is taken "
            f"over if the file does not change for {EXPIRY_SECONDS:.0f} s"
        )
        until = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < until:
            time.sleep(RENEW_SECONDS / 5)
            now = self._read()
            if now == "":
                return ""
            if now != seen:
                return self._in_use(_holder(now))
        return ""

    def _in_use(self, holder: dict[str, Any]) -> str:
        return (
            f"--workdir={self._workdir} is in use: {_described(holder)} holds it since "
            f"{holder.get('since', 'some time')}; wait for its end, stop it, or give another --workdir"
        )

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self._other:
            with contextlib.suppress(OSError):  # a full disk, a network that is away: try again
                self._renew()

    def _renew(self) -> str:
        """Write the lease again, unless another process has written its own; who, then."""
        holder = _holder(self._read())
        if holder.get("id", self._me["id"]) != self._me["id"]:
            self._other = self._in_use(holder)
            return self._other
        self._write()
        return ""

    def _write(self) -> None:
        self._renewals += 1
        content = {**self._me, "renewals": self._renewals}
        files.write(self._path, json.dumps(content, indent=2) + "\n")
        self._written = time.time()

    def _read(self) -> str:
        """What the file says; "" if there is none."""
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""


def _holder(content: str) -> dict[str, Any]:
    """Empty if the content is none of ours."""
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _place() -> str:
    """Where process numbers mean the same: a host since it was started, and a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # other systems than Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process still is, on this host; its number may have been given to another since."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    started = _start_of(pid)
    return started is None or started == holder.get("started")


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since the host was; "" if it has ended, None if unknown."""
    try:
        # The name of a program, in parentheses, may hold anything.
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # another system than Linux, or other users' processes are hidden
        return None
    return "" if after[0] in "ZX" else after[19]
