"""The figures of a study: one row a cell, the base first."""

import dataclasses
import functools
import math

import numpy as np

from llama_jax.study import record, statistics
from llama_jax.study.record import Results
from llama_jax.study.statistics import Estimate

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class TableRow:
    """Losses are nats a token on held-out rows. NaN: not known, as after one seed."""

    name: str
    seeds: int
    failed: int  # seeds, of it or of the base
    parameters: int
    flops_per_token: int
    tokens_per_second: float
    memory_gib: float  # by formula, on each device
    loss: Estimate
    difference: Estimate  # to the base, over the seeds that both have
    p: float  # of the difference, after Holm's correction
    at_tokens: float  # loss when the cell that reads the fewest had read all of its tokens
    at_flops: float  # likewise, of FLOPs
    at_seconds: float  # likewise, of time in training steps; NaN where devices differ
    by_length: dict[int, Estimate]

    @property
    def verdict(self) -> str:
        if self.failed:
            return f"not known: {self.failed} failed"  # what is left was chosen by its success
        if math.isnan(self.p):
            return "not known: too few seeds" if self.seeds else "no run is done"
        if self.p >= ALPHA:
            return "not significant"
        return "better" if self.difference.mean < 0 else "worse"


def rows(results: list[Results], lengths: tuple[int, ...], block: int) -> list[TableRow]:
    """block: rows that lie together in the text."""
    base, done = results[0], [one for one in results if one.runs]
    devices = {str(run.card["hardware"]) for one in done for run in one.runs}
    budgets = {
        x: min((one.curve(x)[0][-1] for one in done if one.curve(x)[0].size), default=math.nan)
        for x in ("tokens", "flops", "seconds")
    }
    if len(devices) > 1:
        budgets["seconds"] = math.nan
    estimate = functools.partial(_estimate, block=block)
    differences = [estimate(_paired(base, one)) for one in results]
    corrected = [math.nan, *statistics.holm([one.p for one in differences[1:]])]
    return [
        TableRow(
            name=one.cell.name,
            seeds=len(one.runs),
            failed=len({*one.failures, *base.failures}),
            parameters=one.cell.parameters,
            flops_per_token=one.cell.flops_per_token,
            tokens_per_second=_mean([run.card["tokens_per_second"] for run in one.runs]),
            memory_gib=_mean([run.card["results"]["memory_gib"] for run in one.runs]),
            loss=estimate(one.losses()),
            difference=of,
            p=p,
            at_tokens=record.at(one, "tokens", budgets["tokens"]),
            at_flops=record.at(one, "flops", budgets["flops"]),
            at_seconds=record.at(one, "seconds", budgets["seconds"]),
            by_length={times: estimate(one.losses(times)) for times in lengths},
        )
        for one, of, p in zip(results, differences, corrected, strict=True)
    ]


def ranked(rows: list[TableRow]) -> list[TableRow]:
    """The base first, the others from the lowest loss."""
    worst_last = lambda row: (math.isnan(row.loss.mean), row.loss.mean)  # noqa: E731
    return [rows[0], *sorted(rows[1:], key=worst_last)]


def _paired(base: Results, other: Results) -> np.ndarray:
    """other - base, of the seeds that both have."""
    own = {run.seed: run for run in base.runs}
    pairs = [
        run.scores[1].row_R - own[run.seed].scores[1].row_R for run in other.runs if run.seed in own
    ]
    return np.stack(pairs) if pairs else np.empty((0, 0))


def _estimate(values_SR: np.ndarray, block: int) -> Estimate:
    if not values_SR.size:
        return Estimate(*(math.nan,) * 4)
    return statistics.estimate(values_SR.reshape(len(values_SR), -1, block).mean(2))


def _mean(values: list) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan
