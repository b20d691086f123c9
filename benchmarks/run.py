"""`make bench`: measure, then write docs/benchmarks.md and benchmarks/results.json.

    python -m benchmarks.run W5

measures the named parts and keeps the rows of the others, with the versions that they were measured with.
Sides of a comparison run in turns, each in a process of its own, so that a drift of the machine meets both;
figures are medians over the rounds, the spread is (largest - smallest) / median.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
MATMUL = """
import time, sys
n = 2048
if sys.argv[1] == "jax":
    import jax
    x = jax.random.normal(jax.random.key(0), (n, n)); f = jax.jit(lambda x: x @ x)
    run = lambda: f(x).block_until_ready()
else:
    import torch
    torch.set_num_threads(2); x = torch.randn(n, n); run = lambda: x @ x
run(); best = 1e9
for _ in range(20):
    start = time.perf_counter(); run(); best = min(best, time.perf_counter() - start)
print(2 * n**3 / best / 1e9)
"""
# Of the W1 network (benchmarks/w1.py), by analysis.flops: FLOPs of a token.
W1_FLOPS_PER_TOKEN = 6 * (8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408) + 512 * 32_000) + (
    6 * 8 * 8 * 64 * 512
)
W5_BYTES_PER_TOKEN = 4 * (8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408) + 512 * 32_000)


RESULTS = ROOT / "benchmarks/results.json"


def main() -> None:
    asked = sys.argv[1:] or list(PARTS)
    if unknown := set(asked) - set(PARTS):
        sys.exit(f"{', '.join(unknown)} is not one of {', '.join(PARTS)}")
    rows = [row for row in json.loads(RESULTS.read_text()) if part_of(row) not in asked]
    for part in asked:
        rows += [{**row, "versions": versions()} for row in PARTS[part]()]
    rows.sort(key=part_of)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(page(rows))
    print(f"wrote {ROOT / 'docs/benchmarks.md'} and {RESULTS}")


def part_of(row: dict) -> str:
    return row["name"].split()[0]


def versions() -> str:
    packages = ("jax", "flax", "torch", "transformers", "google-tunix")
    found = {dist.name: dist.version for dist in metadata.distributions()}
    known = ", ".join(f"{name} {found[name]}" for name in packages if name in found)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {known}"


def train_step() -> list[dict]:
    sides = {name: [] for name in ("ours", "transformers", "tunix")}
    for round_ in range(ROUNDS):
        for name, results in sides.items():
            say(f"W1 round {round_ + 1} of {ROUNDS}: {name}")
            results.append(json.loads(python("-m", "benchmarks.w1", name)))
    rates = {
        name: [statistics.median(r["tokens_per_second"]) for r in results]
        for name, results in sides.items()
    }
    memory = {name: [r["peak_gib"] for r in results] for name, results in sides.items()}
    matmul = {
        side: [float(python("-c", MATMUL, side)) for _ in range(ROUNDS)]
        for side in ("jax", "torch")
    }
    achieved = [rate * W1_FLOPS_PER_TOKEN / 1e9 for rate in rates["ours"]]
    return [
        row("W1 train step, beside transformers", rates["ours"], rates["transformers"], "tokens/s"),
        row("W1 train step, beside Tunix", rates["ours"], rates["tunix"], "tokens/s"),
        row("W1 peak memory, beside transformers", memory["ours"], memory["transformers"], "GiB"),
        row("W1 peak memory, beside Tunix", memory["ours"], memory["tunix"], "GiB"),
        row("W1 model FLOPs, beside JAX's matmul of 2048", achieved, matmul["jax"], "GFLOP/s"),
        row("W1 matmul of 2048, JAX beside torch", matmul["jax"], matmul["torch"], "GFLOP/s"),
    ]


def startup() -> list[dict]:
    """Process start to the first finished step; text tokenised and program compiled before."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(ROUNDS + 1):
            say(f"W2 round {round_} of {ROUNDS} (0: warming the caches)")
            workdir = Path(folder) / str(round_)
            command = [
                *("-m", "experiments.train", "--config=configs/research_300k.py"),
                *(f"--workdir={workdir}", f"--config.data.cache={folder}/cache"),
                *("--config.log.every=1", "--config.log.tensorboard=off"),
            ]
            ours.append(until(command, "step 1/"))
            theirs.append(until(["-m", "benchmarks.startup"], "first step finished"))
    return [row("W2 start to first step, beside transformers", ours[1:], theirs[1:], "s")]


