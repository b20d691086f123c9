"""Exact parameter counts of every published network, from shapes alone."""

import pytest

from configs import sizes
from llama_jax import tree
from llama_jax.analysis import flops
from llama_jax.model import transformer

# Counted from the released checkpoints.
PUBLISHED = {
    "LLAMA_7B": 6_738_415_616,
    "LLAMA_13B": 13_015_864_320,
    "LLAMA_33B": 32_528_943_616,
    "LLAMA_65B": 65_285_660_672,
    "LLAMA2_7B": 6_738_415_616,
    "LLAMA2_13B": 13_015_864_320,
    "LLAMA2_70B": 68_976_648_192,
    "LLAMA3_8B": 8_030_261_248,
    "LLAMA3_70B": 70_553_706_496,
    "LLAMA31_8B": 8_030_261_248,
    "LLAMA31_70B": 70_553_706_496,
    "LLAMA31_405B": 405_853_388_800,
    "LLAMA32_1B": 1_235_814_400,
    "LLAMA32_3B": 3_212_749_824,
}
RESEARCH = {
    "RESEARCH_300K": 0.3e6,
    "RESEARCH_1M": 1e6,
    "RESEARCH_10M": 10e6,
    "RESEARCH_60M": 60e6,
    "RESEARCH_150M": 150e6,
    "RESEARCH_350M": 350e6,
    "RESEARCH_1B": 1e9,
}


def count(name, layout):
    return tree.count(transformer.abstract(transformer.build(getattr(sizes, name), layout)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_size(name, layout):
    assert count(name, layout) == PUBLISHED[name]


@pytest.mark.parametrize("name", RESEARCH)
def test_research_networks_are_about_as_large_as_their_name(name, layout):
    assert count(name, layout) == pytest.approx(RESEARCH[name], rel=0.1)


def test_no_size_is_left_out():
    assert {name for name in vars(sizes) if name.isupper() and name[0] != "_"} == {
        *PUBLISHED,
        *RESEARCH,
    }


def test_model_flops_of_7b_are_maxtexts_to_the_digit(layout):
    module = transformer.build(sizes.LLAMA_7B, layout)
    assert 4 * 2048 * flops.per_token(module, 2048) == 337_945_206_718_464
