"""The report of a study: report.md, report.tex, report.csv and one page of HTML that needs nothing else."""

import csv
import html
import io
import math
from pathlib import Path
from typing import NamedTuple

from llama_jax import files
from llama_jax.study import plots, table
from llama_jax.study.record import Results
from llama_jax.study.schema import Study
from llama_jax.study.statistics import Estimate
from llama_jax.study.table import TableRow

QUICK = (
    "A quick look (preset 'quick'): it shows that everything works. Its runs are too short and too few to "
    "conclude anything from, so that nothing is tested and no cell is called better or worse."
)


class Report(NamedTuple):
    title: str
    study: Study
    results: list[Results]
    rows: list[TableRow]
    commands: list[str]  # of the whole study, then of each run

    @property
    def is_complete(self) -> bool:
        return all(row.seeds == self.study.seeds for row in self.rows)


def write(
    title: str, study: Study, results: list[Results], commands: list[str], folder: Path
) -> Report:
    rows = table.rows(results, study.lengths, study.block)
    if concludes(study):
        rows = table.ranked(rows)
    report = Report(title, study, results, rows, commands)
    pictures = plots.all_of(results, rows, study.base.data.seq_len, concludes(study))
    for name, text in {
        "report.md": markdown(report),
        "report.tex": latex(report),
        "report.csv": comma_separated(report),
        "report.html": page(report, pictures),
    }.items():
        files.write(folder / name, text)
    return report


def concludes(study: Study) -> bool:
    """Whether differences are tested. Runs of preset "quick" are too short to say anything of longer ones."""
    return study.preset != "quick"


def sentences(report: Report) -> list[str]:
    """What was held fixed, what was matched, how the numbers were made."""
    study, run = report.study, report.study.base
    cells = [one.cell for one in report.results]
    tokens = sorted({cell.run.train.steps * cell.run.tokens_per_step for cell in cells})
    steps = sorted({cell.run.train.steps for cell in cells})
    held = "Widths are the choices' own."
    if study.match != "nothing":
        what = {"parameters": "parameters", "flops": "flops_per_token"}[study.match]
        sizes = [getattr(cell, what) for cell in cells]
        off = max(abs(size / sizes[0] - 1) for size in sizes)
        held = (
            f"model.ffn_dim was set so that every cell has the base's {what.replace('_', ' ')}, "
            f"to within {off:.2%}."
        )
    rows = max((one.losses().shape[1] for one in report.results if one.runs), default=0)
    several = len(run.data.sources)
    said = [] if concludes(study) else [QUICK]
    tested = (
        f"; p values of the paired differences are Holm's, over {len(report.rows) - 1} comparisons with "
        f"{report.rows[0].name}; significant: below {table.ALPHA}. What other text, other sizes or longer "
        "training would show, they do not say."
    )
    said += [
        f"Every run trains on {_range(tokens)} tokens in {_range(steps)} steps, rows of "
        f"{run.data.seq_len}. "
        f"Of a seed all cells see the same text in the same order and begin with the same numbers "
        f"wherever shapes agree. {held}",
        f"Losses are means over {study.seeds} seed{'s' * (study.seeds > 1)} and {rows:,} held-out rows"
        f"{f', as many of each of {several} sources,' if several > 1 else ''} in "
        f"blocks of {study.block} that lie together, nats a token. Intervals are 95%, each by itself, by "
        "drawing seeds and blocks anew, with Student's t for so few seeds"
        + (tested if concludes(study) else "."),
        f"Curves are of at most {run.eval.rows:,} held-out rows. Losses at equal tokens, FLOPs and time are "
        "read off them where the cell that needs least had finished; the learning rate of the others had not "
        "yet fallen as far, which this does not make up for. GiB is what the formula counts of one device's "
        "memory, on a CPU at least. Time depends on the machine.",
    ]
    if not report.is_complete:
        missing = sum(study.seeds - row.seeds for row in report.rows)
        failed = sum(len(one.failures) for one in report.results)
        said.append(f"Incomplete: {missing} runs are not done, {failed} of them failed.")
    return said


