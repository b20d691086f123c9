"""What every command shares: how GPUs are taken, and what a mistyped command line is told."""

import ast
import os
from pathlib import Path

import pytest
from jaxlib import xla_client

from experiments import cli


def test_jax_takes_the_share_of_a_gpu_that_layouts_count_on(monkeypatch):
    """Before it starts; what the user has set, under either name, stays."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.setenv(name, "restored after the test")
        monkeypatch.delenv(name)
    cli._guarded(lambda: 0, ())
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.93
    for name in names:
        for other in names:
            os.environ.pop(other, None)
        monkeypatch.setenv(name, "0.5")
        cli._guarded(lambda: 0, ())
        assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5


def test_every_flag_that_is_a_path_refuses_the_address_of_a_bucket():
    """But those of launch, whose paths are on the hosts."""
    paths = {"workdir", "from", "to", "tokenizer", "checkpoint", "draft", "input", "output", "text"}
    paths |= {"runs", "out"}
    found = set()
    for file in sorted(Path(cli.__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            function = getattr(getattr(call, "func", None), "attr", "")
            if not function.startswith(("DEFINE", "define_path")) or file.name == "launch.py":
                continue
            name = getattr(call.args[0], "value", "")
            if name in paths:
                assert function == "define_path", f"{file.name}: --{name}"
                found.add(name)
    assert found == paths
    with pytest.raises(ValueError, match=r"mount the bucket with .* and give ~/bucket/x/y"):
        cli._Path().parse("gs://b/x/y")
    assert cli._Path().parse("~/a/b:c") == "~/a/b:c"
