import pytest

from configs import research_300k
from configs.ablations import ffn, norm, position
from llama_jax import config
from llama_jax.study import grid, schema


def study(axes, **settings):
    return schema.freeze(schema.edit(research_300k.get_config(), axes, {}, **settings))


POSITION = {
    "rope": {},
    "alibi": {"model": {"position": "alibi"}},
    "none": {"model": {"position": "none"}},
}
FFN = {"swiglu": {}, "gelu": {"model": {"ffn": "gelu"}}}


def names(axes, **settings):
    return [cell.name for cell in grid.cells(study(axes, **settings))]


def test_one_at_a_time_changes_one_axis():
    assert names({"position": POSITION, "ffn": FFN}) == [
        "swiglu+rope", "swiglu+alibi", "swiglu+none", "gelu+rope",
    ]  # fmt: skip


def test_full_is_every_combination_the_base_first():
    found = names({"position": POSITION, "ffn": FFN}, grid="full")
    assert found[0] == "swiglu+rope"
    assert len(found) == len(set(found)) == 6


def test_listed_adds_the_base():
    found = names({"position": POSITION, "ffn": FFN}, grid="listed", cells=("gelu+alibi",))
    assert found == ["swiglu+rope", "gelu+alibi"]


def test_cells_differ_from_the_base_in_their_choice_alone():
    base, alibi, _ = grid.cells(study({"position": POSITION}))
    assert config.diff(base.run, alibi.run) == ["model.position: rope -> alibi"]
    assert alibi.choices == {"position": "alibi"}


def test_seeds_change_initial_values_and_order_and_come_seed_by_seed():
    made = study({"position": POSITION}, seeds=2)
    cells = grid.cells(made)
    order = [(cell.name, seed) for cell, seed in grid.runs(made, cells)]
    assert order == [(cell.name, seed) for seed in (0, 1) for cell in cells]
    one = grid.seeded(cells[0].run, 1)
    assert config.diff(cells[0].run, one) == ["data.seed: 0 -> 1", "train.seed: 0 -> 1"]


def test_matched_parameters_follow_the_two_thirds_rule():
    """Three matrices of 160 against two of 240 (arXiv:2002.05202 section 3): the same number exactly."""
    base, gelu = grid.cells(study({"ffn": FFN}, match="parameters"))
    assert (base.run.model.ffn_dim, gelu.run.model.ffn_dim) == (160, 240)
    assert base.parameters == gelu.parameters
    assert gelu.flops_per_token == base.flops_per_token


def test_matched_flops():
    tied = {"untied": {}, "wide": {"model": {"dim": 72, "head_dim": 18}}}
    base, wide = grid.cells(study({"width": tied}, match="flops"))
    # 8 of ffn width are 6 x 4 layers x 3 matrices x 72 x 8 FLOPs a token; half of it is the most that is missed.
    assert abs(wide.flops_per_token - base.flops_per_token) <= 6 * 4 * 3 * 72 * 4
    assert wide.run.model.ffn_dim < base.run.model.ffn_dim


