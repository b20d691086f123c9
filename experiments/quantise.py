"""Make a trained network's weights smaller: 8 or 4 bits.

    python -m experiments.quantise --checkpoint=DIR --to=NEW
    python -m experiments.quantise --checkpoint=DIR --to=NEW --config.quant.bits=4

DIR is a folder that experiments.convert wrote, or the workdir of a training run; experiments.generate takes
NEW in its place. 4 bits are calibrated: on --text, without it on what the run in DIR was trained on, without
a run on texts that the network makes itself (arXiv:2305.17888 section 3.1). Perplexity before and after is of
text from the same place that the calibration did not read.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from llama_jax import config, sharding, tree
from llama_jax.convert import formats, native
from llama_jax.data import iterator, prepare
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.eval import score
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.quant.network import quantise
from llama_jax.tokenizer.base import Tokenizer

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
TO = flags.DEFINE_string("to", None, "The folder to make.", required=True)
TEXT = flags.DEFINE_string("text", "", "A text file: calibrates, its last tenth is measured.")
CONFIG = cli.define_parts(quant=config.Quant(), mesh=config.Mesh())
MEASURED = 128  # rows
AT_ONCE = 8192  # tokens that go through the network together


class Rows(NamedTuple):
    """Tokens, [R, T] of each."""

    calibration: np.ndarray
    measured: np.ndarray
    origin: str


def main() -> int:
    cli.tune_for_cpu()
    cache = Path(config.Data().cache).expanduser() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    quant = config.from_dict(CONFIG.value.quant.to_dict(), config.Quant, "quant")
    mesh = config.from_dict(CONFIG.value.mesh.to_dict(), config.Mesh, "mesh")
    origin, to = (Path(flag.value).expanduser().absolute() for flag in (CHECKPOINT, TO))
    native.check_new(to)
    if native.is_native(origin) and (said := native.quantised(origin)):
        raise ValueError(
            f"{origin} holds weights of {said.bits} bits already; give what it came of"
        )
    model, context, file = native.settings(origin)
    if file is None:
        raise ValueError(f"{origin} has no tokenizer: convert it again with --tokenizer=FILE")
    tokenizer = formats.loaded(file)
    module = transformer.build(model, sharding.make(mesh, jax.devices()))
    length = min(context, quant.row_tokens)
    rows = texts(origin, module, tokenizer, quant.rows if quant.reads_text else 0, length)
    print(f"{rows.origin}: {len(rows.measured)} rows of {length} tokens are measured", end="")
    print(f", {len(rows.calibration)} calibrate" if quant.reads_text else "")

    params = native.load(origin, module)
    size = max(AT_ONCE // length, 1)
    batches = [rows.calibration[at : at + size] for at in range(0, len(rows.calibration), size)]
    with tqdm(total=model.groups, desc="quantising", unit="layer") as bar:
        made = quantise(module, params, quant, batches, bar.update)
    native.save_quantised(to, origin, made, quant, model, context)
    before, after = (tree.gib(one) * 2**30 for one in (params, made))
    count = tree.count(params)
    first, second = (nats(module, one, rows.measured) for one in (params, made))
    print(f"\n{'':20}{'MB':>10}{'bits each':>12}{'perplexity':>14}")
    for what, size, found in (("as it was", before, first), (name(quant), after, second)):
        print(
            f"{what:20}{size / 1e6:>10,.2f}{8 * size / count:>12.2f}{math.exp(found.mean()):>14.4f}"
        )
    more = second - first
    error = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else math.inf
    print(f"perplexity {math.expm1(more.mean()):+.3%} +- {error:.3%} (standard error over rows)")
    print(f"written to {to}")
    return 0


def name(quant: config.Quant) -> str:
    if quant.bits == 8:
        return "int8" + (" x int16" if quant.activations == "int16" else "")
    return f"int4 in {quant.group}, {quant.method}"


def texts(folder: Path, module: Transformer, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    """`rows` to calibrate on, and MEASURED others."""
    if TEXT.value:
        return of_file(Path(TEXT.value), tokenizer, rows, length)
    if (folder / "run.json").is_file():
        return of_run(config.from_dict(json.loads((folder / "run.json").read_text())), module, rows)
    return own(folder, module, tokenizer, rows, length)


def of_file(path: Path, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text={path} cannot be read ({error})") from error
    at = len(text) * 9 // 10

    def cut(part: str, most: int) -> np.ndarray:
        """Rows that begin as texts do."""
        tokens, wide = tokenizer.encode(part), length - 1
        count = min(len(tokens) // wide, most)
        body = np.array(tokens[: count * wide], np.int32).reshape(count, wide)
        return np.concatenate([np.full((count, 1), tokenizer.bos, np.int32), body], axis=1)

    found = Rows(cut(text[:at], rows), cut(text[at:], MEASURED), str(path))
    if not len(found.measured) or (rows and not len(found.calibration)):
        raise ValueError(f"--text={path} is too short: its last tenth must have {length} tokens")
    return found


def of_run(run: config.Run, module: Transformer, rows: int) -> Rows:
    """What the run was trained on, in its order, and what it was validated on."""
    prepared = prepare.prepare(run.data, run.model.vocab_size)
    size = run.train.batch_size
    load = iterator.loader(run, prepared, 0, size)
    steps = -(-rows // size)
    inputs = [load(step).batch.tokens_BT for step in range(steps)]
    held = []
    for batch in iterator.validation(run, prepared, module.layout):
        held.append(np.asarray(batch.tokens_BT))
        if sum(map(len, held)) >= MEASURED:
            break
    empty = np.zeros((0, run.data.seq_len), np.int32)
    return Rows(
        np.concatenate([empty, *inputs])[:rows].astype(np.int32),
        np.concatenate(held)[:MEASURED],
        "the run's own data",
    )


def own(folder: Path, module: Transformer, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    """Texts drawn from the network's own distribution; such that end go on with the next."""
    decode = config.Decode(temperature=1.0, rows=32)
    engine = Engine(module, native.load(folder, module), decode)
    decoder = Decoder(engine, tokenizer, (), decode.rows, length)
    requests = [Request([tokenizer.bos], length - 1, stream=(i, 0)) for i in range(rows + MEASURED)]
    made = np.zeros((len(requests), length), np.int32)
    with tqdm(total=len(requests), desc="its own texts", unit="row") as bar:
        for number, result in decoder.run(requests):
            made[number] = [tokenizer.bos, *result.tokens]
            bar.update()
    return Rows(made[:rows], made[rows:], "texts of the network's own")


def nats(module: Transformer, params: Any, rows: np.ndarray) -> np.ndarray:
    """The mean of each row's tokens, float64."""
    return score.windows(module, params, rows, 1, AT_ONCE).row_R.astype(np.float64)


if __name__ == "__main__":
    cli.run(main)
