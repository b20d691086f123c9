"""Signals that ask a run to stop: noted, so that work can end between two steps and be saved."""

import signal
from collections.abc import Callable
from typing import Any


class Interrupt:
    """Notes the name of the first SIGINT or SIGTERM in `signal`; a second one acts at once.

    On several hosts (`largest` given) a signal at any of them is noted by all at the same call of `due`,
    which all make equally often.
    """

    def __init__(self, largest: Callable[[int], Any] | None = None):
        """largest: of one number from each host, for `int` to wait for: `sharding.Largest`."""
        self.signal = ""
        self._here = 0  # the signal at this host, of several
        self._largest = largest
        self._asked: Any = None  # what all hosts say to the last call

    def __enter__(self):
        both = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in both}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self, wait: bool = False) -> bool:
        """Whether to stop before what comes next: a step, a batch, a round of decoding, a run.

        Several hosts know it one call later, when their devices have done what was before the last call, so
        that asking costs no time; with `wait` they know it now, and wait for the devices.
        """
        if self._largest:
            before, self._asked = self._asked, self._largest(self._here)
            answer = self._asked if wait else before
            if answer is not None and (number := int(answer)):
                self.signal = signal.Signals(number).name
        return bool(self.signal)

    def _note(self, number, _):
        if self._largest:
            self._here = number
        else:
            self.signal = signal.Signals(number).name
        for other, handler in self._before.items():
            signal.signal(other, handler)
