"""The editing form of settings, and what two of them differ in.

The library reads frozen parts. `edit` makes a locked `ml_collections.ConfigDict` of one, which config files
and the command line change; `freeze` turns it back, once, and checks every rule.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from llama_jax.config.aspects import ASPECT, WHAT
from llama_jax.config.data import Source
from llama_jax.config.rules import nearest
from llama_jax.config.run import Run


def edit(part: Any) -> ml_collections.ConfigDict:
    """The editing form of a frozen part: locked, so that a misspelt name raises."""
    return ml_collections.ConfigDict(to_dict(part)).lock()


def add_sources(edited: ml_collections.ConfigDict, settings: Sequence[str]) -> None:
    """Give the editing form the sources whose settings ("books.kind") are named and that it lacks.

    ValueError unless the kind of each new one is among them: a misspelt name is not a new source.
    """
    fields = [field.name for field in dataclasses.fields(Source) if field.name != "name"]
    groups: Any = edited  # a ConfigDict's annotations give no group its settings
    sources = groups.data.sources
    for setting in settings:
        name, _, field = setting.partition(".")
        place = f"data.sources.{setting}"
        if not name.isidentifier():
            raise ValueError(f"{place}: the name of a source must be of letters, digits and _")
        if field not in fields:
            tried = f"data.sources.{name}.{nearest(field, fields)}"
            raise ValueError(f"{place} is not a setting; nearest: {tried}")
        if name in sources:
            continue
        if f"{name}.kind" not in settings:
            there = ", ".join(sources)
            raise ValueError(
                f"{place}: there is no source {name!r} but {there}; a new one needs "
                f"data.sources.{name}.kind and data.sources.{name}.path, too"
            )
        new = {k: v for k, v in to_dict(Source(name)).items() if k != "name"}
        with edited.unlocked():
            sources[name] = new


def freeze(edited: ml_collections.ConfigDict, kind: type = Run, place: str = "") -> Any:
    """The frozen part, a run if no other kind is named. ValueError names what breaks which rule."""
    return from_dict(edited.to_dict(), kind, place)


def to_dict(value: Any) -> Any:
    """Plain dicts of a frozen part; named parts in a tuple become a dict by name."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return {
            part.name: {k: v for k, v in to_dict(part).items() if k != "name"} for part in value
        }
    return value


def from_dict(values: dict[str, Any], kind: type = Run, place: str = "") -> Any:
    """The inverse of `to_dict`, also from JSON (lists for tuples). ValueError on what does not fit."""
    return _build(kind, values, place)


def flatten(part: Any) -> dict[str, Any]:
    """{"model.dim": 4096, ...} of a frozen part, in the order of the schema."""
    return {place: value for place, value, _ in _settings(part)}


def diff(old: Any, new: Any, essential: bool = False) -> list[str]:
    """One line a differing setting: `model.dim: 4096 -> 5120`.

    essential: of those that say what is computed.
    """
    of_old, of_new = (
        {place: (value, aspect) for place, value, aspect in _settings(part)} for part in (old, new)
    )
    lines = []
    for place in {**of_old, **of_new}:
        (was, aspect), (now, _) = (of.get(place, ("absent", WHAT)) for of in (of_old, of_new))
        if was != now and not (essential and aspect != WHAT):
            lines.append(f"{place}: {was} -> {now}")
    return lines


def _settings(part: Any, place: str = "", aspect: str = WHAT) -> Iterator[tuple[str, Any, str]]:
    """(place, value, aspect) of each setting; named parts in a tuple are at their names."""
    for field in dataclasses.fields(part):
        value, of = getattr(part, field.name), field.metadata.get(ASPECT, aspect)
        at = _join(place, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, at, of)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for named in value:
                for setting in _settings(named, f"{at}.{named.name}", of):
                    if setting[0] != f"{at}.{named.name}.name":
                        yield setting
        else:
            yield at, value, of


def _build(kind: Any, values: Any, place: str):
    """One frozen part of plain values, types checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}={values!r} must be a group of settings ({kind.__name__})")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{_join(place, name)} is not a setting; "
                f"nearest: {_join(place, nearest(name, fields))}"
            )
    return kind(**{name: _value(types[name], v, _join(place, name)) for name, v in values.items()})


def _value(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, place)
    if typing.get_origin(kind) is tuple:
        part: Any = typing.get_args(kind)[0]
        name = part.__name__
        if dataclasses.is_dataclass(part):
            if not isinstance(value, dict):
                raise ValueError(f"{place}={value!r} must be a dict of name -> {name}")
            # A source of weight 0 is left out: the command line cannot take one away otherwise.
            kept = {own: dict(v) for own, v in sorted(value.items()) if dict(v).get("weight") != 0}
            return tuple(
                _build(part, {"name": own, **v}, f"{place}.{own}") for own, v in kept.items()
            )
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place}={value!r} must be a tuple of {name}")
        return tuple(_value(part, v, place) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        quoted = f"; in quotes it is a text: '\"{value}\"'" if kind is str else ""
        raise ValueError(
            f"{place}={value!r} must be {kind.__name__}, not {type(value).__name__}{quoted}"
        )
    return value


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
