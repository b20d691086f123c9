import dataclasses
import importlib

import pytest

from llama_jax import config, sharding
from llama_jax.analysis import hardware
from llama_jax.plan import fit
from llama_jax.train import program


def page(stem):
    return config.freeze(importlib.import_module(f"configs.{stem}").get_config())


@pytest.mark.parametrize(
    ("stem", "name"),
    [("7b", "v4_32"), ("65b", "v4_512"), ("llama31_8b", "v5p_64"), ("research_1b", "v3_8")],
)
def test_what_is_proposed_divides_and_is_ordered(stem, name):
    found = fit.fits(page(stem), name)
    assert found
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    slice_ = hardware.SLICES[name]
    for one in found[:3]:
        built = program.build(one.run, sharding.abstract(one.run.mesh, slice_.devices))
        assert built.module.config.kernel == slice_.kernel
        assert one.need.total <= hardware.DEVICES[slice_.device].hbm_gib
        assert one.run.tokens_per_step == page(stem).tokens_per_step, "the batch stays as it is"


def test_a_network_that_is_too_large_has_no_layout():
    assert fit.fits(page("65b"), "v4_8") == []


def test_more_memory_is_spent_on_less_recomputation():
    small = dataclasses.replace(page("research_1b"), data=config.Data(seq_len=2048))
    assert fit.fits(small, "v5p_32")[0].run.model.remat == "none"
    assert fit.fits(page("llama2_70b"), "v5p_64")[0].run.model.remat != "none"
