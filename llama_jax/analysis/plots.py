"""Pictures of a run."""

from pathlib import Path
from typing import Any


def loss(rows: list[dict[str, Any]], baselines: dict[str, float], path: Path, title: str) -> None:
    """Training and validation loss against tokens, with horizontal lines for the baselines.

    `validation_loss/NAME` in a row, of one source among several, is a thin line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["loss"] for row in rows], linewidth=1, label="training")
    names = dict.fromkeys(
        name for row in rows for name in row if name.startswith("validation_loss")
    )
    for name in names:
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        _, is_one_source, source = name.partition("/")
        style: dict[str, Any] = {"linewidth": 0.8} if is_one_source else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), label=f"validation {source}".strip(), **style)
    for (name, value), line in zip(baselines.items(), ("--", ":"), strict=False):
        text = f"{name.removesuffix('_loss')} {value:.3f}"
        axes.axhline(value, color="grey", linestyle=line, label=text)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def scaling(runs: tuple[Any, Any, Any], law: Any, path: Path) -> None:
    """Losses of runs (N, D, loss) against tokens, one line a size, and the law through them."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    N, D, losses = runs
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    tokens = np.geomspace(D.min() / 2, D.max() * 2, 100)
    for i, size in enumerate(np.unique(N)):
        colour, of = f"C{i % 10}", size == N
        axes.plot(D[of], losses[of], "o", color=colour, label=f"{size:,.0f} parameters")
        axes.plot(tokens, law.loss(size, tokens), "-", color=colour, linewidth=1)
    axes.axhline(law.E, color="grey", linestyle=":", label=f"E = {law.E:.3f}")
    axes.set(xscale="log", xlabel="tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
