"""What every command shares: how GPUs are taken, and what a mistyped command line is told."""

import os

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
