"""Conversion of a 1 GB checkpoint beside the disk's copy of it, and memory on a large one.

python -m benchmarks.convert --folder=DIR; prints one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import synthetic
from llama_jax.convert import names

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGE_GB = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, type=Path)
    folder = parser.parse_args().folder
    synthetic.write(folder / "meta", synthetic.of_size(1), 2, BFLOAT16)
    found = {name: [] for name in ("copy", "native", "hf", "meta")}
    for _ in range(ROUNDS):
        for name, rates in found.items():
            rates.append(rate(folder, name))
    shutil.rmtree(folder / "meta")
    print(json.dumps(found | memory(folder)))


def rate(folder: Path, name: str) -> float:
    """MB/s until it is on disk; for a conversion its own figure, without the start of Python."""
    to = folder / "to"
    shutil.rmtree(to, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    if name == "copy":
        shutil.copytree(folder / "meta", to)
        os.sync()
        seconds = time.perf_counter() - start
        return sum(file.stat().st_size for file in to.iterdir()) / 1e6 / seconds
    said = convert(folder / "meta", to, name).stdout.split("\n")[-2]
    return float(said.split(" MB/s")[0].split()[-1])


def convert(came: Path, to: Path, kind: str, *prefix: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(*prefix, sys.executable, "-m", "experiments.convert"),
            *(f"--from={came}", f"--to={to}", f"--format={kind}"),
        ],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip


# A process of its own between this one and the conversion: its children are the conversion alone.
_PEAK = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def memory(folder: Path) -> dict[str, float]:
    """Peak GiB of converting LARGE_GB in 4 parts, and what is allowed: 3 x the largest tensor + 1 GiB."""
    model = synthetic.of_size(LARGE_GB)
    synthetic.write(folder / "large", model, 4, BFLOAT16)
    largest = max(np.prod(names.torch_shape(u.row, model)) for u in names.units(model)) * 2
    peaks = {}
    for kind in ("native", "hf"):
        shutil.rmtree(folder / "to", ignore_errors=True)
        said = convert(folder / "large", folder / "to", kind, sys.executable, "-c", _PEAK).stdout
        peaks[f"peak_{kind}"] = int(said.split()[-1]) / 2**20
    shutil.rmtree(folder / "large")
    return peaks | {"allowed": float(3 * largest / 2**30 + 1)}


if __name__ == "__main__":
    main()
