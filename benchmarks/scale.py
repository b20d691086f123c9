"""`make compile-all`: compile networks for slices and write the table of docs/scale.md; its text stays.

Each row is one micro-step, as in the comparisons with MaxText; minutes a row. What is compiled is kept in
benchmarks/scale.json by its settings, the flags and the compiler's version: started again, only new rows are
compiled, and those whose traced program is another than it was. Until then the page marks these as of an
earlier program. --only=TEXT takes rows by page or slice, --write compiles none.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tqdm

from benchmarks import published
from experiments import plan as command
from llama_jax import config, sharding
from llama_jax.analysis import flops, hardware
from llama_jax.model import transformer
from llama_jax.plan import aot, figures
from llama_jax.plan.hlo import Compiled
from llama_jax.train import program as programs

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/scale.json", ROOT / "docs/scale.md"


def micro(stem: str, name: str, rows: int, remat: str, seq: int = 2048, chunks: int = 2, **mesh):
    """A page's network with `rows` rows a device group of one data-parallel part, one microbatch."""
    run = config.freeze(importlib.import_module(f"configs.{stem}").get_config())
    slice_ = hardware.find_slice(name)
    fixed = mesh.get("data", 1) * mesh.get("tensor", 1) * slice_.slices
    sizes = {"fsdp": slice_.devices // fixed, "slices": slice_.slices, **mesh}
    chosen = config.Mesh(**sizes, hardware=name)
    parts = slice_.devices // chosen.tensor
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, remat=remat, kernel=slice_.kernel),
        mesh=chosen,
        data=dataclasses.replace(run.data, seq_len=seq),
        train=dataclasses.replace(
            run.train, batch_size=rows * parts, microbatches=1, loss_chunks=chunks
        ),
    )


def best(stem: str, name: str) -> config.Run:
    """The page as it lays itself out, one microbatch of it."""
    run = config.freeze(importlib.import_module(f"configs.{stem}").get_config(name))
    rows = run.train.batch_size // run.train.microbatches
    train = dataclasses.replace(run.train, batch_size=rows, microbatches=1)
    return dataclasses.replace(run, train=train)


FIXED = (
    *(lambda remat=remat: micro("7b", "v4_32", 1, remat) for remat in ("none", "dots", "offload")),
    lambda: micro("7b", "v4_32", 3, "linear"),
    lambda: micro("7b", "v4_32", 4, "attention"),
    lambda: micro("7b", "v4_32", 4, "full"),
    lambda: micro("7b", "v5p_32", 4, "full"),
    lambda: micro("7b", "v5e_256", 4, "full", data=4, fsdp=64),
    lambda: micro("7b", "v5e_256", 4, "attention", data=4, fsdp=64),
    lambda: micro("65b", "v4_512", 4, "full", chunks=4, tensor=4),
    lambda: micro("65b", "v4_512", 2, "full", data=2, fsdp=128),
    lambda: micro("llama2_70b", "v5p_1024", 1, "linear", 4096, data=4, fsdp=128),
    lambda: micro("llama31_405b", "v5p_1024", 4, "full", 8192, 8, tensor=4),
    lambda: micro("llama31_8b", "v6e_256", 2, "full", 8192, 8, data=4, fsdp=64),
)
SMALL = [
    (stem, name)
    for stem in ("research_150m", "research_350m", "research_1b")
    for name in ("v4_8", "v5e_8", "v6e_8")
]
CONFIGS = (
    *(("7b", "v4_32"), ("13b", "v4_64"), ("33b", "v4_128"), ("65b", "v4_512")),
    *(("llama2_7b", "v4_32"), ("llama2_13b", "v5p_32"), ("llama2_70b", "v5p_1024")),
    *(("llama3_8b", "v5p_32"), ("llama3_70b", "v5p_512"), ("llama31_8b", "v5p_128")),
    *(("llama31_70b", "v5p_1024"), ("llama31_405b", "v5p_1024")),
    *(("llama32_1b", "v4_8"), ("llama32_3b", "v5e_64")),
    *(("research_1b", "v2_8"), ("llama32_1b", "v3_8"), ("7b", "v3_32"), ("7b", "v5e_256x2")),
)


