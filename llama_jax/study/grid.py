"""The cells of a study: which runs there are, checked and matched before the first one starts."""

import dataclasses
import itertools
from typing import NamedTuple

from llama_jax import config, sharding, tree
from llama_jax.analysis import flops
from llama_jax.model import transformer
from llama_jax.study import schema
from llama_jax.study.schema import Study
from llama_jax.train import program

FFN_STEP = 8  # matched widths are multiples of it


class Cell(NamedTuple):
    """One combination of choices. Its runs differ in their seeds."""

    name: str  # "alibi+gelu"
    choices: dict[str, str]  # axis -> choice
    run: config.Run
    parameters: int  # frozen ones included
    flops_per_token: int


def cells(study: Study) -> list[Cell]:
    """The base's own first. ValueError on choices that change nothing or cannot be built."""
    made = [_cell(study, combination) for combination in _combinations(study)]
    made = [matched(study, made[0], cell) for cell in made]
    reach = study.base.data.seq_len * max(study.lengths)
    effective = [_effective(cell.run, reach) for cell in made]
    if study.base.train.init_from:
        _check_shapes(made)
    for i, cell in enumerate(made):
        for before, run in zip(made[:i], effective, strict=False):
            if not config.diff(run, effective[i], essential=True):
                raise ValueError(
                    f"{cell.name} computes the same as {before.name}: an ablation of nothing"
                )
    return made


def _check_shapes(made: list[Cell]) -> None:
    """ValueError unless every cell can begin with the weights that the base begins with."""
    layout = sharding.abstract(config.Mesh(), 1)
    base, *others = (transformer.abstract(transformer.build(c.run.model, layout)) for c in made)
    for cell, shapes in zip(made[1:], others, strict=True):
        if differing := tree.diff(base, shapes):
            raise ValueError(
                f"{cell.name} cannot begin with the weights of train.init_from: {differing[0]}; choose among "
                "settings that leave the parameters' shapes, or leave train.init_from at ''"
            )


def _effective(run: config.Run, reach: int) -> config.Run:
    """The run without settings that change nothing in texts of at most `reach` tokens."""
    model = run.model
    idle = {}
    if model.position != "rope":
        idle["rope"] = config.Rope()
    elif model.rope.rotary_dim == model.head_dim:
        idle["rope"] = dataclasses.replace(model.rope, rotary_dim=0)
    if model.window >= reach:
        idle["window"] = 0
    if model.init == "mup" and model.mup_base_dim == model.dim:
        idle |= {"init": "normal", "mup_base_dim": 0}
    return dataclasses.replace(run, model=dataclasses.replace(model, **idle))


def runs(study: Study, found: list[Cell]) -> list[tuple[Cell, int]]:
    """Every cell with the first seed, then with the second: what is there early can be compared."""
    return [(cell, seed) for seed in range(study.seeds) for cell in found]


def name_of(cell: Cell, seed: int) -> str:
    """Of one run, and of its folder."""
    return f"{cell.name}-seed{seed}"


def seeded(run: config.Run, seed: int) -> config.Run:
    """Other initial values, where the run begins with its own, and another order of the same text; equal
    across cells."""
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, seed=run.train.seed + seed),
        data=dataclasses.replace(run.data, seed=run.data.seed + seed),
    )


def matched(study: Study, base: Cell, cell: Cell) -> Cell:
    """The cell at a `model.ffn_dim` at which it has as many parameters, or FLOPs a token, as the base.

    The nearest multiple of FFN_STEP. ValueError if the rest of the network alone has more.
    """
    if study.match == "nothing":
        return cell
    size = lambda cell: getattr(cell, _MEASURES[study.match])  # noqa: E731
    wanted = size(base)
    if size(cell) == wanted:
        return cell
    at = lambda width: _described(cell, _with_ffn(cell.run, width))  # noqa: E731
    here, wider = (size(at(cell.run.model.ffn_dim + more)) for more in (0, FFN_STEP))
    slope = (wider - here) / FFN_STEP
    width = cell.run.model.ffn_dim + (wanted - here) / slope
    width = round(width / FFN_STEP) * FFN_STEP
    if width < FFN_STEP:
        raise ValueError(
            f"{cell.name} has more {study.match} than {base.name} at any model.ffn_dim; set match to "
            "'nothing' or choose a base with a wider ffn"
        )
    return at(width)


_MEASURES = {"parameters": "parameters", "flops": "flops_per_token"}


def _combinations(study: Study) -> list[tuple[schema.Choice, ...]]:
    full = list(itertools.product(*(axis.choices for axis in study.axes)))
    if study.grid == "full":
        return full
    if study.grid == "one_at_a_time":
        own = full[0]
        return [one for one in full if sum(a != b for a, b in zip(one, own, strict=True)) <= 1]
    by_name = {_name(one): one for one in full}
    listed = [config.choose(by_name, name, "cells") for name in study.cells]
    own = full[0]
    return [own, *(one for one in listed if one != own)]


def _name(combination) -> str:
    return "+".join(choice.name for choice in combination)


def _cell(study: Study, combination: tuple[schema.Choice, ...]) -> Cell:
    run, name = study.base, _name(combination)
    choices = {axis.name: one.name for axis, one in zip(study.axes, combination, strict=True)}
    changes = tuple(change for choice in combination for change in choice.changes)
    places = [place for place, _ in changes]
    if twice := next((place for place in places if places.count(place) > 1), ""):
        raise ValueError(f"{name}: two of its choices set {twice}")
    for place in places:
        if place in ("train.seed", "data.seed"):
            raise ValueError(f"{name}: {place} belongs to the study's seeds, not to a choice")
        if place.startswith("train.init_"):
            raise ValueError(f"{name}: {place} cannot be a choice: all cells begin alike")
        if place.startswith("data.") or place == "model.vocab_size":
            raise ValueError(
                f"{name}: {place} cannot be a choice: all cells are scored on the same tokens"
            )
    try:
        run = schema.changed(run, changes, f"axes, {name}")
        if "train.steps" not in places:
            run = _as_many_tokens(run, study.base)
        return _described(Cell(name, choices, run, 0, 0), run)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _as_many_tokens(run: config.Run, base: config.Run) -> config.Run:
    """As many steps as read the base's tokens."""
    tokens = base.train.steps * base.tokens_per_step
    steps = max(round(tokens / run.tokens_per_step), 1)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))


def _described(cell: Cell, run: config.Run) -> Cell:
    """ValueError if there is no such network, optimiser or batch on the fewest devices of the mesh."""
    layout = sharding.abstract(run.mesh, sharding.fewest(run.mesh))
    made = program.build(run, layout)
    return cell._replace(
        run=run,
        parameters=tree.count((made.state.params, made.frozen)),
        flops_per_token=flops.per_token(made.module, run.data.seq_len, tree.paths(made.frozen)),
    )


def _with_ffn(run: config.Run, width: int) -> config.Run:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, ffn_dim=width))
