"""Continue texts with a trained network.

    python -m experiments.generate --checkpoint=DIR --prompt="Once upon a time"
    python -m experiments.generate --checkpoint=DIR --chat
    python -m experiments.generate --checkpoint=DIR --input=prompts.jsonl --output=texts.jsonl

DIR is a folder that experiments.convert wrote, or the workdir of a training run. How to choose tokens, how
many and where to stop: --config.decode.*. --draft=DIR names a small network that proposes what the large one
checks: the same texts, sooner. --chat and --input are in llama_jax/run: chat.py, prompt_file.py. On a slice
of several hosts the command runs on each of them (hosts.py there), and the first one prints and writes.
"""

import dataclasses
import datetime
import sys
from pathlib import Path

import jax
from absl import flags

from experiments import cli
from llama_jax import config
from llama_jax.convert import native
from llama_jax.decode.generate import Decoder, Request
from llama_jax.decode.text import repeats
from llama_jax.run import chat, hosts, prompt_file, provenance
from llama_jax.run.loading import (
    LoadedModel,
    fit,
    form_of,
    load,
    newest,
    prompt_tokens,
    say,
    settings,
    with_draft,
)
from llama_jax.tokenizer import base

CHECKPOINT = cli.define_path("checkpoint", None, "Folder of the model.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
CHAT = flags.DEFINE_bool("chat", False, "Talk with the model, on a terminal or through a pipe.")
SYSTEM = flags.DEFINE_string("system", "", "What the model is told before a chat.")
INPUT = cli.define_path("input", None, 'Lines of {"prompt": ...} or {"messages": [...]}.')
OUTPUT = cli.define_path("output", None, "Lines in the order of --input, with the texts.")
DATE = flags.DEFINE_string(
    "date", "", "YYYY-MM-DD: the day that a chat template is told; without, what it says by itself."
)
DRAFT = cli.define_path("draft", None, "Folder of a small model that proposes.")
PROPOSALS = flags.DEFINE_integer("proposals", 4, "Tokens that --draft is ahead.", lower_bound=1)
cli.define_hosts()
CONFIG = cli.define_parts(decode=config.Decode(), mesh=config.Mesh())


def main() -> int:
    chosen = [
        name for name, flag in (("prompt", PROMPT), ("input", INPUT)) if flag.value is not None
    ]
    chosen += ["chat"] if CHAT.value else []
    if len(chosen) != 1:
        raise ValueError(f"give one of --prompt, --chat and --input; {len(chosen)} are given")
    for flag, of, used in (("output", "input", OUTPUT.value), ("system", "chat", SYSTEM.value)):
        if bool(used) != (of == chosen[0]) and (used or flag == "output"):
            like = f", as --output={Path(INPUT.value).stem}.texts.jsonl" if INPUT.value else ""
            raise ValueError(
                f"--{flag} belongs to --{of}" if used else f"--{of} needs --{flag}=FILE{like}"
            )
    date = day(DATE.value, chosen[0])
    cli.join(CONFIG.value.mesh.hardware)
    cli.tune_for_cpu()
    if CHAT.value:
        hosts.alone("--chat")
    cache = Path(config.Data().cache).expanduser() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    decode = config.from_dict(CONFIG.value.decode.to_dict(), config.Decode, "decode")
    decode = dataclasses.replace(decode, stop=tuple(map(cli.unescaped, decode.stop)))
    mesh = config.from_dict(CONFIG.value.mesh.to_dict(), config.Mesh, "mesh")
    hosts.check(mesh)
    hosts.compare(
        lambda: {
            **dataclasses.asdict(decode),
            **dataclasses.asdict(mesh),
            **{f"--{flag.name}": flag.value for flag in (PROMPT, DRAFT, PROPOSALS, DATE)},
            **provenance.installed(),
        }
    )
    loaded = load_everywhere(Path(CHECKPOINT.value), decode, mesh)
    if DRAFT.value:
        draft = load_everywhere(Path(DRAFT.value), decode, mesh)
        loaded = with_draft(loaded, draft, PROPOSALS.value)
    if CHAT.value:
        return chat.Chat(loaded, form_of(loaded, date), SYSTEM.value).run()
    if INPUT.value is not None:
        return prompt_file.run(loaded, Path(INPUT.value), Path(OUTPUT.value), date)
    return once(loaded, PROMPT.value or "")


def day(text: str, command: str) -> datetime.date | None:
    if not text:
        return None
    if command == "prompt":
        raise ValueError("--date belongs to --chat and --input")
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--date={text} must be a day, as 2024-07-26") from None


def load_everywhere(folder: Path, decode: config.Decode, mesh: config.Mesh) -> LoadedModel:
    """ValueError unless every host finds the same network and tokenizer in its folder."""
    folder = folder.expanduser().absolute()
    step = hosts.first_says(hosts.together(lambda: newest(folder) if hosts.first() else 0))
    if jax.process_count() > 1:
        described = hosts.together(lambda: describe(folder, step))
        hosts.compare(lambda: described)
    return hosts.together(lambda: load(folder, decode, mesh, step))


def describe(folder: Path, step: int) -> dict:
    """What of a folder must be the same on every host, by name."""
    model, context, tokenizer = settings(folder)
    return {
        **{f"model.{name}": value for name, value in config.to_dict(model).items()},
        f"{folder}: context": context,
        f"{folder}: tokenizer": tokenizer.fingerprint,
        **{f"{folder}: tokenizer.{name}": of for name, of in base.named(tokenizer).items()},
        f"{folder}: parameters": native.identity(folder, step),
    }


def once(loaded: LoadedModel, prompt: str) -> int:
    """Print the continuation of one prompt as it is made; of several samples each as it ends."""
    decode, tokenizer = loaded.engine.decode, loaded.tokenizer
    tokens = prompt_tokens(tokenizer, prompt)
    fit(len(tokens), decode.max_new_tokens, loaded.context, "--prompt")
    if not prompt:
        print("--prompt is empty: a text from its beginning", file=sys.stderr)
    requests = [
        Request(tokens, decode.max_new_tokens, decode.seed, (0, i)) for i in range(decode.samples)
    ]
    total = len(tokens) + decode.max_new_tokens
    decoder = Decoder(
        loaded.engine, tokenizer, loaded.ends, min(decode.samples, decode.rows), total
    )
    alone, head = decode.samples == 1, tokenizer.decode(tokenizer.encode(prompt))
    if alone:
        say(head)
    with hosts.interrupt() as interrupt:
        listen = lambda _, text: say(text) if alone else None  # noqa: E731
        for number, result in decoder.run(loaded.params, requests, listen, interrupt.due):
            say("\n" if alone else f"[{number + 1}] {head}{result.text}\n")
            if not decode.temperature and repeats(result.tokens):
                print(
                    "the text repeats itself, as the likeliest tokens do; "
                    "--config.decode.temperature=0.8 samples instead",
                    file=sys.stderr,
                )
    if interrupt.signal:
        print(f"{interrupt.signal}: ended early", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