def runs() -> list[config.Run]:
    """Those beside published runs first, each once."""
    beside = map(published.ours, published.COMPARED)
    found = list(dict.fromkeys([make() for make in (*beside, *FIXED)]))
    return found + [best(stem, name) for stem, name in (*SMALL, *CONFIGS)]


def title(run: config.Run) -> str:
    """The name of the page whose network it is."""
    from configs import sizes

    shape = lambda model: dataclasses.replace(  # noqa: E731
        model, remat="none", kernel="blockwise", compute_dtype="bfloat16", norm_eps=1e-5
    )
    names = [n for n, m in vars(sizes).items() if n.isupper() and n[0] != "_"]
    return next(n for n in names if shape(getattr(sizes, n)) == shape(run.model))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    only = next((a.removeprefix("--only=") for a in sys.argv[1:] if a.startswith("--only=")), "")
    all_ = {key_of(run): run for run in runs()}
    before = read()
    kept = {}
    for key, run in all_.items():
        if key in before and (differing := differs(before[key], run)) <= {"program"}:
            kept[key] = {**before[key], "earlier": bool(differing)}
    chosen = lambda run: only.lower() in f"{title(run)} {run.mesh.hardware}".lower()  # noqa: E731
    old = {key for key in all_ if key not in kept or kept[key]["earlier"]}
    absent_first = sorted(old, key=lambda key: key in kept)
    todo = [key for key in absent_first if chosen(all_[key])]
    for key in tqdm.tqdm([] if "--write" in sys.argv else todo, desc="compiling"):
        kept[key] = compiled(all_[key])
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        write(kept)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    write(kept)


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def key_of(run: config.Run) -> str:
    """Of a run's settings."""
    return hashlib.sha256(json.dumps(changed(run)).encode()).hexdigest()[:16]


def changed(run: config.Run) -> dict:
    """The settings that are not the usual ones."""
    usual = config.flatten(config.Run())
    return {
        place: value for place, value in config.flatten(run).items() if value != usual.get(place)
    }


def compiled(run: config.Run) -> dict:
    """What the compiler says of a run, and of what it says it."""
    try:
        said = aot.compile(run, run.mesh.hardware).to_dict()
    except aot.DoesNotFit as error:
        said = {"does_not_fit": str(error)}
    row = f"{title(run)} {run.mesh.hardware}"
    what = of_what(run)
    return {"row": row, "run": config.to_dict(run), **what, "earlier": False, "compiled": said}


def of_what(run: config.Run) -> dict:
    """All that decides the compiler's answer: the traced program, flags, versions."""
    slice_ = hardware.find_slice(run.mesh.hardware)
    program = programs.build(run, sharding.abstract(run.mesh, slice_.devices))
    traced = str(program.step.trace(program.state, program.frozen, program.batch).jaxpr)
    # Sets of names are printed in another order by each process.
    in_order = lambda found: ", ".join(sorted(found.group(1).split(", ")))  # noqa: E731
    traced = re.sub(r"frozenset\(\{([^}]*)\}\)", in_order, traced)
    return {
        "program": hashlib.sha256(traced.encode()).hexdigest()[:16],
        "options": hardware.compiler_options(slice_.device),
        "topology": slice_.topology,
        "libtpu": _libtpu(),
        "jax": metadata.version("jax"),
    }


def differs(entry: dict, run: config.Run) -> set[str]:
    """Of what decides the compiler's answer, that which is other than it was for an entry."""
    return {name for name, value in of_what(run).items() if entry[name] != value}


def plan_of(run: config.Run, entry: dict) -> figures.TrainingPlan:
    said = entry["compiled"]
    if message := said.get("does_not_fit"):
        return figures.of(run, run.mesh.hardware, aot.DoesNotFit(message))
    return figures.of(run, run.mesh.hardware, Compiled.from_dict(said))


