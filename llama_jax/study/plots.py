"""The pictures of a study, as SVG."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from llama_jax.study.record import Results
from llama_jax.study.table import TableRow

LINES = ("-", "--", "-.", ":")


def all_of(
    results: list[Results], rows: list[TableRow], seq_len: int, tested: bool
) -> dict[str, str]:
    """Caption -> SVG; those that have something to show. Differences only where they are tested."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "llama_jax", "font.size": 10})
    done = [one for one in results if one.runs]
    if not done:
        return {}
    styles = {one.cell.name: _style(i) for i, one in enumerate(results)}
    found = {
        "Validation loss against tokens: mean over seeds, and the band from lowest to highest.": _figure(
            lambda axes: _curves(axes, done, styles, "tokens", "tokens")
        ),
        "The same against model FLOPs.": _figure(
            lambda axes: _curves(axes, done, styles, "flops", "model FLOPs")
        ),
        "The same against time in training steps.": _figure(
            lambda axes: _curves(axes, done, styles, "seconds", "seconds in training steps")
        ),
    }
    if tested and any(not math.isnan(row.difference.low) for row in rows[1:]):
        found["Final loss less the base's: paired, with 95% intervals, before any correction."] = (
            _figure(lambda axes: _differences(axes, rows), height=1.2 + 0.45 * len(rows))
        )
    if len(rows[0].by_length) > 1:
        found["Loss on the same text, read in windows of 1, 2, ... times the trained length."] = (
            _figure(lambda axes: _lengths(axes, rows, styles, seq_len))
        )
        found["Loss by place in the longest window; beyond the line nothing was trained."] = (
            _figure(lambda axes: _places(axes, done, styles, seq_len))
        )
    return found


def _figure(draw: Callable[[Any], None], height: float = 4.2) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, height), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    # The page sets the size.
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg[svg.index("<svg") :], count=1)


def _style(i: int) -> dict[str, Any]:
    """Ten colours, then the same in other lines."""
    return {"color": f"C{i % 10}", "linestyle": LINES[i // 10 % len(LINES)]}


def _curves(axes, results: list[Results], styles, x: str, label: str) -> None:
    from matplotlib.ticker import EngFormatter

    lowest, highest = np.inf, -np.inf
    for one in results:
        style, (places, losses) = styles[one.cell.name], one.curve(x)
        if not losses.size:
            continue
        mean = losses.mean(0)
        axes.plot(places, mean, label=one.cell.name, linewidth=1.6, **style)
        axes.fill_between(
            places, losses.min(0), losses.max(0), alpha=0.15, color=style["color"], linewidth=0
        )
        lowest, highest = min(lowest, losses.min()), max(highest, mean[len(mean) // 8])
    if highest > lowest:  # the first points are far above what is of interest
        axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    axes.set(xlabel=label, ylabel="validation loss (nats a token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend()


def _differences(axes, rows: list[TableRow]) -> None:
    known = [row for row in rows[1:] if not math.isnan(row.difference.low)][::-1]
    for y, row in enumerate(known):
        of = row.difference
        colour = {"better": "C2", "worse": "C3"}.get(row.verdict, "grey")
        axes.plot([of.low, of.high], [y, y], color=colour, linewidth=2)
        axes.plot(of.mean, y, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(known)), [row.name for row in known])
    axes.set_ylim(-0.6, len(known) - 0.4)
    axes.set(xlabel=f"nats a token more than {rows[0].name} (left: better)")


def _lengths(axes, rows: list[TableRow], styles, seq_len: int) -> None:
    for row in rows:
        known = {n: of for n, of in row.by_length.items() if not math.isnan(of.mean)}
        lengths = [n * seq_len for n in known]
        means = [of.mean for of in known.values()]
        axes.plot(lengths, means, marker="o", label=row.name, **styles[row.name])
    axes.set_xscale("log", base=2)
    ticks = [n * seq_len for n in rows[0].by_length]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set(xlabel="window (tokens)", ylabel="loss (nats a token)")
    axes.legend()


def _places(axes, results: list[Results], styles, seq_len: int) -> None:
    longest = max(n for one in results for run in one.runs for n in run.scores)
    block = max(longest * seq_len // 64, 1)
    for one in results:
        times = max(n for run in one.runs for n in run.scores)
        places = np.mean([run.scores[times].position_T for run in one.runs], axis=0)
        means = places[: len(places) // block * block].reshape(-1, block).mean(1)
        middle = (np.arange(len(means)) + 0.5) * block
        axes.plot(middle, means, label=one.cell.name, linewidth=1.4, **styles[one.cell.name])
    axes.axvline(seq_len, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="place in the window", ylabel="loss (nats a token)")
    axes.legend()
