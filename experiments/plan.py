"""Before a slice starts: what fits, how fast, how long. No device is needed.

    python -m experiments.plan --config=configs/65b.py:v4_512

compiles the training step for the slice with TPU's compiler (the extra `tpu`), about two minutes; --analytic
takes the formulas alone, a second. --suggest ranks the layouts that fit and compiles the best few.

    python -m experiments.plan --config=configs/llama31_70b.py --config.mesh.hardware=v5e_16 \\
        --config.mesh.tensor=8 --decode=8 --bits=8

compiles instead a token of generating 8 texts at a time, with weights as experiments.quantise makes them.
"""

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX: planning touches no device

import jax
import tqdm
from absl import flags

from experiments import cli
from llama_jax import config
from llama_jax.analysis import hardware, memory
from llama_jax.plan import aot, decoding, figures, fit
from llama_jax.plan.trace import Texts

CONFIG = cli.define_config()
ANALYTIC = flags.DEFINE_bool("analytic", False, "By formula alone, without the compiler.")
SUGGEST = flags.DEFINE_bool("suggest", False, "Search mesh, remat, microbatches and loss chunks.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object (with --suggest, a list).")
MARKDOWN = flags.DEFINE_bool("markdown", False, "Print a markdown table.")
DECODE = flags.DEFINE_integer(
    "decode", 0, "Plan generating so many texts at a time.", lower_bound=0
)
CONTEXT = flags.DEFINE_integer("context", 2048, "Of --decode: tokens of each.", lower_bound=1)
BITS = flags.DEFINE_enum("bits", "16", ("16", "8", "4"), "Of --decode: of weights in layers.")
COMPILED = 3  # layouts that --suggest asks the compiler about


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    run = cli.frozen(CONFIG)
    name = cli.slice_of(run)
    for flag, is_of_decoding in (
        (CONTEXT, True),
        (BITS, True),
        (ANALYTIC, False),
        (SUGGEST, False),
        (MARKDOWN, False),
    ):
        if flag.present and flag.value and is_of_decoding != bool(DECODE.value):
            raise ValueError(
                f"--{flag.name} has no effect {'without' if is_of_decoding else 'with'} --decode"
            )
    if DECODE.value:
        return generating(run, name)
    if SUGGEST.value:
        return suggest(run, name)
    note_compiling(name)
    plan = figures.plan(run, name, compile=not ANALYTIC.value)
    show([(run, plan)])
    return 0 if plan.fits else 1


def note_compiling(name: str) -> None:
    """Said before the silence."""
    if not (ANALYTIC.value or JSON.value) and hardware.find_slice(name).topology:
        print(
            f"compiling for {name}: one to five minutes; --analytic takes a second", file=sys.stderr
        )


def generating(run: config.Run, name: str) -> int:
    note_compiling(name)
    texts = Texts(DECODE.value, CONTEXT.value, int(BITS.value))
    try:
        plan = decoding.plan(run, name, texts)
    except aot.DoesNotFit as error:
        print(
            f"{name}: does not fit ({error}); try fewer --bits, more of mesh.tensor, a larger slice"
        )
        return 1
    print(json.dumps(dataclasses.asdict(plan)) if JSON.value else "\n".join(lines_of(run, plan)))
    return 0 if plan.fits else 1


def lines_of(run: config.Run, plan: decoding.DecodingPlan) -> list[str]:
    slow, fast = plan.tokens_per_second
    milliseconds = lambda seconds: f"{1e3 * seconds:.2f} ms"  # noqa: E731
    return [
        f"{plan.slice}: {plan.devices} chips, mesh {layout(run.mesh)}; {DECODE.value} texts of "
        f"{CONTEXT.value} tokens, weights of {BITS.value} bits",
        f"memory a chip: {plan.hbm_gib:.2f} of {plan.hbm_limit_gib:g} GiB by the compiler; weights "
        f"{plan.weights_gib:.2f}, keys and values {plan.cache_gib:.2f}",
        "a token of every text, estimated (llama_jax/plan/decoding.py):",
        f"  weights, keys and values read once from HBM     {milliseconds(plan.read_seconds)}",
        f"  the compiler's cycles                           {milliseconds(plan.compute_seconds)}",
        f"  collectives, by bytes and hops, nothing hidden  {milliseconds(plan.collective_seconds)}",
        f"  {slow:,.0f} to {fast:,.0f} tokens/s of each text, {DECODE.value * slow:,.0f} to "
        f"{DECODE.value * fast:,.0f} of all",
    ]


def suggest(run: config.Run, name: str) -> int:
    """The layouts that fit by formula, fastest first; the compiler's figures of the best few."""
    found = distinct(fit.fits(run, name))
    if not found:
        raise ValueError(f"no layout of this run fits {name}")
    plans = []
    note_compiling(name)
    for one in tqdm.tqdm(found[:COMPILED], desc="compiling", disable=ANALYTIC.value or JSON.value):
        plans.append((one.run, figures.plan(one.run, name, compile=not ANALYTIC.value)))
    plans.sort(key=lambda pair: (not pair[1].fits, pair[1].step_seconds_high or 0))
    show(plans)
    if not JSON.value:
        changed = " ".join(settings(run, plans[0][0]))
        chosen = (
            f"as settings:\n  {changed}"
            if changed
            else "is the config's own layout: nothing to set"
        )
        print(f"\nthe first {chosen}")
        if ANALYTIC.value:
            print(no_times(name))
    return 0


def distinct(found: list[fit.Fit]) -> list[fit.Fit]:
    """The best microbatch of every mesh and policy: its neighbours differ by little."""
    best: dict = {}
    for one in found:
        best.setdefault((one.run.mesh, one.run.model.remat), one)
    return list(best.values())


