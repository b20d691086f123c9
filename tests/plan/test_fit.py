import dataclasses
import importlib
from pathlib import Path

import pytest

from configs import hardware as hardware_configs
from llama_jax import config, sharding
from llama_jax.analysis import hardware, memory
from llama_jax.plan import fit, roofline
from llama_jax.train import program

ROOT = Path(__file__).resolve().parents[2]


def page(stem):
    return config.freeze(importlib.import_module(f"configs.{stem}").get_config())


def seconds(run, flops_per_token, slice_):
    layout = sharding.abstract(run.mesh, slice_.devices)
    return fit._seconds(run, layout, flops_per_token, slice_)


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
    executed = lambda found: fit.REMAT[found[0].run.model.remat]
    plenty = executed(fit.fits(small, "v5p_32"))
    assert plenty < 1.1 < executed(fit.fits(page("llama2_70b"), "v5p_32"))


def test_what_is_stored_costs_time_on_narrow_networks():
    """There HBM is the bound, and 'full' the fastest: compiled, 33% against 28% for 'linear' at 150M on v4-8."""
    assert fit.fits(page("research_150m"), "v4_8")[0].run.model.remat == "full"


def test_what_the_host_keeps_costs_its_way_there_and_back():
    """7B, batches of 2048 rows on 16 chips: q, k, v, what attention made of them, gate and up of 32 layers."""
    found = [one for one in fit.fits(page("7b"), "v4_32") if one.run.model.remat == "offload"]
    tokens = 2048 * 2048 / 16
    sent = tokens * 32 * (4 * 4096 + 2 * 11008) * 2
    for one in found:
        assert memory.offloaded(one.run, 16) == sent
        assert one.seconds >= 2 * sent / (roofline.HOST_GB_S * 1e9)
    assert found
    assert fit.fits(page("7b"), "v4_32")[0].run.model.remat != "offload"


def test_context_is_not_free():
    """The same run with positions over four chips exchanges heads in every layer."""
    run = dataclasses.replace(page("llama31_8b"), mesh=config.Mesh(fsdp=64, hardware="v5p_128"))
    wide = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, fsdp=16, context=4))
    slice_ = hardware.SLICES["v5p_128"]
    assert seconds(wide, 1e9, slice_) > seconds(run, 1e9, slice_)


def test_shards_are_whole_tiles():
    """Of 104 rows (6656 over 64) the compiler makes all-reduces of whole parameters: MFU 36% instead of 54%."""
    found = fit.fits(page("33b"), "v4_128")
    shards = {6656 // (one.run.mesh.fsdp * one.run.mesh.context) for one in found}
    assert 208 in shards
    assert 104 not in shards


def test_gradients_are_reduced_in_the_open_but_on_sparse_cores():
    """7B over 16 chips, 8 microbatches and 1: on v4 seven more reductions of 13 GB each."""
    model = dataclasses.replace(page("7b").model, remat="full")
    train = lambda parts: dataclasses.replace(page("7b").train, microbatches=parts)
    run = dataclasses.replace(page("7b"), model=model, mesh=config.Mesh(fsdp=16))
    more = lambda name: (
        seconds(dataclasses.replace(run, train=train(8)), 4e10, hardware.SLICES[name])
        - seconds(dataclasses.replace(run, train=train(1)), 4e10, hardware.SLICES[name])
    )
    layers = 2 * 32 * 4096 * (4 * 4096 + 3 * 11008)
    links = roofline.links("v4:2x2x4", 16)
    assert more("v4_32") == pytest.approx(7 * layers * 15 / 16 / (45e9 * links))
    assert more("v5p_32") == 0


def test_the_published_run_of_65b_is_laid_out_over_2048_gpus():
    """380 tokens/s of each (arXiv:2302.13971 section 2.4); the row of docs/scale.md is what the formula gives."""
    run = page("65b")
    best = fit.fits(run, "a100_2048")[0]
    layout, mesh = sharding.abstract(best.run.mesh, 2048), best.run.mesh
    program.build(best.run, layout)
    assert mesh.fsdp > 8, "65B does not fit one node: 780 GB of state over 8 GPUs"
    rate = run.tokens_per_step / best.seconds / 2048
    assert rate == pytest.approx(380, rel=0.2)
    row = (
        f"| LLAMA_65B | a100_2048 | data {mesh.data} x fsdp {mesh.fsdp} | {best.run.model.remat} | "
        f"{best.need.total:.1f} | {rate:.0f} | 380 |"
    )
    assert row in (ROOT / "docs/scale.md").read_text()


def test_gpus_hold_what_fits_into_the_memory_that_jax_gives_them():
    """Within 0.93 of 79.1 GiB, and 8% spare; before there was a share of 75%, which some exceeded."""
    for stem in ("7b", "llama2_7b", "llama32_3b", "research_1b"):
        for name in ("a100_8", "h100_8", "h100_64"):
            assert fit.fits(page(stem), name)[0].need.total <= 0.92 * 73.6


def test_a_batch_that_does_not_divide_by_the_nodes_is_said():
    with pytest.raises(
        ValueError, match=r"h100_24, has 24 devices: train.batch_size=256 must divide by 3"
    ):
        hardware_configs.lay_out(page("research_1b"), "h100-24")


def test_between_nodes_a_group_has_the_ports_of_its_members():
    """A100: NVLink 300 GB/s; 8 ports of 25 GB/s for a group of whole nodes, one port for every eighth GPU."""
    slice_ = hardware.find_slice("a100_64")
    seconds = lambda parts, apart: roofline.exchange(slice_, "all-gather", 64e9, parts, apart)
    assert seconds(8, 1) == pytest.approx(64 * 7 / 8 / 300)
    assert seconds(64, 1) == pytest.approx(64 * 63 / 64 / 200)
    assert seconds(8, 8) == pytest.approx(64 * 7 / 8 / 25)
    assert seconds(16, 4) == pytest.approx(64 * 15 / 16 / 50)