def results(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; no tests and verdicts of a quick study."""
    header = ["cell", "seeds", "loss", "less the base", "p", "verdict"]
    header = header if concludes(report.study) else header[:4]
    base, *others = report.rows
    seeds = lambda row: f"{row.seeds} of {report.study.seeds}"  # noqa: E731
    rows = [
        [base.name, seeds(base), _interval(base.loss), "the base", "", ""],
        *(
            [
                row.name,
                seeds(row),
                _interval(row.loss),
                _interval(row.difference, sign=True),
                _number(row.p, ".3g"),
                row.verdict,
            ]
            for row in others
        ),
    ]
    return header, [row[: len(header)] for row in rows]


def costs(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["cell", "parameters", "FLOPs a token", "tokens/s", "GiB"]
    header += ["loss at equal tokens", "at equal FLOPs", "at equal time"]
    return header, [
        [
            row.name,
            f"{row.parameters:,}",
            f"{row.flops_per_token:,}",
            _number(row.tokens_per_second, ",.0f"),
            _number(row.memory_gib, ".3g"),
            _number(row.at_tokens, ".4f"),
            _number(row.at_flops, ".4f"),
            _number(row.at_seconds, ".4f"),
        ]
        for row in report.rows
    ]


def lengths(report: Report) -> tuple[list[str], list[list[str]]]:
    """Loss by length of the window; empty rows where only the trained length was asked for."""
    times = report.study.lengths
    header = ["cell", *(f"{n * report.study.base.data.seq_len:,}" for n in times)]
    if len(times) == 1:
        return header, []
    text = lambda row, n: _interval(row.by_length[n]) or ("undefined" if row.seeds else "")  # noqa: E731
    return header, [[row.name, *(text(row, n) for n in times)] for row in report.rows]


def failures(report: Report) -> list[str]:
    return [
        f"{one.cell.name}, seed {seed}: {why.splitlines()[0]}"
        for one in report.results
        for seed, why in one.failures.items()
    ]


def provenance(report: Report) -> list[str]:
    """What the run cards say of code, packages, machine and text; several where runs differ."""
    cards = [run.card for one in report.results for run in one.runs]
    if not cards:
        return []
    kept = {}
    for card in cards:
        hardware = card["hardware"]
        facts = {**card["provenance"], "hardware": f"{hardware['devices']} x {hardware['device']}"}
        for name, value in facts.items():
            kept.setdefault(name, dict.fromkeys(())).setdefault(value)
    hours = sum(card["device_hours"] for card in cards)
    lines = [f"{name}: {'; '.join(map(str, values))}" for name, values in kept.items()]
    return [
        *lines,
        f"{hours:.2f} device-hours in training steps",
        "each run's card and curve: runs/NAME/runcard.json, runs/NAME/metrics.jsonl in the workdir",
    ]


def markdown(report: Report) -> str:
    parts = [f"# {report.title}", *sentences(report), _pipes(*results(report))]
    parts += ["## Cost", _pipes(*costs(report))]
    header, by_length = lengths(report)
    if by_length:
        parts += ["## Windows longer than the trained one", _pipes(header, by_length)]
    if failed := failures(report):
        parts += ["## Failed", "\n".join(f"- {line}" for line in failed)]
    if facts := provenance(report):
        parts += ["## Runs", "\n".join(f"- {line}" for line in facts)]
    commands = "\n".join(report.commands)
    parts += ["## Commands", "The study, then each run by itself.", f"```sh\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def latex(report: Report) -> str:
    """A table for booktabs."""
    header, rows = results(report)
    lines = [" & ".join(map(_tex, row)) + r" \\" for row in (header, *rows)]
    body = "\n".join([lines[0], r"\midrule", *lines[1:]])
    return (
        f"\\begin{{tabular}}{{{'l' * len(header)}}}\n\\toprule\n"
        + body
        + "\n\\bottomrule\n\\end{tabular}\n"
        "% " + "\n% ".join(sentences(report)) + "\n"
    )


def comma_separated(report: Report) -> str:
    """One line a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    times = report.study.lengths
    axes = [axis.name for axis in report.study.axes]
    names = ("parameters", "flops_per_token", "tokens", "seconds", "tokens_per_second")
    writer.writerow(["cell", *axes, "seed", *names, *(f"loss_at_{n}x" for n in times)])
    for one in report.results:
        for run in one.runs:
            losses = [run.scores[n].row_R.mean() if n in run.scores else math.nan for n in times]
            seconds = run.rows[-1]["seconds"]
            choices = [one.cell.choices[axis] for axis in axes]
            figures = (run.card["tokens"], seconds, run.card["tokens_per_second"])
            sizes = (one.cell.parameters, one.cell.flops_per_token)
            writer.writerow([one.cell.name, *choices, run.seed, *sizes, *figures, *losses])
    return text.getvalue()


STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #555; }
.better { color: #157a2b; } .worse { color: #b3261e; }
.pictures { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #555; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def page(report: Report, pictures: dict[str, str]) -> str:
    header, by_length = lengths(report)
    parts = [f"<p>{html.escape(text)}</p>" for text in sentences(report)]
    parts.append(_html_table(*results(report)))
    if pictures:
        figures = "".join(
            f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, svg in pictures.items()
        )
        parts.append(f'<h2>Pictures</h2><div class="pictures">{figures}</div>')
    parts.append("<h2>Cost</h2>" + _html_table(*costs(report)))
    if by_length:
        parts.append(
            "<h2>Windows longer than the trained one</h2>" + _html_table(header, by_length)
        )
    if failed := failures(report):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in failed)
        parts.append(f"<h2>Failed</h2><ul>{items}</ul>")
    if facts := provenance(report):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in facts)
        parts.append(f"<h2>Runs</h2><ul>{items}</ul>")
    commands = html.escape("\n".join(report.commands))
    parts.append(
        f"<h2>Commands</h2><p>The study, then each run by itself.</p><pre>{commands}</pre>"
    )
    title = html.escape(report.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _html_table(header, rows) -> str:
    def cell(text):
        of_class = f' class="{text}"' if text in ("better", "worse") else ""
        return f"<td{of_class}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


def _pipes(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(of: Estimate, sign: bool = False) -> str:
    if math.isnan(of.mean):
        return ""
    form = "+.4f" if sign else ".4f"
    if math.isnan(of.low):
        return f"{of.mean:{form}}"
    return f"{of.mean:{form}} [{of.low:{form}}, {of.high:{form}}]"


def _range(values: list[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _tex(text: str) -> str:
    if text[:1] in ("+", "-"):
        return f"${text}$"
    return text.replace("_", r"\_").replace("%", r"\%")