def settings(old: config.Run, new: config.Run) -> list[str]:
    flat = config.flatten(new)
    return [
        f"--config.{line.split(':')[0]}={flat[line.split(':')[0]]}"
        for line in config.diff(old, new)
    ]


def show(plans: list[tuple[config.Run, figures.TrainingPlan]]) -> None:
    if JSON.value:
        objects = [dataclasses.asdict(plan) for _, plan in plans]
        print(json.dumps(objects if SUGGEST.value else objects[0]))
    elif MARKDOWN.value or SUGGEST.value:
        print("\n".join(table(plans)))
    else:
        print("\n".join(report(*plans[0])))


COLUMNS = (
    *("slice", "mesh", "remat", "rows a chip", "loss chunks", "GiB a chip", "of", "Mcycles"),
    *("executed / model", "step s", "MFU"),
)


def table(plans: list[tuple[config.Run, figures.TrainingPlan]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return lines + [f"| {' | '.join(row(run, plan))} |" for run, plan in plans]


def row(run: config.Run, plan: figures.TrainingPlan) -> list[str]:
    return [
        plan.slice,
        layout(run.mesh),
        run.model.remat,
        f"{rows_a_chip(run, plan):g}",
        str(run.train.loss_chunks),
        f"{plan.hbm_gib_per_chip:.2f}" + ("" if plan.fits else ": does not fit"),
        f"{plan.hbm_limit_gib:g}",
        number(plan.mcycles, ",.0f"),
        number(plan.flops_executed and plan.flops_executed / plan.flops_model, ".3f"),
        bracket(plan.step_seconds_low, plan.step_seconds_high, ".3g"),
        bracket(plan.mfu_low, plan.mfu_high, ".1%"),
    ]


def report(run: config.Run, plan: figures.TrainingPlan) -> list[str]:
    parts, slice_ = plan.parts, hardware.find_slice(plan.slice)
    limit, need = plan.hbm_limit_gib, plan.hbm_gib_per_chip
    lines = [
        f"{plan.slice}: {plan.devices} x {slice_.device} on {slice_.hosts} hosts, mesh {layout(run.mesh)}",
        f"remat {run.model.remat}, kernel {run.model.kernel}, {run.train.microbatches} microbatches of "
        f"{run.train.batch_size // run.train.microbatches} rows ({rows_a_chip(run, plan):g} a chip), "
        f"loss in {run.train.loss_chunks} chunks",
        "",
        f"memory a chip, GiB (limit {limit:g})",
        f"  parameters and optimiser {parts['state']:10.2f}",
        f"  gradients                {parts['gradients']:10.2f}",
        f"  saved activations        {parts['activations']:10.2f}",
        f"  logits of a chunk        {parts['logits']:10.2f}",
        f"  work of a layer          {parts['work']:10.2f}",
        f"  at the peak              {need:10.2f}  by the {plan.hbm_from}: "
        + (f"fits, {limit - need:.2f} to spare" if plan.fits else "does not fit"),
    ]
    if not plan.fits:
        lines.append(f"  {memory.advice(memory.Need(**parts), limit)}; --suggest searches")
    lines += ["", f"TFLOP a chip and step: model {plan.flops_model / 1e12:,.0f}"]
    if plan.flops_executed:
        ratio = plan.flops_executed / plan.flops_model
        lines[-1] += f", executed {plan.flops_executed / 1e12:,.0f} ({ratio:.3f} times)"
        lines += ["collectives a chip and step          count        GiB   seconds   uncovered"]
        for one in plan.collectives or ():
            how = "asynchronous" if one["started"] else "synchronous"
            lines.append(
                f"  {one['kind']:20}{how:14}{one['count']:6}{one['gib']:11.2f}{one['seconds']:10.3f}"
                f"{one['exposed_seconds']:12.3f}"
            )
        lines += [
            "",
            "estimated (llama_jax/plan/roofline.py; docs/scale.md holds it against published runs):",
            f"  step {bracket(plan.step_seconds_low, plan.step_seconds_high, '.3g')} s, "
            f"MFU {bracket(plan.mfu_low, plan.mfu_high, '.1%')}, "
            f"at least {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip",
            f"  {run.train.steps:,} steps: {bracket(plan.days_low, plan.days, ',.1f')} days, "
            f"{bracket(plan.chip_hours_low, plan.chip_hours, ',.0f')} chip-hours, "
            + (
                f"at most {plan.kwh:,.0f} kWh, {plan.tco2eq:,.2f} tCO2eq"
                if plan.kwh
                else "energy unknown (the chip's power is not published)"
            ),
        ]
    lines.append(f"  a checkpoint takes {plan.checkpoint_gib:,.1f} GiB")
    return lines if plan.flops_executed else [*lines, no_times(plan.slice)]


def no_times(name: str) -> str:
    """Why a plan by formula has no step time: the formula is for ranking, up to a half off."""
    if not hardware.find_slice(name).topology:
        return "step time, days and chip-hours take a compiler, and there is none for GPUs here"
    return "step time, days and chip-hours take the compiler: the same command without --analytic"


def layout(mesh: config.Mesh) -> str:
    sizes = {axis: size for axis, size in dataclasses.asdict(mesh).items() if axis != "hardware"}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"


def rows_a_chip(run: config.Run, plan: figures.TrainingPlan) -> float:
    return run.train.batch_size / run.train.microbatches / plan.devices


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def bracket(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None else f"{low:{form}} to {high:{form}}"


if __name__ == "__main__":
    cli.run(main)
