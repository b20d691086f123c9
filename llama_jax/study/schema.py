"""What a study is: a base run, axes of choices, seeds. Its editing form is a ConfigDict, as a run's.

base   a run, as its page makes it
axes   {"position": {"rope": {"model": {"position": "rope"}}, "alibi": {"model": {"position": "alibi"}}}}:
       for each choice of an axis its settings; of every axis one choice, the base's own, is as the base is
quick  what `preset` "quick" changes in all this, for a first look, from which nothing is concluded
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from llama_jax import config

GRIDS = ("one_at_a_time", "full", "listed")
BLOCK = 8  # rows, at least
MATCHES = ("nothing", "parameters", "flops")
PRESETS = ("full", "quick")


@dataclasses.dataclass(frozen=True)
class Choice:
    """changes: (place, value), such as ("model.position", "alibi"); none of the base's own."""

    name: str
    changes: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The first choice is the base's own."""

    name: str
    choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    base: config.Run
    axes: tuple[Axis, ...]
    grid: str = "one_at_a_time"  # "full": every combination; "listed": those of `cells`
    cells: tuple[str, ...] = ()  # "alibi+gelu": a choice of every axis
    seeds: int = 3  # runs of each cell: initial values and data order
    match: str = "nothing"  # of the base's, by model.ffn_dim: "parameters", or "flops" a token
    rows: int = 1024  # held-out rows that the results are scored on; eval.rows are for the curves
    lengths: tuple[int, ...] = (1,)  # multiples of data.seq_len in which those rows are read
    preset: str = "full"  # "quick": as the config file's `quick` says; its report has no verdicts

    def __post_init__(self):
        config.choose(PRESETS, self.preset, "preset")
        config.choose(GRIDS, self.grid, "grid")
        config.choose(MATCHES, self.match, "match")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be positive; 3 are the fewest that say much")
        if not self.axes:
            raise ValueError("axes is empty; give at least one axis of choices")
        if bool(self.cells) != (self.grid == "listed"):
            raise ValueError(f"cells={self.cells} belong to grid 'listed', and grid={self.grid!r}")
        if (
            not self.lengths
            or min(self.lengths) != 1
            or sorted(set(self.lengths)) != [*self.lengths]
        ):
            raise ValueError(f"lengths={self.lengths} must rise from 1, as (1, 2, 4, 8)")
        if self.rows < 2 * self.block or self.rows % self.block:
            near = max(round(self.rows / self.block), 2) * self.block
            raise ValueError(
                f"rows={self.rows} must be a multiple of {self.block}, two of them at least: rows come in "
                f"blocks that lie together in the text; nearest: {near}"
            )
        sources = len(self.base.data.sources)
        if self.rows % (each := self.block * sources):
            near = max(round(self.rows / each), 1) * each
            raise ValueError(
                f"rows={self.rows} must be a multiple of {each}: as many blocks of {self.block} of each of "
                f"the {sources} sources; nearest: {near}"
            )
        packed = (self.base.data.packing, self.base.data.segments)
        if packed != ("concat", "none"):
            raise ValueError(
                f"base.data.packing={packed[0]!r} and base.data.segments={packed[1]!r}: a study scores whole "
                "rows of running text; it needs 'concat' and 'none'"
            )

    @property
    def block(self) -> int:
        """Rows of running text that are scored together, and drawn together: neighbours are alike."""
        together = math.lcm(*self.lengths)
        return -(-BLOCK // together) * together


def edit(
    base: ml_collections.ConfigDict,
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    quick: Mapping[str, Any],
    **settings: Any,
) -> ml_collections.ConfigDict:
    """The editing form, from a page's run and plain dicts."""
    usual = {
        field.name: field.default
        for field in dataclasses.fields(Study)
        if field.default is not dataclasses.MISSING
    }
    plain = {"base": base.to_dict(), "axes": axes, "quick": quick, **usual, **settings}
    return ml_collections.ConfigDict(plain).lock()


def freeze(edited: ml_collections.ConfigDict, overridden: Collection[str] = ()) -> Study:
    """The contract of an edited study; `overridden` from the command line stand above preset "quick"."""
    values = edited.to_dict()
    quick = values.pop("quick")
    if values["preset"] == "quick":
        for place, value in _flat(quick):
            if place not in overridden:
                _set(values, place, value, "quick")
    base = config.from_dict(values.pop("base"))
    axes = tuple(_axis(name, choices, base) for name, choices in values.pop("axes").items())
    lists = {name: tuple(values.pop(name)) for name in ("cells", "lengths")}
    return Study(base=base, axes=axes, **lists, **values)


def to_dict(study: Study) -> dict[str, Any]:
    """Plain values, for study.json."""
    axes = {
        axis.name: {choice.name: dict(choice.changes) for choice in axis.choices}
        for axis in study.axes
    }
    rest = {f.name: getattr(study, f.name) for f in dataclasses.fields(study)}
    rest |= {"cells": list(study.cells), "lengths": list(study.lengths)}
    return {**rest, "base": config.to_dict(study.base), "axes": axes}


def settings() -> dict[str, Any]:
    """Places in the editing form with their defaults, those of axes left out."""
    fields = [field for field in dataclasses.fields(Study) if field.name not in ("base", "axes")]
    run = config.flatten(config.Run())
    return {
        **{field.name: field.default for field in fields},
        **{f"base.{place}": value for place, value in run.items()},
    }


def changed(run: config.Run, changes: tuple[tuple[str, Any], ...], place: str) -> config.Run:
    """The run with other settings. ValueError names the setting that there is not."""
    values = config.to_dict(run)
    for name, value in changes:
        _set(values, name, value, place)
    return config.from_dict(values)


def _axis(name: str, choices: Mapping[str, Any], base: config.Run) -> Axis:
    of_base = dict(_flat(config.to_dict(base)))
    made = []
    for choice, settings in choices.items():
        changes = tuple(_flat(settings))
        is_own = all(place in of_base and of_base[place] == value for place, value in changes)
        made.append(Choice(choice, () if is_own else changes))
    for choice in made:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", choice.name):
            raise ValueError(
                f"axes.{name}: choice {choice.name!r} must be letters, digits, _ and -: it names folders"
            )
    own = [choice.name for choice in made if not choice.changes]
    if len(own) != 1:
        raise ValueError(
            f"axes.{name} must have exactly one choice that is as the base is; it has "
            f"{', '.join(own) or 'none'}"
        )
    return Axis(name, tuple(sorted(made, key=lambda choice: bool(choice.changes))))


def _flat(values: Mapping[str, Any], place: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        inner = f"{place}.{name}" if place else name
        found += _flat(value, inner) if isinstance(value, Mapping) else [(inner, value)]
    return found


def _set(values: dict[str, Any], place: str, value: Any, whose: str) -> None:
    *path, last = place.split(".")
    at = values
    for name in path:
        at = at.get(name) if isinstance(at, dict) else None
    if not isinstance(at, dict) or last not in at:
        known = [name for name, _ in _flat(values)]
        near = config.nearest(place, known)
        raise ValueError(f"{whose}: {place} is not a setting; nearest: {near}")
    at[last] = value