@pytest.mark.parametrize(
    ("axes", "settings", "message"),
    [
        ({"position": {"rope": {}, "x": {"model": {"position": "rop"}}}}, {}, "model.position='rop' is not one of rope,.*nearest: 'rope'"),
        ({"position": {"rope": {}, "x": {"model": {"positon": "none"}}}}, {}, "model.positon is not a setting; nearest: model.position"),
        ({"position": {"rope": {}, "x": {"model": {"position": "rope"}}}}, {}, "exactly one choice that is as the base is; it has rope, x"),
        ({"kernel": {"own": {}, "x": {"model": {"kernel": "reference"}}}}, {}, "x computes the same as own"),
        ({"position": {**POSITION, "x": {"model": {"position": "none"}}}}, {}, "x computes the same as none"),
        ({"heads": {"own": {}, "x": {"model": {"kv_heads": 3}}}}, {}, "x: model.kv_heads=3 must divide model.heads=4"),
        ({"cap": {"own": {}, "x": {"model": {"kernel": "cudnn", "softcap": 30.0}}}}, {}, "x: model.kernel='cudnn' cannot do model.softcap=30.0"),
        ({"a": FFN, "b": {"own": {}, "relu": {"model": {"ffn": "relu"}}}}, {"grid": "full"}, r"gelu\+relu: two of its choices set model.ffn"),
        ({"seed": {"own": {}, "x": {"train": {"seed": 3}}}}, {}, "train.seed belongs to the study's seeds"),
        ({"position": {"alibi": {"model": {"position": "alibi"}}}}, {}, "exactly one choice that is as the base is; it has none"),
        ({"optimiser": {"own": {}, "x": {"optim": {"name": "adamx"}}}}, {}, "x: optim.name='adamx' is not one of adamw.*nearest: 'adamw'"),
        ({"schedule": {"own": {}, "x": {"optim": {"schedule": "cosin"}}}}, {}, "x: optim.schedule='cosin' is not one of"),
        ({"kernel": {"own": {}, "x": {"model": {"kernel": "splash"}}}}, {"rows": 64}, "x computes the same as own"),
        ({"text": {"own": {}, "x": {"data": {"seq_len": 512}}}}, {}, "data.seq_len cannot be a choice"),
        ({"turns": {"own": {}, "x": {"model": {"rope": {"rotary_dim": 16}}}}}, {}, "x computes the same as own"),
        ({"window": {"own": {}, "x": {"model": {"window": 256}}}}, {}, "x computes the same as own"),
        ({"position": POSITION, "theta": {"own": {}, "high": {"model": {"rope": {"theta": 1e6}}}}}, {"grid": "full"}, r"alibi\+high computes the same as alibi\+own"),
        ({"width": {"own": {}, "x": {"model": {"ffn_dim": 320}}}}, {"match": "parameters"}, "x computes the same as own"),
        ({"ffn": FFN}, {"rows": 100}, "rows=100 must be a multiple of 8.*nearest: 96"),
        ({"ffn": FFN}, {"rows": 8}, "rows=8 must be .*two of them at least.*nearest: 16"),
        ({"position": {"rope": {}, "a b": {"model": {"position": "none"}}}}, {}, "'a b' must be letters"),
        ({"ffn": FFN}, {"grid": "all"}, "grid='all' is not one of one_at_a_time, full, listed"),
        ({"ffn": FFN}, {"cells": ("gelu",)}, "belong to grid 'listed'"),
        ({"ffn": FFN}, {"grid": "listed", "cells": ("gel",)}, "cells='gel' is not one of swiglu, gelu"),
        ({"ffn": FFN}, {"lengths": (2, 4)}, r"lengths=\(2, 4\) must rise from 1"),
        ({"ffn": FFN}, {"seeds": 0}, "seeds=0 must be positive"),
        ({"w": {"own": {}, "x": {"model": {"dim": 768, "head_dim": 192}}}}, {"match": "parameters"}, "more parameters than own at any"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_first_run(axes, settings, message):
    with pytest.raises(ValueError, match=message):
        grid.cells(study(axes, **settings))


def begins(axes):
    page = research_300k.get_config()
    page.train.init_from = "base"
    return grid.cells(schema.freeze(schema.edit(page, axes, {})))


def test_frozen_parameters_are_counted_and_take_fewer_flops():
    axes = {"trained": {"all": {}, "ffn": {"optim": {"train": ("*/ffn/*",)}}}}
    whole, part = begins(axes)
    assert part.parameters == whole.parameters
    model = whole.run.model
    others = model.layers * 4 * model.dim**2 + model.dim * model.vocab_size
    assert whole.flops_per_token - part.flops_per_token == 2 * others


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"ffn_dim": 168}},
            r"x cannot begin with the weights of train.init_from: groups/self_0/ffn/down: "
            r"float32\[4,160,64\] -> float32\[4,168,64\]; choose among",
        ),
        ({"model": {"norm": "layer"}}, r"init_from: groups/self_0/attention_norm/bias: .* is new"),
        (
            {"train": {"init_from": "x"}},
            r"train.init_from cannot be a choice: all cells begin alike",
        ),
    ],
)
def test_the_cells_of_a_study_begin_with_the_same_weights(settings, message):
    with pytest.raises(ValueError, match=message):
        begins({"axis": {"own": {}, "x": settings}})


def test_rows_are_blocks_of_every_source_alike():
    """So that the mean over rows, from which intervals come, is the mean over sources."""
    page = research_300k.get_config()
    with page.unlocked():
        page.data.sources.more = dict(page.data.sources.corpus)
        page.data.sources.third = dict(page.data.sources.corpus)
    assert schema.freeze(schema.edit(page, {"ffn": FFN}, {}, rows=48)).rows == 48
    message = (
        "rows=64 must be a multiple of 24: as many blocks of 8 of each of the 3 .* nearest: 72"
    )
    with pytest.raises(ValueError, match=message):
        schema.freeze(schema.edit(page, {"ffn": FFN}, {}, rows=64))


def test_quick_stands_below_the_command_line():
    edited = position.get_config()
    edited.preset = "quick"
    assert schema.freeze(edited).base.train.steps == 60
    edited.base.train.steps = 70
    assert schema.freeze(edited, {"base.train.steps": 70}).base.train.steps == 70


def test_a_larger_batch_reads_the_same_tokens_in_fewer_steps():
    batch = {"16": {}, "32": {"train": {"batch_size": 32}}, "10": {"train": {"batch_size": 10}}}
    cells = grid.cells(study({"batch": batch}))
    assert len(cells) == 3
    base = cells[0]
    for cell in cells:
        tokens = [one.run.train.steps * one.run.tokens_per_step for one in (base, cell)]
        assert abs(tokens[0] - tokens[1]) <= cell.run.tokens_per_step / 2
    listed = {"16": {}, "32": {"train": {"batch_size": 32, "steps": base.run.train.steps}}}
    _, longer = grid.cells(study({"batch": listed}))
    assert longer.run.train.steps == base.run.train.steps


def test_splash_on_rows_that_its_blocks_do_not_divide_is_refused_with_the_study():
    page = research_300k.get_config()
    page.data.seq_len = 200
    page.model.kernel = "splash"
    with pytest.raises(ValueError, match=r"needs data.seq_len=200 to be a multiple of 128"):
        grid.cells(schema.freeze(schema.edit(page, {"position": POSITION}, {})))


def test_an_overridden_base_takes_its_own_name():
    """What is called rope is rope, whatever the base was set to."""
    edited = position.get_config()
    edited.base.model.position = "alibi"
    assert grid.cells(schema.freeze(edited))[0].name == "alibi"
    edited.base.model.position = "t5"
    with pytest.raises(ValueError, match="exactly one choice that is as the base is; it has none"):
        schema.freeze(edited)


@pytest.mark.parametrize("page", [position, ffn, norm])
def test_a_page_has_a_base_of_its_own_and_can_be_planned(page):
    made = schema.freeze(page.get_config())
    cells = grid.cells(made)
    assert len(cells) == 4
    assert cells[0].run == made.base
    assert made.seeds >= 3
