"""Train a SentencePiece tokenizer with LLaMA's settings on the training text of a config.

    python -m experiments.train_tokenizer --config=configs/tiny.py --vocab_size=4096 --out=FILE

The text is that of config.data.sources (`--config.data.sources.corpus.path=...`), so that held-out
text stays held out. Use the result with --config.data.tokenizer.path=FILE and
--config.model.vocab_size=4096. The standard library with 4096 pieces: about 5 s.
"""

import os
import sys
import time

import tqdm
from absl import flags

from experiments import cli
from llama_jax import config
from llama_jax.data import source
from llama_jax.data.prepare import training_lines
from llama_jax.tokenizer import sp

CONFIG = cli.define_config()
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 0, "Pieces; 0: model.vocab_size of the config.")
OUT = cli.define_path("out", None, "The file to write.", required=True)


def main() -> int:
    began = time.perf_counter()
    run = cli.frozen(CONFIG)
    texts = [open_text(of, run.data) for of in run.data.sources]
    lines = tqdm.tqdm(
        training_lines(texts), "reading", unit=" lines", disable=not sys.stderr.isatty()
    )
    pieces = VOCAB_SIZE.value or run.model.vocab_size
    sp.train(lines, pieces, OUT.value, os.cpu_count() or 1)

    tokenizer = sp.load(OUT.value)
    held_out, tokens = 0, 0
    for text in texts:
        for piece in text.read("validation"):
            held_out += len(piece.text.encode())
            tokens += len(tokenizer.encode_batch([piece.text], os.cpu_count() or 1)[0])
    print(f"wrote {OUT.value}: {tokenizer.vocab_size} pieces, {tokenizer.fingerprint[:16]}")
    ratio = f"{held_out / tokens:.3f} bytes/token ({held_out} bytes)" if tokens else "none"
    print(f"held-out text: {ratio}")
    print(f"time: {time.perf_counter() - began:.1f} s")
    return 0


def open_text(of: config.Source, data: config.Data) -> source.SourceText:
    if of.kind == "rows":
        raise ValueError(f"data.sources.{of.name}.kind='rows' holds no text; name the text itself")
    cache = os.path.abspath(os.path.expanduser(data.cache))
    return source.open_text(of, data.validation_fraction, cache)


if __name__ == "__main__":
    cli.run(main)
