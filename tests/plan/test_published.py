"""The brackets of benchmarks/scale.json beside what others measured on TPUs. Nothing is compiled."""

import re

import pytest

from benchmarks import published, scale
from tests.experiments import helpers

KEPT = scale.read()
NAMED = lambda one: f"{one.network} {one.slice} {one.tokens:g}"


@pytest.mark.parametrize("one", published.COMPARED, ids=NAMED)
def test_a_bracket_holds_the_published_mfu_or_says_why_not(one):
    run = published.ours(one)()
    plan = scale.plan_of(run, KEPT[scale.key_of(run)])
    if not plan.fits:
        assert one.outside
        return
    assert plan.mfu_high / plan.mfu_low < 1.351
    holds = plan.mfu_low <= scale.mfu(one) <= plan.mfu_high
    assert holds != bool(one.outside)


def test_most_brackets_hold_and_half_of_the_runs_are_not_fitted():
    compared = published.COMPARED
    assert sum(not one.outside for one in compared) >= len(compared) - 1
    assert sum(one.fitted for one in compared) <= len(compared) / 2


@pytest.mark.parametrize(
    ("network", "slice_", "square", "wanted"),
    [
        ("llama31_8b", "v6e_8", "whole", 0.450),
        ("llama31_8b", "v6e_256", "whole", 0.455),
        ("llama31_70b", "v6e_256", "whole", 0.503),
        ("llama31_405b", "v5p_1024", "half", 314.5 / 459),
        ("llama31_70b", "v7x_128", "half", 1207 / 2307),
    ],
)
def test_tokens_give_the_published_figure_by_the_convention_that_is_said(
    network, slice_, square, wanted
):
    one = next(
        one
        for one in published.COMPARED
        if (one.network, one.slice, one.square) == (network, slice_, square)
    )
    assert scale.mfu(one, square) == pytest.approx(wanted, rel=3e-3)


def test_rows_are_of_the_compiler_that_make_installs():
    pinned = re.search(r"libtpu==([\d.]+)", (helpers.ROOT / "Makefile").read_text()).group(1)
    assert {kept["libtpu"] for kept in KEPT.values()} == {pinned}


@pytest.mark.slow  # every row is traced
def test_rows_of_an_earlier_program_are_marked():
    """After a change of the step: python -m benchmarks.scale --write, or compile them anew."""
    for run in scale.runs():
        if kept := KEPT.get(scale.key_of(run)):
            assert scale.differs(kept, run) == ({"program"} if kept["earlier"] else set()), kept[
                "row"
            ]