def data() -> list[dict]:
    with tempfile.TemporaryDirectory() as cache:
        found = []
        for round_ in range(ROUNDS):
            say(f"W3 round {round_ + 1} of {ROUNDS}")
            found.append(json.loads(python("-m", "benchmarks.data", f"--cache={cache}")))
    ours = {key: [f[key] for f in found] for key in found[0]}
    rows = [row("W3 loader", ours["loader_rows_per_second"], [], "rows/s")]
    for name in ("byte", "sp", "bpe"):
        if (own := f"{name}_mb_per_second") not in ours:
            continue
        what = f"W3 tokenizer {name}"
        if name == "byte":
            rows.append(row(what, ours[own], [], "MB/s a core"))
            continue
        library = {"sp": "sentencepiece", "bpe": "tiktoken"}[name]
        for side, peer in (("wrapped", library), ("fast", "transformers' fast one")):
            theirs = ours[f"{name}_{side}_mb_per_second"]
            rows.append(row(f"{what}, beside {peer}", ours[own], theirs, "MB/s a core"))
    return rows


def convert() -> list[dict]:
    """1 GB of bfloat16 in two of Meta's parts, beside copying the files; peak memory of 6 GB."""
    say("W4 conversion: writing synthetic checkpoints, rounds in turns")
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(python("-m", "benchmarks.convert", f"--folder={folder}"))
    rates = [
        row(f"W4 convert Meta to {kind}, beside a copy", found[kind], found["copy"], "MB/s")
        for kind in ("native", "hf", "meta")
    ]
    return rates + [
        row(
            f"W4 peak memory to {kind}, beside the bound",
            [found[f"peak_{kind}"]],
            [found["allowed"]],
            "GiB",
        )
        for kind in ("native", "hf")
    ]


def decode() -> list[dict]:
    """W5: greedy continuation of 1 and 8 prompts, in float32 and with int8 weights; log-likelihood."""
    rows = []
    sides = {
        "ours": ("benchmarks.decode", "ours"),
        "transformers": ("benchmarks.decode", "transformers"),
        "int8": ("benchmarks.decode", "ours", "--weights=int8 x int16"),
    }
    for batch in (1, 8):
        found = {name: [] for name in sides}
        for round_ in range(ROUNDS):
            for name, command in sides.items():
                say(f"W5 round {round_ + 1} of {ROUNDS}: {name}, batch {batch}")
                found[name].append(json.loads(python("-m", *command, f"--batch={batch}")))
        of = lambda side, what: [statistics.median(r[what]) for r in found[side]]  # noqa: B023, E731
        rates = {name: of(name, "tokens_per_second") for name in sides}
        first = {name: of(name, "first_token_seconds") for name in sides}
        name = f"W5 decode, batch {batch}"
        rows += [
            row(f"{name}, beside transformers", rates["ours"], rates["transformers"], "tokens/s"),
            row(f"{name}, first token", first["ours"], first["transformers"], "s"),
            row(f"{name}, int8 weights, beside float32", rates["int8"], rates["ours"], "tokens/s"),
        ]
        if batch == 1:
            read = [rate * W5_BYTES_PER_TOKEN / 1e9 for rate in rates["ours"]]
            band = [r["bandwidth"] for r in found["ours"]]
            rows.append(row(f"{name}, weights read, beside a sum's bandwidth", read, band, "GB/s"))
    scores = {"ours": [], "transformers": []}
    for round_ in range(ROUNDS):
        for name, results in scores.items():
            say(f"W5 log-likelihood, round {round_ + 1} of {ROUNDS}: {name}")
            results.append(json.loads(python("-m", "benchmarks.score", name)))
    return [
        *rows,
        row("W5 log-likelihood, beside transformers", *scores.values(), unit="tokens/s"),
    ]


