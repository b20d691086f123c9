"""Ablate a network: `python -m experiments.ablate --config=configs/ablations/position.py --workdir=DIR`.

Every cell of the study, every seed, one run after another; started again with the same command the study
goes on where it was, and a run that failed is tried again. The report is written anew after each run:
report.html, report.md, report.tex and report.csv. --list prints the runs; --only=k/N takes every N-th from
the k-th on, for job arrays that share a workdir; --only=NAME takes one; --report-only writes the report of
what is there.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments import cli
from llama_jax import config, files
from llama_jax.analysis import memory, runcard
from llama_jax.data import mixture, prepare
from llama_jax.eval import score
from llama_jax.run import hosts, provenance, session, warm_start
from llama_jax.run.lease import Held
from llama_jax.study import grid, overview, record, report, schema
from llama_jax.train import checkpoint, loop

cli.define_hosts()
CONFIG = cli.define_config()
WORKDIR = cli.define_path("workdir", None, "Where the study keeps everything it writes.")
LIST = flags.DEFINE_bool("list", False, "Print the runs and stop.")
ONLY = flags.DEFINE_string(
    "only", "", "k/N: every N-th run from the k-th on. Or the name of a run."
)
REPORT_ONLY = flags.DEFINE_bool("report-only", False, "Write the report of what is there and stop.")

FAILURES = (ValueError, OSError, loop.Anomaly, checkpoint.SaveError, RuntimeError)


def main() -> int:
    study = schema.freeze(CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))
    found = grid.cells(study)
    runs = grid.runs(study, found)
    chosen = choose(runs)
    if WORKDIR.value is None:
        raise ValueError("--workdir must name the folder of the study")
    if LIST.value:
        for cell, seed in chosen:
            print(command_of(cell, seed))
        return 0
    workdir = Path(WORKDIR.value).expanduser().absolute()
    if REPORT_ONLY.value:
        study, found = pinned(study, found, workdir)
        claim(workdir, study, found, must_exist=True)
        return write(study, found, workdir)

    cli.join(study.base.mesh.hardware)
    cli.tune_for_cpu()
    hosts.check(study.base.mesh)
    study, found = pinned(study, found, workdir)
    runs = grid.runs(study, found)
    chosen = choose(runs)
    hosts.compare(lambda: {**settings(study), "--only": ONLY.value, **provenance.installed()})
    hosts.together(lambda: claim(workdir, study, found))
    if jax.process_count() > 1:
        session.check_shared(workdir)
    cache = Path(study.base.data.cache).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    if hosts.first():
        print("\n".join(describe(study, found)))
    start = time.perf_counter()
    prepared = session.prepare_once(study.base.data, study.base.model.vocab_size)
    hosts.together(lambda: check_text(study, found, workdir, prepared))
    rows = held_out(study, prepared)
    view = overview.Overview(workdir, runs, quiet=not hosts.first())
    with hosts.interrupt() as interrupt, view:
        trained, failed, held = run_all(
            study, found, chosen, prepared, rows, workdir, interrupt, view
        )
    if interrupt.signal:
        if hosts.first():
            print(f"{interrupt.signal}: saved; run the same command to go on:\n  {command()}")
        return 1 if failed else 0
    if trained:
        share = trained / (time.perf_counter() - start)
        print(f"{share:.0%} of the time was spent in training steps")
    code = write(study, found, workdir) if hosts.first() else 0
    hosts.agree(True)
    return 1 if failed else Held.exit_code if held else code


def pinned(study: schema.Study, found: list, workdir: Path) -> tuple[schema.Study, list]:
    """The study and its cells with the weights that all of them begin with, those on record in study.json."""
    path = workdir / "study.json"

    def recorded() -> config.Train | None:
        if not path.exists():
            return None
        return config.from_dict(json.loads(path.read_text())["base"]).train

    base = warm_start.pinned(study.base, recorded)
    names = ("init_from", "init_step", "init_checksum")
    begins = {name: getattr(base.train, name) for name in names}

    def of(run: config.Run) -> config.Run:
        return dataclasses.replace(run, train=dataclasses.replace(run.train, **begins))

    cells = [cell._replace(run=of(cell.run)) for cell in found]
    return dataclasses.replace(study, base=base), cells


def settings(study: schema.Study) -> dict:
    """Of the study, by name."""
    own = {name: value for name, value in schema.to_dict(study).items() if name != "base"}
    return {**own, **config.flatten(study.base)}


def choose(runs: list) -> list:
    """What --only leaves. ValueError if it is neither k/N nor a run."""
    if not ONLY.value:
        return runs
    k, slash, n = ONLY.value.partition("/")
    if slash and k.isdigit() and n.isdigit():
        if not 1 <= int(k) <= int(n):
            raise ValueError(f"--only={ONLY.value} must be k/N with k from 1 to N")
        return runs[int(k) - 1 :: int(n)]
    names = {grid.name_of(cell, seed): (cell, seed) for cell, seed in runs}
    return [config.choose(names, ONLY.value, "--only")]


def held_out(study: schema.Study, prepared: prepare.Prepared) -> np.ndarray:
    """The rows that results are scored on. ValueError if there are too few."""
    try:
        return np.stack(mixture.validation_blocks(prepared, study.rows, study.block))
    except ValueError as error:
        raise ValueError(f"rows={study.rows}: {error}") from None


def run_all(
    study, found, chosen, prepared, rows, workdir, interrupt, view
) -> tuple[float, int, int]:
    """Seconds in training steps, failures, and runs that other processes hold, of this session."""
    machines, trained, failed, held = {}, 0.0, 0, 0
    for cell, seed in chosen:
        if interrupt.due(wait=True):
            break
        folder = record.folder(workdir, cell, seed)
        if hosts.first_says(record.state(folder) == "done"):
            continue
        view.begin(cell, seed)
        error = None
        try:
            if cell.name not in machines:
                machines[cell.name] = session.Machine(cell.run)
            run = grid.seeded(cell.run, seed)
            machine = machines[cell.name]
            with session.holding(folder, run) as lease:
                # Another process may have done it meanwhile.
                if hosts.first_says(record.state(folder) == "done"):
                    continue
                if hosts.first():
                    (folder / record.FAILED).unlink(missing_ok=True)
                result = session.train(
                    run, folder, lease, machine, prepared, interrupt, view.console
                )
                trained += result.seconds_here
                if not result.interrupted:
                    finish(study, cell, seed, machine, folder, prepared, rows, result)
        except FAILURES as caught:
            error = caught
        error = hosts.outcome(error)
        if isinstance(error, Held):  # another process of this study trains it
            held += 1
            view.say(f"passed over {cell.name}, seed {seed}: {error}")
        elif error:
            failed += 1
            if hosts.first():
                folder.mkdir(parents=True, exist_ok=True)
                reason = f"{str(error).strip() or type(error).__name__}\n"
                files.write(folder / record.FAILED, reason)
            view.fail(cell, seed, error)
        view.end(cell, seed)
        if hosts.first():
            with contextlib.suppress(OSError):  # it is written anew after the next one
                make(study, found, workdir)
    return trained, failed, held


def finish(study, cell, seed, machine, folder, prepared, rows, result) -> None:
    """Score at every length at which the network is defined, and write the card.

    A table of positions ends with what was trained.
    """
    run = grid.seeded(cell.run, seed)
    table = run.model.max_positions
    at_once = run.tokens_per_step // run.train.microbatches
    scores = {
        times: score.windows(machine.program.module, result.params, rows, times, at_once)
        for times in study.lengths
        if not table or times * run.data.seq_len <= table
    }
    if hosts.first():
        program = machine.program
        need = memory.need(run, program.module.layout, program.state, machine.kind, program.frozen)
        more = {"memory_gib": need.total}
        runcard.write(session.card(run, result, prepared, command_of(cell, seed), more), folder)
        record.write_scores(folder, scores)  # last: it says that the run is done


def claim(workdir: Path, study: schema.Study, found: list, must_exist: bool = False) -> None:
    """Make the workdir this study's. ValueError if it is another's, or has runs that are not these."""
    path = workdir / "study.json"
    ours = json.loads(json.dumps(schema.to_dict(study)))
    if path.exists():
        differing = differences(json.loads(path.read_text()), ours)
        if differing:
            raise session.another(workdir, "study", differing)
        record.check(workdir, found, study.seeds)
    elif must_exist:
        raise ValueError(f"--workdir={workdir} holds no study: there is no {path.name}")
    if hosts.first() and not must_exist:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            files.write(path, json.dumps(ours, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


def check_text(study, found, workdir, prepared) -> None:
    """ValueError if runs of the study have read other text."""
    for cell, seed in grid.runs(study, found):
        card = runcard.read(record.folder(workdir, cell, seed))
        if card and card["provenance"]["data"] != prepared.fingerprint:
            raise ValueError(
                f"the text has changed: {grid.name_of(cell, seed)} was trained on data "
                f"{card['provenance']['data']}, now it is {prepared.fingerprint}; give a new --workdir, or "
                "bring the old text back"
            )


def differences(old: dict, new: dict) -> list[str]:
    """Settings that change results; more seeds and cells may be added to a study that is there."""
    base = config.diff(config.from_dict(old["base"]), config.from_dict(new["base"]), essential=True)
    same = ("match", "rows", "lengths")
    return base + [f"{name}: {old[name]} -> {new[name]}" for name in same if old[name] != new[name]]


def describe(study: schema.Study, found: list[grid.Cell]) -> list[str]:
    """What there will be, and what was matched."""
    base, steps = found[0], study.base.train.steps
    lines = [
        f"{len(found)} cells x {study.seeds} seeds; the base is {base.name}; matched: {study.match}"
    ]
    width = max(len(cell.name) for cell in found)
    for cell in found:
        more = cell.parameters / base.parameters - 1
        flops = cell.flops_per_token / base.flops_per_token - 1
        lines.append(
            f"  {cell.name:{width}}  ffn_dim {cell.run.model.ffn_dim}  "
            f"{cell.parameters:,} parameters ({more:+.2%})  "
            f"{cell.flops_per_token:,} FLOPs a token ({flops:+.2%})"
            + (f"  {cell.run.train.steps:,} steps" if cell.run.train.steps != steps else "")
        )
    return lines


def make(study, found, workdir) -> report.Report:
    results = record.collect(workdir, found, study.seeds)
    ran = {(one.cell.name, run.seed): run.card["command"] for one in results for run in one.runs}
    commands = [
        ran.get((cell.name, seed), command_of(cell, seed)) for cell, seed in grid.runs(study, found)
    ]
    return report.write(title(), study, results, [command(), *commands], workdir)


def write(study, found, workdir) -> int:
    header, body = report.results(make(study, found, workdir))
    rows = [header, *body]
    if not report.concludes(study):
        print(report.QUICK)
    print(
        f"losses are of {study.rows} held-out rows, those of the curves of {study.base.eval.rows}"
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"written to {workdir}: report.html, report.md, report.tex, report.csv")
    return 0


def title() -> str:
    return f"Ablation: {Path(page().partition(':')[0]).stem}"


def page() -> str:
    flag: Any = flags.FLAGS["config"]  # ml_collections' kind of flag
    return flag.config_filename


def command(*more: str) -> str:
    """This study's, without what chooses among its runs."""
    settings = config_flags.get_override_values(flags.FLAGS["config"])
    given = [
        f"--config={page()}",
        *(f"--config.{place}={value}" for place, value in settings.items()),
    ]
    if WORKDIR.value is not None:
        given.append(f"--workdir={WORKDIR.value}")
    return shlex.join(["python", "-m", "experiments.ablate", *given, *more])


def command_of(cell: grid.Cell, seed: int) -> str:
    return command(f"--only={grid.name_of(cell, seed)}")


if __name__ == "__main__":
    cli.run(main, loop.Anomaly, checkpoint.SaveError, RuntimeError, settings=schema.settings())
