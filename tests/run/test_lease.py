"""Who may train in a workdir, and what becomes of a workdir whose process has died."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llama_jax.run import lease
from tests.experiments import helpers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.4)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir."""
    code = "from llama_jax.run import lease; import pathlib, sys, time; \
        held = lease.Lease(pathlib.Path(sys.argv[1])); print(held.take(), flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def said(tmp_path):
    return json.loads((tmp_path / lease.FILE).read_text())


def of_another_host(tmp_path, **more):
    content = {"id": "x", "host": "far", "pid": 7, "place": "far", "since": "noon", **more}
    (tmp_path / lease.FILE).write_text(json.dumps(content))


def test_the_second_process_is_told_who_holds_the_workdir(tmp_path, holder):
    refusal = lease.Lease(tmp_path).take(pytest.fail)
    assert f"--workdir={tmp_path} is in use: process {holder.pid} on " in refusal
    assert f"holds it since {said(tmp_path)['since']}" in refusal
    assert "wait for its end, stop it, or give another --workdir" in refusal
    assert said(tmp_path)["pid"] == holder.pid, "and nothing was changed"


def test_after_kill_minus_9_the_workdir_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    while lease._start_of(holder.pid):  # it is not waited for: what is left of it is a zombie
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{holder.pid}")
    held = lease.Lease(tmp_path)
    assert held.take(pytest.fail) == ""
    assert said(tmp_path)["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / lease.FILE).exists()


def test_a_process_number_that_was_given_again_is_not_the_holder(tmp_path, holder):
    content = {**said(tmp_path), "started": "1"}
    assert lease._lives(said(tmp_path))
    assert not lease._lives(content)


def test_a_process_that_cannot_be_looked_at_is_alive(tmp_path, holder, monkeypatch):
    """Of another user, where those are hidden: its number is known to be in use, no more."""
    monkeypatch.setattr(lease, "_start_of", lambda _: None)
    assert lease._lives(said(tmp_path))


def test_a_lease_that_cannot_be_written_names_the_workdir(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease.files, "write", write)
    held = lease.Lease(tmp_path)
    with pytest.raises(ValueError, match=rf"--workdir={tmp_path} cannot be written: No space left"):
        held.take()
    held.release()


def test_a_dead_lease_of_another_host_is_taken_over_after_the_expiry(tmp_path):
    of_another_host(tmp_path)
    told, start = [], time.monotonic()
    held = lease.Lease(tmp_path)
    assert held.take(told.append) == ""
    assert 0.4 <= time.monotonic() - start < 5
    assert "is of process 7 on far, which cannot be asked from here" in told[0]
    held.release()


def test_a_live_lease_of_another_host_is_noticed_whatever_its_clock_says(tmp_path, monkeypatch):
    """It changes: that is all that is looked at."""
    of_another_host(tmp_path, since="1970-01-01T00:00:00+00:00")
    beats = iter(range(1000))
    monkeypatch.setattr(
        lease.time, "sleep", lambda _: of_another_host(tmp_path, renewals=next(beats))
    )
    refusal = lease.Lease(tmp_path).take(lambda _: None)
    assert "is in use: process 7 on far holds it since noon" in refusal


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_torn_lease_expires_too(tmp_path, content):
    (tmp_path / lease.FILE).write_text(content)
    held = lease.Lease(tmp_path)
    assert held.take(lambda _: None) == ""
    held.release()


def test_the_lease_is_renewed_while_nothing_else_happens(tmp_path):
    held = lease.Lease(tmp_path)
    held.take()
    first = said(tmp_path)["renewals"]
    deadline = time.monotonic() + 10
    while said(tmp_path)["renewals"] < first + 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said(tmp_path)["renewals"] >= first + 3
    held.check()
    held.release()


def test_of_two_that_start_at_once_the_last_to_write_holds_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 60.0)
    one, other = lease.Lease(tmp_path), lease.Lease(tmp_path)
    for both in (one, other):  # each has seen that there is no lease
        monkeypatch.setattr(both, "_outlived", lambda _: "")
        assert both.take() == ""
    assert "is in use: process" in one.confirm()
    assert other.confirm() == ""
    with pytest.raises(lease.Held, match="is in use"):
        one.check()
    other.check()
    one.release()
    assert said(tmp_path)["id"] == other._me["id"], "it does not remove another's"
    other.release()


def test_a_process_that_was_stopped_for_so_long_that_another_took_over_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 60.0)
    held = lease.Lease(tmp_path)
    held.take()
    of_another_host(tmp_path)
    held._written -= 10  # the time in which it was stopped
    with pytest.raises(lease.Held, match="process 7 on far"):
        held.check()
    held.release()
    assert said(tmp_path)["host"] == "far"


def test_hosts_that_do_not_hold_the_lease_leave_it_alone(tmp_path):
    """Of several hosts the first one holds it; all of them save."""
    first, second = lease.Lease(tmp_path), lease.Lease(tmp_path)
    first.take()
    second.check()
    second.release()
    first.check()
    assert said(tmp_path)["id"] == first._me["id"]
    first.release()


def test_a_disk_that_is_full_for_a_while_loses_no_lease(tmp_path, monkeypatch):
    held = lease.Lease(tmp_path)
    held.take()
    write, failing = lease.files.write, [OSError(28, "No space left on device")] * 3

    def maybe(*args):
        if failing:
            raise failing.pop()
        write(*args)

    monkeypatch.setattr(lease.files, "write", maybe)
    before, deadline = said(tmp_path)["renewals"], time.monotonic() + 10
    while said(tmp_path)["renewals"] <= before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not failing
    held.check()
    held.release()