def write(kept: dict) -> None:
    every = runs()
    rows = [(run, plan_of(run, kept[key_of(run)])) for run in every if key_of(run) in kept]
    header = ("network", "T", *command.COLUMNS, "by formula")
    lines = [
        "# On slices, by TPU's compiler",
        "",
        f"Written by `make compile-all`, {len(rows)} of {len(every)} rows so far: one micro-step of each, "
        f"compiled with libtpu {_libtpu()} and jax {metadata.version('jax')} for slices that were not there. "
        "Memory, cycles and FLOPs are the compiler's and the program's, and exact; step time and MFU are "
        "estimates (`llama_jax/plan/roofline.py`). The last column is the memory formula over the compiler's "
        "figure. Rows with a † were compiled from the step of an earlier version, whose program differs.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for run, plan in rows:
        formula = figures.of(run, plan.slice, None).hbm_gib_per_chip
        share = f"{formula / plan.hbm_gib_per_chip:.2f}"
        mark = " †" * kept[key_of(run)]["earlier"]
        cells = [title(run) + mark, str(run.data.seq_len), *command.row(run, plan), share]
        lines.append(f"| {' | '.join(cells)} |")
    _, mark, notes = PAGE.read_text().partition("\n## Reading it")
    PAGE.write_text("\n".join([*lines, "", *beside_published(kept)]) + "\n" + mark + notes)


def beside_published(kept: dict) -> list[str]:
    """The section that holds the brackets against published runs."""
    header = (
        "network",
        "slice",
        "T",
        "tokens/s a chip",
        "as published",
        "whole square",
        "causal half",
    )
    lines = [
        "## Published runs",
        "",
        "What others measured on TPUs, and the bracket of the nearest run that can be said here. MFU by "
        "both conventions is computed from the tokens a second; brackets are of the causal half. Sources: "
        "`benchmarks/published.py`.",
        "",
        f"| {' | '.join(header)} | bracket | holds | recipe | compiled here |",
        "|---" * (len(header) + 4) + "|",
    ]
    for one in published.COMPARED:
        run = published.ours(one)()
        cells = [*_figures(one), "not compiled yet", ""]
        if key_of(run) in kept:
            plan = plan_of(run, kept[key_of(run)])
            cells[-2:] = ["does not fit", f"**no**: {one.outside}"]
            if plan.mfu_low is not None and plan.mfu_high is not None:
                cells[-2] = command.bracket(plan.mfu_low, plan.mfu_high, ".1%")
                inside = plan.mfu_low <= mfu(one) <= plan.mfu_high
                cells[-1] = (
                    "yes" if inside else f"**no**: {one.outside}"
                ) + " (fitted)" * one.fitted
        lines.append(f"| {' | '.join([*cells, one.recipe, one.differs or 'the same'])} |")
    lines += ["", "Listed, not compared:", "", f"| {' | '.join(header)} | why |"]
    lines += ["|---" * (len(header) + 1) + "|"]
    lines += [f"| {' | '.join([*_figures(one), one.differs])} |" for one in published.LISTED]
    return lines


def _figures(one: published.Published) -> list[str]:
    both = [f"{mfu(one, square):.1%}" for square in ("whole", "half")]
    return [one.network, one.slice, f"{one.seq_len:,}", f"{one.tokens:,g}", one.said, *both]


def mfu(one: published.Published, square: str = "half") -> float:
    """MFU of a published run, of the bfloat16 peak, by the tokens that it trained on a second."""
    slice_ = hardware.find_slice(one.slice.split(",")[0])
    model = config.freeze(importlib.import_module(f"configs.{one.network}").get_config()).model
    module = transformer.build(model, sharding.abstract(config.Mesh(), 1))
    a_token = flops.per_token(module, one.seq_len)
    if square == "whole":
        a_token += 6 * model.layers * model.heads * model.head_dim * one.seq_len
    device = hardware.DEVICES[slice_.device]
    peak = device.bf16_tflops * 1e12 * slice_.devices / slice_.chips
    return one.tokens * a_token / peak


def _libtpu() -> str:
    places = [*sys.path, str(Path(sys.prefix) / "libtpu")]
    found = next(iter(metadata.distributions(name="libtpu", path=places)), None)
    return found.version if found else "(unknown)"


if __name__ == "__main__":
    main()
