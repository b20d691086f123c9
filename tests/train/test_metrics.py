import json
import resource
import signal
import sys

import pytest

from llama_jax import files
from llama_jax.train import metrics

ROW = {
    "step": 10, "loss": 4.1234, "tokens_per_second": 3456.7, "mfu": None, "eta_seconds": 3725,
    "stall": 0.001,
}  # fmt: skip


def test_rows_after_the_restored_step_are_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (5, 10, 15)]
    path.write_text("\n".join(lines) + '\n{"step": 20, "lo')
    metrics.jsonl(path, 10)({"step": 11, "loss": 0.5})
    assert metrics.read(path) == [
        {"step": 5, "loss": 0.2}, {"step": 10, "loss": 0.1}, {"step": 11, "loss": 0.5},
    ]  # fmt: skip


def test_floats_come_back_exactly(tmp_path):
    write = metrics.jsonl(tmp_path / "m.jsonl", 0)
    write({"step": 1, "loss": 0.1 + 0.2})
    assert metrics.read(tmp_path / "m.jsonl")[0]["loss"] == 0.1 + 0.2


def test_a_line_for_the_console():
    text = metrics.describe(ROW)
    assert text == "loss 4.1234  3,457 tokens/s  MFU unknown  ETA 1:02:05  stall 0.1%"
    text = metrics.describe({**ROW, "mfu": 0.412, "validation_loss": 3.5})
    assert "MFU 41.2%" in text
    assert text.endswith("validation 3.5000")


def test_plain_lines_where_there_is_no_terminal(capsys):
    console = metrics.Console(0, 40)
    console.write(ROW)
    console.say("WARNING: look")
    console.close()
    out, err = capsys.readouterr()
    assert out.startswith("step 10/40  loss 4.1234")
    assert "WARNING: look" in out
    assert err == ""


def test_tensorboard_holds_every_scalar(tmp_path, monkeypatch):
    from tensorboardX.proto import event_pb2

    at_exit = []
    monkeypatch.setattr(metrics.atexit, "register", at_exit.append)
    metrics.tensorboard(tmp_path, 0)({**ROW, "validation_loss": 3.5})
    for call in at_exit:
        call()
    (file,) = tmp_path.glob("events.*")
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    assert found["loss"] == (10, pytest.approx(4.1234))
    assert found["validation_loss"] == (10, 3.5)
    assert "mfu" not in found


def test_wandb_absent_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb='on' but the package is absent; pip install"):
        metrics.wandb(tmp_path, {})


def test_wandb_gets_the_rows(tmp_path, monkeypatch):
    """Against a stand-in: the service is not reachable from a test."""

    class Client:
        def init(self, **settings):
            self.settings, self.logged = settings, []
            return self

        def log(self, values, step):
            self.logged.append((step, values))

    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    metrics.wandb(tmp_path, {"a": 1})({"step": 3, "loss": 2.0})
    assert client.logged == [(3, {"loss": 2.0})]
    assert client.settings["resume"] == "allow"


def test_a_full_disk_says_which_file(tmp_path):
    """A limit on the size of a file stands for it. The lines that are there stay whole."""
    path = tmp_path / "m.jsonl"
    write = metrics.jsonl(path, 0)
    write({"step": 1, "loss": 0.5})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limit[1]))
    try:
        with pytest.raises(OSError, match=r"m\.jsonl"):
            write({"step": 2, "loss": 0.5})
        with pytest.raises(OSError, match=r"run\.json"):
            files.write(tmp_path / "run.json", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    metrics.jsonl(path, 9)
    assert metrics.read(path) == [{"step": 1, "loss": 0.5}]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]
