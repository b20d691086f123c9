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
from llama_jax.tokenizer.hf import hf_files


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
    """MB/s of one thread on 4 MB of the standard library, beside the libraries that are wrapped and
    beside the one that transformers uses, on the same texts."""
    texts, size = documents()
    found = {
        "byte": config.TokenizerConfig("byte"),
        "sp": config.TokenizerConfig("sp", trained(cache, texts)),
    }
    ranks = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/llama3/tokenizer.model"
    if ranks.exists():
        found["bpe"] = config.TokenizerConfig("bpe", str(ranks))
    results = {}
    for name, settings in found.items():
        tokenizer = base.load(settings)
        sides = {name: lambda texts, t=tokenizer: t.encode_batch(texts, 1)}
        if name != "byte":
            sides |= peers(name, tokenizer, Path(settings.path).read_bytes())
        for side, encode in sides.items():
            encode(texts[:5])
            seconds = min(timed(encode, texts) for _ in range(3))
            results[f"{side}_mb_per_second"] = size / 1e6 / seconds
    return results


def documents() -> tuple[list[str], int]:
    """Texts of at most 4,000 characters, 4 MB of them."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(errors="replace")
        texts += [text[i : i + 4000] for i in range(0, len(text), 4000)]
        size += len(text.encode())
        if size > 4e6:
            break
    return texts, size


def trained(cache: str, texts: list[str]) -> str:
    model = os.path.join(cache, "bench-16k.model")
    if not os.path.exists(model):
        lines = (line for text in texts for line in text.split("\n"))
        sp.train(lines, 16_000, model, os.cpu_count() or 1)
    return model


def peers(name: str, tokenizer, content: bytes) -> dict:
    """{side: encode(texts)}: the wrapped library itself, and Hugging Face's tokenizers on our export."""
    import tokenizers

    raw, fast = (
        tokenizer._processor if name == "sp" else tokenizer._encoding,
        tokenizers.Tokenizer.from_str(hf_files(name, content)["tokenizer.json"].decode()),
    )
    wrapped = raw.encode if name == "sp" else raw.encode_ordinary
    return {
        f"{name}_wrapped": lambda texts: [wrapped(text) for text in texts],
        f"{name}_fast": lambda texts: [fast.encode(text).ids for text in texts],
    }


def timed(encode, texts: list[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
