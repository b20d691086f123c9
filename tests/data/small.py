"""Small texts, and runs on them."""

import random

from llama_jax import config

WORDS = (
    "norm",
    "rope",
    "query",
    "key",
    "value",
    "gate",
    "loss",
    "step",
    "batch",
    "mesh",
    "grad",
    "scan",
    "tree",
    "naïve",
    "☃",
)


def write_texts(folder, count, seed=0, lines=6):
    """`count` text files of different lengths."""
    words = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        text = "".join(" ".join(words.choices(WORDS, k=5)) + "\n" for _ in range(lines + i % 7))
        (folder / f"doc{i:02}.txt").write_text(text)
    return folder


def files(folder, name="corpus", pattern="*.txt", **fields):
    return config.Source(name=name, kind="files", path=f"{folder}/{pattern}", **fields)


def data_of(tmp_path, *sources, seq_len=13, **fields):
    fields = {"tokenizer": config.TokenizerConfig("byte"), "threads": 2, **fields}
    return config.Data(
        sources=tuple(sources), seq_len=seq_len, cache=str(tmp_path / "cache"), **fields
    )


def run_of(data, batch_size=8, steps=40, **train):
    return config.Run(
        model=config.Model(vocab_size=259),
        data=data,
        train=config.Train(steps=steps, batch_size=batch_size, **train),
        optim=config.Optim(warmup_steps=2),
        eval=config.Eval(rows=train.pop("eval_rows", 11)),
    )


def quiet(line):
    pass
