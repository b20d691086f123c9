"""Carry weights between formats: `python -m experiments.convert --from=DIR_OR_FILE --to=DIR`.

In: Meta's .pth with params.json, Hugging Face's folders, llama2.c's .bin, our own folders and the workdirs of
training. Out: our own, Hugging Face's, Meta's. The same command goes on after an interruption; --to appears
when everything is in it.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from llama_jax.convert import compare, folder, formats, job, names, stored

FROM = cli.define_path("from", None, "Folder or file of the weights.", required=True)
TO = cli.define_path("to", None, "The folder to make.", required=True)
FORMAT = flags.DEFINE_enum("format", "native", tuple(formats.WRITTEN), "What to write.")
FROM_FORMAT = flags.DEFINE_enum(
    "from_format", "", ("", *formats.FORMATS), "What to read; found out when it is empty."
)
TOKENIZER = cli.define_path("tokenizer", "", "Its file, where it is not beside the weights.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "",
    ("", *(d.name for d in stored.DTYPES.values())),
    "Of the weights; as they are when empty.",
)
CONTEXT = flags.DEFINE_integer(
    "context", 0, "Positions it was trained for, where the checkpoint says less; 0: what it says.",
    lower_bound=0,
)  # fmt: skip
CHECK = flags.DEFINE_bool("check", False, "Read everything back and compare it.")


def main() -> int:
    cli.keep_memory()
    came, to = (Path(flag.value).expanduser().absolute() for flag in (FROM, TO))
    dtype = next((d for d in stored.DTYPES.values() if d.name == DTYPE.value), None)
    source = formats.open_checkpoint(came, FROM_FORMAT.value, TOKENIZER.value)
    if CONTEXT.value:
        source = dataclasses.replace(source, context=CONTEXT.value)
    announce(source)
    start = time.perf_counter()
    try:
        with bar(source, "converting") as progress:
            folder.convert(source, to, FORMAT.value, dtype, progress.update, tqdm.write)
    except KeyboardInterrupt:
        print(f"what is done stays beside {to}; the same command goes on", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    if CHECK.value:
        written = formats.open_checkpoint(to, FORMAT.value, "")
        with bar(source, "comparing") as progress:
            count = compare.sources(source, written, progress.update)
        print(f"all {count} tensors are equal, bit by bit, and so are the settings")
    rate = job.total_bytes(source) / 1e6 / seconds
    print(f"written to {to} in {seconds:.1f} s, {rate:.0f} MB/s")
    return 0


def bar(source, what: str) -> tqdm:
    return tqdm(total=job.total_bytes(source), desc=what, unit="B", unit_scale=True, mininterval=1)


def announce(source) -> None:
    model = source.model
    count = sum(int(np.prod(names.torch_shape(u.row, model))) for u in names.units(model))
    kinds = ", ".join(sorted({dtype.name for dtype in source.dtypes.values()}))
    print(f"{FROM.value}: {source.format} format, {count:,} parameters in {kinds}")
    for note in source.notes:
        print(f"  {note}")
    rope = f"rope theta {model.rope.theta:g}" + (
        f", {model.rope.scaling} factor {model.rope.factor:g}" if model.rope.factor != 1 else ""
    )
    print(
        f"  {model.layers} layers, dim {model.dim}, {model.heads} heads, {model.kv_heads} key heads, "
        f"ffn {model.ffn_dim}, vocabulary {model.vocab_size}, eps {model.norm_eps:g}, {rope}, "
        f"{model.output} output, {source.context} positions"
    )
    if source.tokenizer is None:
        if "tokenizer.json" not in source.carried:  # which a note speaks of
            print("  no tokenizer was found: give --tokenizer=FILE to have it beside the weights")
    else:
        print(f"  tokenizer: {source.tokenizer.kind}")


if __name__ == "__main__":
    cli.run(main)
