"""Compare two opened checkpoints, of whatever formats: settings, and tensors bit by bit."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.convert import formats, job, names
from llama_jax.convert.source import CheckpointSource


def sources(
    one: CheckpointSource, other: CheckpointSource, progress: Callable[[int], object]
) -> int:
    """Compare settings, and every tensor bit by bit, in the dtype of `other`; the number of tensors.

    ValueError on the first that differs.
    """
    for name, wanted, found in _settings(one, other):
        if found != wanted:
            raise ValueError(
                f"{other.files[0].parent}: {name} is {found!r}, but {wanted!r} in "
                f"{one.files[0].parent}; convert again"
            )
    for unit in names.units(one.model):
        for start, stop in job.blocks(unit, one.model):
            rows = one.read(unit, start, stop)
            wanted = job.cast(rows, other.dtypes[unit.hf], one.where(unit), unit.hf)
            found = other.read(unit, start, stop)
            if not np.array_equal(names.bits(found), names.bits(wanted)):
                raise ValueError(
                    f"{other.where(unit)}: {unit.hf} differs from {one.where(unit)}; convert again"
                )
            progress(rows.nbytes)
    return len(names.units(one.model))


def _settings(one: CheckpointSource, other: CheckpointSource) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, value of `other`) of what a conversion keeps."""
    for field in dataclasses.fields(config.Model):
        if field.name not in _NOT_KEPT:
            yield (
                f"model.{field.name}",
                getattr(one.model, field.name),
                getattr(other.model, field.name),
            )
    if formats.FORMATS[other.format].keeps_context:
        yield "context", one.context, other.context


# How a model is computed and how training began it: not every format says that.
_NOT_KEPT = ("init_std", "compute_dtype", "kernel", "remat", "unroll")
