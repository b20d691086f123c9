"""`make compile-all`: compile networks for slices and write the table of docs/scale.md; its text stays.

Each row is one micro-step, as in the comparisons with MaxText; minutes a row. What is compiled is kept in
benchmarks/scale.json by its settings, the flags and the compiler's version: started again, only new rows are
compiled; when the step's code changes, remove that file. --only=TEXT takes rows by page or slice.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tqdm

from experiments import plan as command
from llama_jax import config
from llama_jax.analysis import hardware
from llama_jax.plan import figures

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
PUBLISHED = (
    *(("7b", "v4_32"), ("13b", "v4_64"), ("33b", "v4_128"), ("65b", "v4_512")),
    *(("llama2_7b", "v4_32"), ("llama2_13b", "v5p_32"), ("llama2_70b", "v5p_1024")),
    *(("llama3_8b", "v5p_32"), ("llama3_70b", "v5p_512"), ("llama31_8b", "v5p_128")),
    *(("llama31_70b", "v5p_1024"), ("llama31_405b", "v5p_1024")),
    *(("llama32_1b", "v4_8"), ("llama32_3b", "v5e_64")),
    *(("research_1b", "v2_8"), ("llama32_1b", "v3_8"), ("7b", "v3_32"), ("7b", "v5e_256x2")),
)


def runs() -> list[config.Run]:
    found = [make() for make in FIXED]
    return found + [best(stem, name) for stem, name in (*SMALL, *PUBLISHED)]


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
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = {key_of(run) for run in runs()}
    kept = {key: value for key, value in kept.items() if key in wanted}
    todo = [run for run in runs() if only.lower() in f"{title(run)} {run.mesh.hardware}".lower()]
    for run in tqdm.tqdm(todo, desc="compiling"):
        if (key := key_of(run)) not in kept:
            plan = figures.plan(run, run.mesh.hardware, compile=True)
            kept[key] = {"run": config.to_dict(run), "plan": dataclasses.asdict(plan)}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            write(kept)
    write(kept)


def key_of(run: config.Run) -> str:
    """What decides the compiler's answer, but for this project's code."""
    options = hardware.compiler_options(hardware.find_slice(run.mesh.hardware).device)
    usual = config.flatten(config.Run())
    changed = {
        place: value for place, value in config.flatten(run).items() if value != usual.get(place)
    }
    asked = [changed, options, metadata.version("jax"), _libtpu()]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def write(kept: dict) -> None:
    wanted = [key_of(run) for run in runs()]
    rows = [
        (config.from_dict(kept[key]["run"]), figures.Plan(**kept[key]["plan"]))
        for key in wanted
        if key in kept
    ]
    header = ("network", "T", *command.COLUMNS, "by formula")
    lines = [
        "# On slices, by TPU's compiler",
        "",
        "Written by `make compile-all`: one micro-step of each, compiled with libtpu "
        f"{_libtpu()} and jax {metadata.version('jax')} for slices that were not there. Memory, cycles "
        "and FLOPs are the compiler's and the program's, and exact; step time and MFU are estimates, from "
        "products alone to everything in series (`llama_jax/plan/roofline.py`). The last column is the "
        "memory formula over the compiler's figure.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for run, plan in rows:
        formula = figures.plan(run, plan.slice, compile=False).hbm_gib_per_chip
        share = f"{formula / plan.hbm_gib_per_chip:.2f}"
        cells = [title(run), str(run.data.seq_len), *command.row(run, plan), share]
        lines.append(f"| {' | '.join(cells)} |")
    _, mark, notes = PAGE.read_text().partition("\n## Reading it")
    PAGE.write_text("\n".join(lines) + "\n" + mark + notes)


def _libtpu() -> str:
    places = [*sys.path, str(Path(sys.prefix) / "libtpu")]
    found = next(metadata.distributions(name="libtpu", path=places), None)
    return found.version if found else "(unknown)"


if __name__ == "__main__":
    main()