def choices() -> list[dict]:
    """W6: multiple-choice questions with shared examples, beside scoring each choice as a row of its own."""
    found = {"choices": [], "whole_rows": []}
    for round_ in range(ROUNDS):
        for side, results in found.items():
            say(f"W6 round {round_ + 1} of {ROUNDS}: {side}")
            results.append(json.loads(python("-m", "benchmarks.score", side)))
    return [row("W6 5-shot choices, beside whole rows", *found.values(), unit="questions/s")]


def row(name: str, ours: list[float], peer: list[float], unit: str) -> dict:
    spread = (max(ours) - min(ours)) / statistics.median(ours)
    found = {"name": name, "ours": statistics.median(ours), "peer": None, "ratio": None}
    if peer:
        found["peer"] = statistics.median(peer)
        found["ratio"] = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return {**found, "unit": unit, "spread": spread, "rounds": [ours, peer]}


def page(rows: list[dict]) -> str:
    def number(value):
        return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"

    table = "".join(
        f"| {r['name']} | {number(r['ours'])} | {number(r['peer'])} | {number(r['ratio'])} "
        f"| {r['unit']} | {r['spread']:.0%} |\n"
        for r in rows
    )
    measured: dict[str, list[str]] = {}
    for r in rows:
        parts = measured.setdefault(r["versions"], [])
        parts += [part_of(r)] if part_of(r) not in parts else []
    machines = "\n".join(f"- {', '.join(parts)}: {what}" for what, parts in measured.items())
    return (
        "# Benchmarks\n\nWritten by `make bench`. Sides of a row ran in turns, each in its own process; "
        f"medians of {ROUNDS} rounds, ratio = median of the rounds' ratios, spread = (largest - smallest) / "
        f"median of ours.\n\n{machines}\n\n"
        "| | ours | peer | ratio | unit | spread |\n|---|---|---|---|---|---|\n"
        f"{table}\nW1: width 512, 8 layers, 8 heads, 4 key heads, ffn 1408, vocabulary 32000; 8 rows of 512 "
        "tokens; float32, AdamW with clipping, nothing recomputed by policy, `model.unroll=8`, "
        "`train.loss_chunks=4`. For seconds and GiB less is better. W2: the smallest research size, text and "
        "compiled program cached. W3: rows of 256 tokens as they reach the device; tokenizers on 4 MB of "
        "Python's standard library in documents of 4,000 characters, one thread. W4: read, checked for NaN, "
        "turned into the other layout, synced to disk; a copy is cp and sync. The bound is 3 x the largest "
        "tensor + 1 GiB. W5: the network of W1, prompts of 64 tokens, 128 new ones, greedy, float32, "
        "the prompt's time included; transformers with its cache. int8 weights: `quant.activations=int16`. "
        "Log-likelihood: every token of 8 rows of 512. W6: the same network, 100 questions of 32 to 64 "
        "tokens after 5 examples of 64 that all share, 4 choices of 2 to 12 tokens each; the peer is "
        "`score.token_nll` of each choice in a row of its own.\n"
    )


def python(*args: str) -> str:
    """The last line that a Python process prints."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def until(args: list[str], text: str) -> float:
    """Seconds from starting Python to the line that begins with `text`; the process is then ended."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with process:
        for line in process.stdout or ():
            if line.startswith(text):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    sys.exit(f"{' '.join(args)} ended without {text!r}")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


PARTS = {"W1": train_step, "W2": startup, "W3": data, "W4": convert, "W5": decode, "W6": choices}


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
