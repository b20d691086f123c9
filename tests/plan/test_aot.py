"""TPU's own compiler on small networks: what FSDP must and must not turn into, and how far formulas are off."""

import dataclasses
import functools

import pytest

from llama_jax import config, sharding
from llama_jax.analysis import flops, hardware, memory
from llama_jax.plan import aot, figures
from llama_jax.train import program

MODEL = config.Model(
    vocab_size=8192, dim=1024, layers=4, heads=8, kv_heads=8, ffn_dim=2816, kernel="splash", remat="full"
)  # fmt: skip
RUN = config.Run(
    model=MODEL,
    data=config.Data(seq_len=1024),
    train=config.Train(batch_size=64),
    mesh=config.Mesh(hardware="v4_32"),
)


@functools.cache
def compiled(run=RUN):
    return aot.compile(run, run.mesh.hardware)


def formula(run):
    slice_ = hardware.SLICES[run.mesh.hardware]
    layout = sharding.abstract(run.mesh, slice_.devices)
    built = program.build(run, layout)
    return memory.need(run, layout, built.state, slice_.device), built


@pytest.mark.slow  # a minute of both cores
def test_gradients_are_scattered_and_gathers_hide_behind_work():
    for one in compiled().collectives:
        if one.in_loop:
            assert one.kind != "all-reduce" or one.bytes <= 2**20, one
            assert one.kind != "all-gather" or one.started, one
    kinds = {one.kind for one in compiled().collectives if one.in_loop}
    assert "all-gather" in kinds
    assert kinds & {"collective-permute", "reduce-scatter"}


@pytest.mark.slow  # half a minute of the compiler
def test_arguments_are_the_state_and_no_device_has_more_than_its_part():
    need, _ = formula(RUN)
    assert compiled().argument_gib == pytest.approx(need.state, rel=0.02)


@pytest.mark.slow  # the same program
def test_full_recomputation_executes_a_third_more():
    """A forward pass again, without the last product of a layer and the vocabulary's."""
    _, built = formula(RUN)
    model = flops.per_token(built.module, 1024) * RUN.tokens_per_step / 16
    assert 1.2 < compiled().flops / model < 1.33


def test_what_does_not_fit_is_said_with_the_compilers_numbers():
    big = dataclasses.replace(
        RUN, train=config.Train(batch_size=16384), mesh=config.Mesh(hardware="v4_8")
    )
    with pytest.raises(aot.DoesNotFit, match=r"(?i)hbm"):
        aot.compile(big, "v4_8")
    assert not figures.plan(big, "v4_8", compile=False).fits


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(aot, "PLACES", ())
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(
        ValueError, match=r"needs libtpu; install it with: pip install -e '\.\[tpu\]'$"
    ):
        aot.compile(RUN, "v4_32")


@pytest.mark.slow
def test_the_compiler_leaves_nothing_in_this_process(capfd):
    import os
    import sys

    compiled()
    assert "libtpu" not in sys.modules
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in os.environ
    assert capfd.readouterr().err == ""
