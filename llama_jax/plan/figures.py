"""What a user asks before a slice starts: does it fit, how fast, how long, how much."""

import dataclasses
from typing import Any

import jax

from llama_jax import config, sharding, tree
from llama_jax.analysis import carbon, flops, hardware, memory
from llama_jax.plan import aot, roofline
from llama_jax.plan.hlo import Compiled
from llama_jax.train import program as programs


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Of one run on one slice. None: not known without the compiler, or not published of the device.

    Bytes, cycles and FLOPs are of one device (a chip; on TPU v2, v3 and v7x half of one) and one optimiser
    step; seconds, MFU, days and what follows from them are estimates, low the fast end of the bracket, high
    the slow one.
    """

    slice: str
    devices: int
    fits: bool
    hbm_gib_per_chip: float
    hbm_limit_gib: float
    hbm_from: str  # "compiler" or "formula"
    parts: dict[str, float]  # GiB, by formula
    mcycles: float | None
    flops_model: float
    flops_executed: float | None
    collectives: list[dict[str, Any]] | None
    step_seconds_low: float | None
    step_seconds_high: float | None
    mfu_low: float | None
    mfu_high: float | None
    tokens_per_second_per_chip: float | None  # of the slow end
    chip_hours_low: float | None
    chip_hours: float | None  # of the slow end, as days, kWh and CO2
    days_low: float | None
    days: float | None
    checkpoint_gib: float
    kwh: float | None
    tco2eq: float | None
    compile_seconds: float | None


def plan(run: config.Run, name: str, compile: bool) -> TrainingPlan:
    """Figures of `run` on the slice `name`, by formula and, if asked and there is one, by the compiler."""
    if not (compile and hardware.find_slice(name).topology):
        return of(run, name, None)
    try:
        return of(run, name, aot.compile(run, name))
    except aot.DoesNotFit as error:
        return of(run, name, error)


def of(run: config.Run, name: str, compiled: Compiled | aot.DoesNotFit | None) -> TrainingPlan:
    """The same from what the compiler said; None: by formula."""
    slice_ = hardware.find_slice(name)
    device = hardware.DEVICES[slice_.device]
    layout = sharding.abstract(run.mesh, slice_.devices)
    program = programs.build(run, layout)
    need = memory.need(run, layout, program.state, slice_.device, program.frozen)
    a_token = flops.per_token(program.module, run.data.seq_len, tree.paths(program.frozen))
    model = a_token * run.tokens_per_step / slice_.devices
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state))
    known = dict(
        slice=name,
        devices=slice_.devices,
        hbm_limit_gib=device.hbm_gib,
        parts=need._asdict(),
        flops_model=model,
        checkpoint_gib=whole / 2**30,
    )
    if compiled is None:
        return _of(known, need.total, "formula")
    if isinstance(compiled, aot.DoesNotFit):
        return _of(known, max(need.total, device.hbm_gib), "compiler", fits=False)
    return _of(known, compiled.hbm_gib, "compiler", **_times(run, slice_, model, compiled))


def _times(run, slice_, model: float, compiled: Compiled) -> dict[str, Any]:
    device = hardware.DEVICES[slice_.device]
    took = roofline.seconds(compiled, slice_, memory.offloaded(run, slice_.devices))
    mfu = lambda seconds: model / seconds / (device.bf16_tflops * 1e12)  # noqa: E731
    hours_low, hours = (end * run.train.steps / 3600 for end in (took.low, took.high))
    energy = carbon.kwh(hours * slice_.devices, device.watts) if device.watts else None
    return dict(
        mcycles=sum(compiled.cycles.values()) / 1e6,
        flops_executed=compiled.flops,
        collectives=_collectives(compiled, slice_),
        step_seconds_low=took.low,
        step_seconds_high=took.high,
        mfu_low=mfu(took.high),
        mfu_high=mfu(took.low),
        tokens_per_second_per_chip=run.tokens_per_step / took.high / slice_.chips,
        chip_hours_low=hours_low * slice_.chips,
        chip_hours=hours * slice_.chips,
        days_low=hours_low / 24,
        days=hours / 24,
        kwh=energy,
        tco2eq=energy and carbon.kg_co2(hours * slice_.devices, device.watts) / 1000,
        compile_seconds=compiled.seconds,
    )


def _collectives(compiled: Compiled, slice_: hardware.Slice) -> list[dict[str, Any]]:
    """One line a kind: count and GiB a step, seconds by themselves, seconds that nothing covers."""
    clock = hardware.DEVICES[slice_.device].ghz * 1e9
    lines: dict[tuple, dict[str, Any]] = {}
    for one in compiled.collectives:
        key = (one.kind, one.started)
        zero = dict(kind=key[0], started=key[1], count=0, gib=0.0, seconds=0.0, exposed_seconds=0.0)
        line = lines.setdefault(key, zero)
        alone = roofline.collective(one, slice_)
        line["count"] += one.times
        line["gib"] += one.bytes * one.times / 2**30
        line["seconds"] += alone * one.times
        line["exposed_seconds"] += roofline.exposed(one, slice_, clock) * one.times
    return sorted(lines.values(), key=lambda line: -line["gib"])


def _of(
    known: dict[str, Any], hbm: float, source: str, fits: bool | None = None, **more
) -> TrainingPlan:
    names = [field.name for field in dataclasses.fields(TrainingPlan)]
    values = {**dict.fromkeys(names), **known, **more}
    values |= dict(hbm_gib_per_chip=hbm, hbm_from=source)
    values["fits"] = hbm <= known["hbm_limit_gib"] if fits is None else fits
    return TrainingPlan(**values)
