import os
import signal

import pytest

from llama_jax.interrupt import Interrupt


def test_a_second_signal_acts_at_once():
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_hosts_stop_one_call_after_a_signal_at_any_of_them_or_at_once_if_they_wait():
    """The other host has a SIGTERM before the third call; this host a SIGINT before the first."""
    elsewhere = iter([0, 0, signal.SIGTERM, signal.SIGTERM])
    interrupt = Interrupt(lambda here: max(here, next(elsewhere)))
    assert [interrupt.due() for _ in range(4)] == [False, False, False, True]
    assert interrupt.signal == "SIGTERM"

    with Interrupt(lambda here: here) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == "", "the other hosts do not know it yet"
        assert interrupt.due(wait=True)
        assert interrupt.signal == "SIGINT"
