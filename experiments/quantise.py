"""Make a trained network's weights smaller: 8 or 4 bits.

    python -m experiments.quantise --checkpoint=DIR --to=NEW
    python -m experiments.quantise --checkpoint=DIR --to=NEW --config.quant.bits=4

DIR is a folder that experiments.convert wrote, or the workdir of a training run; experiments.generate takes
NEW in its place. 4 bits are calibrated: on --text, without it on what the run in DIR was trained on, without
a run on texts that the network makes itself (arXiv:2305.17888 section 3.1). Perplexity before and after is of
text from the same place that the calibration did not read.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import cli
from llama_jax import config, dims, sharding, tree
from llama_jax.convert import native, smaller
from llama_jax.data import iterator, prepare
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.eval import score
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.quant.network import quantise, scheme
from llama_jax.run import hosts, loading
from llama_jax.tokenizer.base import Tokenizer

CHECKPOINT = cli.define_path("checkpoint", None, "Folder of the model.", required=True)
TO = cli.define_path("to", None, "The folder to make.", required=True)
TEXT = cli.define_path("text", "", "A text file: calibrates, its last tenth is measured.")
cli.define_hosts()
CONFIG = cli.define_parts(quant=config.Quant(), mesh=config.Mesh())
MEASURED = 128  # rows
AT_ONCE = 8192  # tokens that go through the network together


class Rows(NamedTuple):
    """Tokens, [R, T] of each."""

    origin: str
    calibration: np.ndarray
    measured: Callable[[], np.ndarray]  # in the end: to draw them takes time


def main() -> int:
    cli.join(CONFIG.value.mesh.hardware)
    cli.tune_for_cpu()
    hosts.alone("quantise")
    cache = Path(config.Data().cache).expanduser() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    quant = config.from_dict(CONFIG.value.quant.to_dict(), config.Quant, "quant")
    mesh = config.from_dict(CONFIG.value.mesh.to_dict(), config.Mesh, "mesh")
    hosts.check(mesh)
    origin, to = (Path(flag.value).expanduser().absolute() for flag in (CHECKPOINT, TO))
    if native.is_native(origin) and (said := native.quantised(origin)):
        raise ValueError(
            f"{origin} holds weights of {said.bits} bits already; give what it came of"
        )
    model, context, tokenizer = loading.settings(origin)
    module = transformer.build(model, sharding.make(mesh, jax.devices()))
    length = min(context, quant.row_tokens)
    with smaller.new(to, origin, stored(module, quant)) as place:
        rows = texts(origin, module, tokenizer, quant.rows if quant.reads_text else 0, length)
        params = native.load(origin, module)
        size = max(AT_ONCE // length, 1)
        batches = [rows.calibration[at : at + size] for at in range(0, len(rows.calibration), size)]
        with tqdm(total=model.groups, desc="quantising", unit="layer") as bar:
            made = quantise(module, params, quant, batches, bar.update)
        smaller.write(place, origin, made, quant, rows.origin)
    print(f"written to {to}")
    report(module, params, made, quant, rows)
    return 0


def stored(module: Transformer, quant: config.Quant) -> float:
    """Bytes of the network in smaller weights, about: without their scales."""
    letters = tree.paths(transformer.letters(module))
    return sum(
        leaf.size * (scheme(dims.unstacked(letters[name]), quant)[0] or 32) / 8
        for name, leaf in tree.paths(transformer.abstract(module)).items()
    )


def report(module: Transformer, params: Any, made: Any, quant: config.Quant, rows: Rows) -> None:
    """What was gained and lost, as a table."""
    measured = rows.measured()
    print(
        f"\n{rows.origin}: {len(measured)} rows of {measured.shape[1]} tokens are measured", end=""
    )
    print(f", {len(rows.calibration)} calibrated" if quant.reads_text else "")
    print(f"\n{'':20}{'MB':>10}{'bits each':>12}{'perplexity':>14}")
    count, found = tree.count(params), []
    for what, one in (("as it was", params), (name(quant), made)):
        size = 1e-6 * 2**30 * tree.gib(one)
        found.append(nats(module, one, measured))
        perplexity = math.exp(found[-1].mean())
        print(f"{what:20}{size:>10,.2f}{8e6 * size / count:>12.2f}{perplexity:>14.4f}")
    more = found[1] - found[0]
    error = more.std(ddof=1) / math.sqrt(len(more))
    print(f"perplexity {math.expm1(more.mean()):+.3%} +- {error:.3%} (standard error over rows)")


def name(quant: config.Quant) -> str:
    if quant.bits == 8:
        return "int8" + (" x int16" if quant.activations == "int16" else "")
    return f"int4 in {quant.group}, {quant.method}"


def texts(folder: Path, module: Transformer, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    """`rows` to calibrate on, and up to MEASURED others; of `length` tokens."""
    if TEXT.value:
        return of_file(Path(TEXT.value), tokenizer, rows, length)
    if (folder / "run.json").is_file():
        run = config.from_dict(json.loads((folder / "run.json").read_text()))
        return of_run(run, rows, length)
    return own(folder, module, tokenizer, rows, length)


def of_file(path: Path, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text={path} cannot be read ({error})") from error
    at = len(text) * 9 // 10
    calibration = cut(text[:at], tokenizer, rows, length)
    measured = cut(text[at:], tokenizer, MEASURED, length)
    if len(measured) < 2:
        raise ValueError(
            f"--text={path} is too short: its last tenth has {len(measured)} rows of {length} tokens, "
            "and 2 are needed; try a longer one, or a smaller --config.quant.row_tokens"
        )
    if len(calibration) < rows:
        raise ValueError(
            f"--text={path} has {len(calibration)} rows of {length} tokens before its last tenth; try a "
            f"longer one, a smaller --config.quant.row_tokens or --config.quant.rows={len(calibration)}"
        )
    return Rows(str(path), calibration, lambda: measured)


def cut(text: str, tokenizer: Tokenizer, most: int, length: int) -> np.ndarray:
    """Up to `most` rows that begin as texts do; no more of the text is encoded than that takes."""
    wide = length - len(tokenizer.prefix)
    read, tokens = 4 * most * wide, []
    while most:
        tokens = tokenizer.encode(text[:read])
        if len(tokens) >= most * wide or read >= len(text):
            break
        read *= 2
    count = min(len(tokens) // wide, most)
    body = np.array(tokens[: count * wide], np.int32).reshape(count, wide)
    begin = np.tile(np.array(tokenizer.prefix, np.int32), (count, 1))
    return np.concatenate([begin, body], axis=1)


def of_run(run: config.Run, rows: int, length: int) -> Rows:
    """What the run was trained on, in its order, and held-out rows of each source."""
    prepared = prepare.prepare(run.data, run.model.vocab_size)
    size = run.train.batch_size
    load = iterator.loader(run, prepared, np.arange(size))
    inputs = [load(step).batch.tokens_BT for step in range(-(-rows // size))]
    measuring = dataclasses.replace(run, eval=config.Eval(rows=MEASURED))
    held = [batch.tokens_BT for _, batch in iterator.validation_here(measuring, prepared)]
    measured = np.concatenate(held)[:, :length]
    if len(measured) < 2:
        raise ValueError(
            f"the run holds {len(measured)} rows back, and 2 are needed; give --text=FILE"
        )
    empty = np.zeros((0, run.data.seq_len), np.int32)
    calibration = np.concatenate([empty, *inputs])[:rows, :length].astype(np.int32)
    return Rows("the run's own data", calibration, lambda: measured)


def own(folder: Path, module: Transformer, tokenizer: Tokenizer, rows: int, length: int) -> Rows:
    """Texts drawn from the network's own distribution; such that end go on with the next."""

    def drawn(streams: range) -> np.ndarray:
        made = np.zeros((len(streams), length), np.int32)
        if not streams:
            return made
        decode = config.Decode(temperature=1.0, rows=32)
        decoder = Decoder(Engine(module, decode), tokenizer, (), decode.rows, length)
        params = loading.decode_params(folder, module)
        requests = [Request([tokenizer.bos], length - 1, stream=(i, 0)) for i in streams]
        with tqdm(total=len(requests), desc="its own texts", unit="row") as bar:
            for number, result in decoder.run(params, requests):
                made[number] = [tokenizer.bos, *result.tokens]
                bar.update()
        return made

    measured = range(rows, rows + MEASURED)
    return Rows("texts of the network's own", drawn(range(rows)), lambda: drawn(measured))


def nats(module: Transformer, params: Any, rows: np.ndarray) -> np.ndarray:
    """The mean of each row's tokens, float64."""
    return score.windows(module, params, rows, 1, AT_ONCE).row_R.astype(np.float64)


if __name__ == "__main__":
    cli.run(main)
