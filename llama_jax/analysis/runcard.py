"""The run card: what a reader of a result needs to judge and repeat it."""

import json
from pathlib import Path
from typing import Any

from llama_jax import config, files
from llama_jax.analysis import carbon

FILE = "runcard.json"


def make(
    run: config.Run,
    *,
    command: str,
    provenance: dict[str, Any],
    device_kind: str,
    devices: int,
    watts: float,
    parameters: int,
    steps: int,
    tokens: int,
    flops_per_token: float,
    peak_flops: float,
    seconds: float,
    epochs: dict[str, float],
    results: dict[str, Any],
) -> dict[str, Any]:
    """The card as plain values. Unknown figures are null: nothing is guessed.

    peak_flops is of all devices together, 0 if unknown, as watts, of one device; epochs says how often
    each source was read. Energy is that of the hours in training steps: evaluation, compilation and
    steps lost to a crash are not in it.
    """
    hours = seconds * devices / 3600
    flops = tokens * flops_per_token
    return {
        "command": command,
        "hardware": {"device": device_kind, "devices": devices, "watts": watts or None},
        "parameters": parameters,
        "steps": steps,
        "tokens": tokens,
        "epochs": epochs,
        "model_flops": flops,
        "mfu": flops / seconds / peak_flops if peak_flops and seconds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "device_hours": hours,
        "kwh": carbon.kwh(hours, watts) if watts else None,
        "kg_co2eq": carbon.kg_co2(hours, watts) if watts else None,
        "results": results,
        "provenance": provenance,
        "config": config.to_dict(run),
    }


def write(card: dict[str, Any], folder: Path) -> None:
    """runcard.md, and then runcard.json, which says that the run has its results."""
    files.write(folder / "runcard.md", markdown(card))
    files.write(folder / FILE, json.dumps(card, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The card of a run; None if there is none, or not the whole of it."""
    try:
        card = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def retire(folder: Path) -> None:
    """Rename the card of a run that goes on to more steps, so that it is not taken for the end's."""
    card = read(folder)
    for path in (folder / FILE, folder / "runcard.md"):
        if path.exists():
            path.replace(path.with_stem(f"{path.stem}-{card['steps'] if card else 'torn'}"))


def markdown(card: dict[str, Any]) -> str:
    hardware = card["hardware"]
    power = f"{hardware['watts']:g} W each" if hardware["watts"] else "power unknown"
    rows = {
        "hardware": f"{hardware['devices']} x {hardware['device']}, {power}",
        "parameters": f"{card['parameters']:,}",
        "steps": f"{card['steps']:,}",
        "tokens": f"{card['tokens']:,}",
        "epochs": ", ".join(f"{name} {n:.2f}" for name, n in card["epochs"].items()),
        "model FLOPs": f"{card['model_flops']:.4g}",
        "MFU": _or_unknown(card["mfu"], "{:.1%}"),
        "tokens/s": _or_unknown(card["tokens_per_second"], "{:,.0f}"),
        "device-hours": f"{card['device_hours']:.4g}",
        f"energy (PUE {carbon.PUE})": _or_unknown(card["kwh"], "{:.4g} kWh"),
        f"CO2eq ({carbon.KG_PER_KWH} kg/kWh)": _or_unknown(card["kg_co2eq"], "{:.4g} kg"),
        **{_words(name): f"{value:.4f}" for name, value in card["results"].items()},
        **{name.replace("_", " "): f"`{value}`" for name, value in card["provenance"].items()},
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"# Run card\n\n```\n{card['command']}\n```\n\n| | |\n|---|---|\n{table}\n"
        f"## Config\n\n```json\n{json.dumps(card['config'], indent=2)}\n```\n"
    )


def _words(name: str) -> str:
    """ "validation loss", or "validation loss, my_books" of one source."""
    what, slash, source = name.partition("/")
    return what.replace("_", " ") + (f", {source}" if slash else "")


def _or_unknown(value, form):
    return "unknown" if value is None else form.format(value)
