"""Rules of settings. A message gives value, place, rule and the nearest valid value."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, overload

from llama_jax import files

T = TypeVar("T")


@overload
def choose(slots: Mapping[str, T], name: str, place: str) -> T: ...


@overload
def choose(slots: Collection[str], name: str, place: str) -> str: ...


def choose(slots: Collection[str], name: str, place: str) -> Any:
    """`slots[name]`, or `name` itself of a plain collection; ValueError with the nearest otherwise."""
    if name not in slots:
        known, few = ", ".join(slots), 1
        if len(slots) > _LISTED:
            known, few = f"the {len(slots)} that there are", 3
        near = ", ".join(map(repr, difflib.get_close_matches(str(name), slots, few, cutoff=0.0)))
        raise ValueError(f"{place}={name!r} is not one of {known}; nearest: {near}")
    return slots[name] if isinstance(slots, Mapping) else name


_LISTED = 64  # names that a message lists; a tokenizer of Llama 3 has 256 special tokens


def nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(str(name), [*known], 1, cutoff=0.0)[0]


def positive(part: Any, place: str, *names: str) -> None:
    for name in names:
        if not getattr(part, name) > 0:
            raise ValueError(f"{place}.{name}={getattr(part, name)} must be positive")


def not_negative(part: Any, place: str, *names: str) -> None:
    for name in names:
        if not getattr(part, name) >= 0:
            raise ValueError(f"{place}.{name}={getattr(part, name)} must not be negative")


def check_seed(seed: int, place: str) -> None:
    """ValueError if JAX would take it for another one: its keys have 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{place}={seed} must be from 0 to {2**32 - 1}; try {seed % 2**32}")


def local(part: Any, place: str, *names: str) -> None:
    for name in names:
        if why := files.why_not_local(getattr(part, name)):
            raise ValueError(f"{place}.{name}={getattr(part, name)!r} {why}")


def divides(small_place: str, small: int, large_place: str, large: int) -> None:
    if large % small:
        low = [n for n in range(1, math.isqrt(large) + 1) if large % n == 0]
        fits = sorted({*low, *(large // n for n in low)})
        near = sorted(sorted(fits, key=lambda n: abs(n - small))[:6])
        tries = f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if near[1:] else f"{near[0]}"
        raise ValueError(f"{small_place}={small} must divide {large_place}={large}; try {tries}")


def refuse_idle(part: Any, place: str, names: Iterable[str], why: str) -> None:
    """ValueError if a field of these is set: under `why` it has no effect."""
    for name in names:
        value, default = getattr(part, name), type(part).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(
                f"{place}.{name}={value!r} has no effect while {why}; "
                f"change that or leave it at {default!r}"
            )
