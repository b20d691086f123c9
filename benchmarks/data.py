"""Loader rows/s and tokenizer MB/s on one core; prints one JSON object.

python -m benchmarks.data --cache=DIR
"""

import argparse
import dataclasses
import json
import os
import sysconfig
import time
from pathlib import Path

import jax

from configs import tiny
from llama_jax import config, sharding
from llama_jax.data import iterator, prepare
from llama_jax.tokenizer import base, sp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", required=True)
    cache = parser.parse_args().cache
    results = loader(cache) | tokenizers(cache)
    print(json.dumps(results))


def loader(cache: str) -> dict[str, float]:
    """Rows/s of the tiny config's batches as they reach the device, the model left out."""
    run = config.freeze(tiny.get_config())
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, cache=cache))
    prepared = prepare.prepare(run.data, run.model.vocab_size, report=lambda _: None)
    layout = sharding.make(config.Mesh(), jax.devices())
    batches = iterator.train(run, prepared, layout, 0)
    next(batches)
    start, rows = time.perf_counter(), 0
    for loaded in batches:
        rows += len(loaded.rows)
        if time.perf_counter() - start > 5:
            break
    return {"loader_rows_per_second": rows / (time.perf_counter() - start)}


def tokenizers(cache: str) -> dict[str, float]:
    """MB/s of one thread on 4 MB of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts, size = [], 0
    for path in sorted(folder.glob("*.py")):
        texts.append(path.read_text(errors="replace"))
        size += len(texts[-1].encode())
        if size > 4e6:
            break
    model = os.path.join(cache, "bench-32k.model")
    if not os.path.exists(model):
        lines = (line for text in texts for line in text.split("\n"))
        sp.train(lines, 16_000, model, os.cpu_count())
    found = {"sp": config.Tokenizer("sp", model), "byte": config.Tokenizer("byte")}
    ranks = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/llama3/tokenizer.model"
    if ranks.exists():
        found["bpe"] = config.Tokenizer("bpe", str(ranks))
    results = {}
    for name, settings in found.items():
        tokenizer = base.load(settings)
        tokenizer.encode_batch(texts[:5], 1)
        start = time.perf_counter()
        tokenizer.encode_batch(texts, 1)
        results[f"{name}_mb_per_second"] = size / 1e6 / (time.perf_counter() - start)
    return results


if __name__ == "__main__":
    main()
