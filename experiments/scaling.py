"""Scaling laws from runs: `python -m experiments.scaling --runs='DIR/*' [--predict=N,D] [--plan=FLOPS,...]`.

Reads the run cards of finished runs, fits L = E + A / N^alpha + B / D^beta, and prints the coefficients with
95% intervals, the best size at given FLOPs, what a larger run would reach, and which runs to make at equal
FLOPs. --law=E,A,B,alpha,beta takes coefficients instead of runs; --law=chinchilla those that were published.
--output=DIR keeps scaling.json and scaling.png.
"""

import glob
import json
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli
from llama_jax.analysis import runcard, scaling

RUNS = cli.define_path("runs", "", "A glob of workdirs with run cards.")
LAW = flags.DEFINE_string("law", "", "E,A,B,alpha,beta; or chinchilla. Instead of --runs.")
PREDICT = flags.DEFINE_string("predict", "", "N,D: the loss of so many parameters and tokens.")
PLAN = flags.DEFINE_string(
    "plan", "", "FLOPs, with commas: runs at equal FLOPs around the best size."
)
DRAWS = flags.DEFINE_integer("draws", 200, "Bootstrap samples for the intervals.", lower_bound=20)
OUTPUT = cli.define_path("output", "", "Folder for scaling.json and scaling.png.")
SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")
FEW = 10


def main() -> int:
    if bool(RUNS.value) == bool(LAW.value):
        raise ValueError("give --runs=GLOB, or --law=E,A,B,alpha,beta")
    laws, runs = [], None
    if LAW.value:
        law = given(LAW.value)
    else:
        runs = read(RUNS.value)
        law = scaling.fit(*runs)
        laws = scaling.bootstrap(*runs, law, DRAWS.value)
        print(f"{len(runs[0])} runs")
        if not laws:
            print("  five different runs give no intervals: six are the fewest")
        elif len(runs[0]) < FEW:
            print(
                f"  fewer than {FEW}: five coefficients follow them closely, and the intervals are too narrow"
            )
    for name, value in law._asdict().items():
        print(f"{name:6}{value:12.4g}{between([getattr(one, name) for one in laws])}")
    if runs is not None:
        error = np.abs(np.log(law.loss(*runs[:2]) / runs[2]))
        print(
            f"the law misses the runs by {error.mean():.2%} on average, {error.max():.2%} at most"
        )
    predicted = predict(law, laws, runs) if PREDICT.value else None
    planned = plan(law, laws) if PLAN.value else None
    if OUTPUT.value:
        keep(Path(OUTPUT.value).expanduser(), law, laws, runs, predicted, planned)
    return 0


def read(pattern: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and validation losses of the finished runs."""
    cards = [runcard.read(Path(folder)) for folder in sorted(glob.glob(pattern))]
    found = [card for card in cards if card]
    if not found:
        raise ValueError(f"--runs={pattern!r} matches no folder with a runcard.json")
    texts = {card["provenance"]["data"] for card in found}
    if len(texts) > 1:
        raise ValueError(
            f"--runs={pattern!r}: the runs read different text ({', '.join(sorted(texts))}); their "
            "losses cannot be compared"
        )
    kinds = [{**card["config"]["model"], **dict.fromkeys(SIZES)} for card in found]
    for name, value in kinds[0].items():
        if other := next((kind[name] for kind in kinds if kind[name] != value), None):
            raise ValueError(
                f"--runs={pattern!r}: a law is of one kind of network, and model.{name} is {value!r} in some "
                f"runs and {other!r} in others"
            )
    rows = [
        (card["parameters"], card["tokens"], card["results"]["validation_loss"]) for card in found
    ]
    N, D, losses = (np.array(column, float) for column in zip(*rows, strict=True))
    return N, D, losses


def given(text: str) -> scaling.Law:
    if text == "chinchilla":
        return scaling.CHINCHILLA
    values = numbers(text, "--law")
    if len(values) != 5:
        raise ValueError(f"--law={text!r} must be five numbers, E,A,B,alpha,beta, or chinchilla")
    return scaling.Law(*values)


def numbers(text: str, flag: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}={text!r} must be numbers with commas, as 1e9,2e10") from None
    if min(values) <= 0:
        raise ValueError(f"{flag}={text!r} must be positive")
    return values


def predict(law, laws, runs) -> dict:
    values = numbers(PREDICT.value, "--predict")
    if len(values) != 2:
        raise ValueError(f"--predict={PREDICT.value!r} must be N,D: parameters and tokens")
    N, D = values
    loss = float(law.loss(N, D))
    print(
        f"{N:,.0f} parameters, {D:,.0f} tokens: {loss:.4f} nats{between([one.loss(N, D) for one in laws])}"
    )
    if runs is not None:
        farthest = max(N / runs[0].max(), D / runs[1].max())
        if farthest > 1:
            print(
                f"  that is {farthest:.3g} times beyond the largest run: intervals know nothing of that"
            )
    return {"parameters": N, "tokens": D, "loss": loss}


def plan(law, laws) -> list[dict]:
    rows = []
    print(f"{'FLOPs':>10}{'parameters':>18}{'tokens':>20}{'loss':>9}")
    for flops in numbers(PLAN.value, "--plan"):
        best = law.best(flops)[0]
        able = [one for one in laws if one.has_best(flops)]
        if len(able) < len(laws):
            print(
                f"  {len(laws) - len(able)} of {len(laws)} bootstrap samples have no best size at {flops:.3g}"
                " FLOPs and are left out of its interval"
            )
        for N, D in scaling.plan(law, flops):
            loss = float(law.loss(N, D))
            mark = (
                between([one.best(flops)[0] for one in able], ",.0f") if np.isclose(N, best) else ""
            )
            best_mark = f"  best{mark}" if np.isclose(N, best) else ""
            print(f"{flops:10.3g}{N:18,.0f}{D:20,.0f}{loss:9.4f}{best_mark}")
            rows.append({"flops": flops, "parameters": N, "tokens": D, "loss": loss})
    return rows


def between(values: list[float], form: str = ".4g") -> str:
    if not values:
        return ""
    low, high = scaling.interval(values)
    return f"  [{low:{form}}, {high:{form}}]"


def keep(folder: Path, law, laws, runs, predicted, planned) -> None:
    from llama_jax.analysis import plots

    folder.mkdir(parents=True, exist_ok=True)
    intervals = None
    if laws:
        of = {name: [getattr(one, name) for one in laws] for name in law._fields}
        intervals = {name: scaling.interval(values) for name, values in of.items()}
    record = {"law": law._asdict(), "intervals": intervals}
    record |= {"predicted": predicted, "planned": planned}
    (folder / "scaling.json").write_text(json.dumps(record, indent=2) + "\n")
    written = ["scaling.json"]
    if runs is not None:
        plots.scaling(runs, law, folder / "scaling.png")
        written.append("scaling.png")
    print(f"written to {folder}: {', '.join(written)}")


if __name__ == "__main__":
    cli.run(main)
