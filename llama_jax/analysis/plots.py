"""Pictures of a run."""

from pathlib import Path
from typing import Any


def loss(rows: list[dict[str, Any]], baselines: dict[str, float], path: Path, title: str) -> None:
    """Training and validation loss against tokens, with horizontal lines for the baselines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["loss"] for row in rows], linewidth=1, label="training")
    held_out = [(row["tokens"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="validation")
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="grey", linestyle=style, label=f"{name} {value:.3f}")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
