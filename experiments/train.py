"""Train a network: `python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny`.

Started again with the same command, a run goes on from its last checkpoint. SIGINT and SIGTERM save and
exit 0. On a slice of several hosts the command runs on each of them (llama_jax/run/hosts.py), and the first
one writes. What a run writes into its workdir: that of llama_jax/run/session.py, and loss.png.
"""

import functools
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from experiments import cli
from llama_jax import config, tree
from llama_jax.analysis import baseline, runcard
from llama_jax.data import iterator
from llama_jax.data.batch import Batch
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.model import transformer
from llama_jax.run import hosts, provenance, session, warm_start
from llama_jax.run.lease import Lease
from llama_jax.train import checkpoint, loop, metrics

cli.define_hosts()
CONFIG = cli.define_config()
WORKDIR = cli.define_path(
    "workdir", None, "Where the run keeps everything it writes.", required=True
)

BASELINE_TOKENS = 10_000_000  # the counting models see at most so many training tokens
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 24, 64, 0.8


def main() -> int:
    run = cli.frozen(CONFIG)
    cli.join(run.mesh.hardware)
    cli.tune_for_cpu()
    hosts.check(run.mesh)
    workdir = Path(WORKDIR.value).expanduser().absolute()
    run = warm_start.pinned(run, lambda: warm_start.recorded(workdir))
    hosts.compare(lambda: {**config.flatten(run), **provenance.installed()})
    jax.config.update("jax_compilation_cache_dir", str(Path(run.data.cache).expanduser() / "xla"))
    with session.holding(workdir, run) as lease:
        return train(run, workdir, lease)


def train(run: config.Run, workdir: Path, lease: Lease) -> int:
    if jax.process_count() > 1:
        session.check_shared(workdir)
    machine = session.Machine(run)
    frozen = tree.count(machine.program.frozen)
    parameters = tree.count(machine.program.state.params) + frozen
    part = f", {parameters - frozen:,} of them trained," if frozen else ""
    print(
        f"{parameters:,} parameters{part} on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    prepared = session.prepare_once(run.data, run.model.vocab_size)
    console = functools.partial(metrics.Console, quiet=not hosts.first())
    with hosts.interrupt() as interrupt:
        result = session.train(run, workdir, lease, machine, prepared, interrupt, console)
        conclude(run, workdir, machine.program.module, result, prepared)
    hosts.agree(True)  # the others wait while the first one writes the results
    return 0


def conclude(run, workdir, module, result, prepared) -> None:
    """Say what has come of it; write the results of a run that has just ended."""
    done = int(result.state.step)
    if result.interrupted:
        saved = f"saved step {done} of {run.train.steps} in {workdir / 'checkpoints'}"
        print(
            f"{result.interrupted}: {saved if done else 'nothing was trained yet'}; "
            f"run the same command to go on:\n  {command()}"
        )
    elif result.first == done and hosts.first_says(runcard.read(workdir) is not None):
        print(f"already trained to step {done}: {workdir / 'runcard.md'} has the results")
    else:
        finish(run, workdir, module, result, prepared)


def baselines(run: config.Run, prepared) -> dict[str, float]:
    """Unigram and bigram counts of the training rows, scored on the validation rows."""
    rows = max(BASELINE_TOKENS // run.data.seq_len, 1)
    train, size = counted(iterator.first_rows(run, prepared, rows)), run.model.vocab_size
    models = {"unigram": baseline.unigram(*train, size), "bigram": baseline.bigram(*train, size)}
    found = {name: {} for name in models}
    for source, batch in iterator.validation_here(run, prepared):
        pairs = counted(batch)
        for name, model in models.items():
            found[name].setdefault(source, []).append(model(*pairs))
    per_token, results = iterator.bytes_per_token(run, prepared), {}
    for name, of in found.items():
        nats = {source: float(np.concatenate(parts).mean()) for source, parts in of.items()}
        results |= session.measured(name, nats, per_token)
    return results


def counted(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before targets that count, and those targets."""
    counts_BT = batch.weights_BT > 0
    return np.asarray(batch.tokens_BT)[counts_BT], np.asarray(batch.targets_BT)[counts_BT]


def finish(run, workdir, module, result, prepared) -> None:
    """What is left when the last step is done: plot, run card, a look at what the network writes."""
    results = hosts.together(lambda: write(run, workdir, result, prepared) if hosts.first() else {})
    try:
        prompt, text = sampled(run, module, result.params, prepared)
    except (ValueError, RuntimeError, MemoryError) as error:  # the results are written
        prompt, text = "", f"none: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    if not hosts.first():
        return
    print(f"\na sample at temperature {SAMPLE_TEMPERATURE}, from the first held-out row")
    print("  prompt:       " + indent(prompt))
    print("  continuation: " + indent(text))
    print("\n".join(table(results, [corpus.name for corpus in prepared.sources])))
    print(f"\n{result.seconds:.0f} s of training; written to {workdir}:")
    for name in ("checkpoints", "metrics.jsonl", "loss.png", "runcard.md", "runcard.json"):
        print(f"  {workdir / name}")


def write(run, workdir, result, prepared) -> dict[str, float]:
    """Plot and run card; the losses in them."""
    from llama_jax.analysis import plots  # matplotlib is slow to import

    results = result.results | baselines(run, prepared)
    more = {name: results[name] for name in ("unigram_loss", "bigram_loss")}
    title = f"{workdir.name}: {tree.count(result.params):,} parameters"
    plots.loss(result.rows, more, workdir / "loss.png", title)
    runcard.write(session.card(run, result, prepared, command(), more), workdir)
    return results


def table(results: dict[str, float], sources: list[str]) -> list[str]:
    """Losses of the network and of counting; where there are several sources their mean, then each."""
    lines = [("", "nats/token", "bits/byte")]
    for name in ("validation", "unigram", "bigram"):
        several = [f"/{source}" for source in sources] if len(sources) > 1 else []
        for source in ("", *several):
            values = (results[f"{name}_{what}{source}"] for what in ("loss", "bits_per_byte"))
            label = f"  {source[1:]}" if source else name
            nats, bits = (f"{value:.4f}" for value in values)
            lines.append((label, nats, bits))
    width = max(14, *(len(label) + 2 for label, *_ in lines))
    mean = [f"the mean over {len(sources)} sources, and of each"] if len(sources) > 1 else []
    return ["", *mean, *(f"{label:{width}}{nats:>10}{bits:>11}" for label, nats, bits in lines)]


def sampled(run, module, params, prepared) -> tuple[str, str]:
    """The beginning of the first held-out row, and how the network continues it.

    The parameters are given up.
    """
    first, _ = prepared.sources[0].store.validation.read([0])
    prompt = first[0, : min(SAMPLE_PROMPT, run.data.seq_len // 2)].tolist()
    most = run.model.max_positions or SAMPLE_PROMPT + SAMPLE_TOKENS
    new = min(SAMPLE_TOKENS, most - len(prompt))
    engine = Engine(module, config.Decode(temperature=SAMPLE_TEMPERATURE))
    decoder = Decoder(engine, prepared.tokenizer, (), 1, len(prompt) + new)
    params = transformer.unstack_and_delete(module, params)
    ((_, result),) = decoder.run(params, [Request(prompt, new)])
    return prepared.tokenizer.decode(prompt), result.text


def indent(text: str) -> str:
    return text.replace("\n", "\n" + " " * 16)


def command() -> str:
    return shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])


if __name__ == "__main__":
    cli.run(main, loop.Anomaly, checkpoint.SaveError, RuntimeError)
