"""A file of prompts, continued: every line answered, in their order, gone on with after an interruption.

A line is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, with "tools" perhaps
(tokenizer/messages.py); what else it has is kept. A last message of the assistant's is continued.
To each the output adds text, end, tokens and logprobs, and with several samples a line for each, `sample`.
What is finished waits in OUTPUT.partial until all is.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llama_jax import files
from llama_jax.convert import json_file
from llama_jax.decode.generate import Completion, Decoder, Request
from llama_jax.run import hosts, loading
from llama_jax.run.loading import LoadedModel
from llama_jax.tokenizer import messages
from llama_jax.tokenizer.base import Tokenizer
from llama_jax.tokenizer.forms import Form

OWN = ("text", "end", "tokens", "logprobs", "sample")  # what the output has of each


def run(loaded: LoadedModel, source: Path, target: Path, date: datetime.date | None = None) -> int:
    """date: the day that chat templates are told."""
    decode = loaded.engine.decode
    lines, requests, ends, partial = hosts.together(lambda: begin(loaded, source, target, date))
    known = zlib.crc32(repr(requests).encode()) % 2**31
    if not hosts.agree(hosts.first_says(known) == known):
        raise ValueError(f"--input={source} is not the same on all hosts")
    is_done = np.isin(np.arange(len(requests)), list(partial.done))
    waiting = np.flatnonzero(~hosts.first_lists(is_done)).tolist()
    length = max(len(request.tokens) + request.max_new_tokens for request in requests)
    rows = min(decode.rows, len(requests))
    decoder = Decoder(loaded.engine, loaded.tokenizer, ends, rows, length)
    bar = tqdm(
        total=len(requests), initial=len(partial.done), unit="text", dynamic_ncols=True,
        disable=not hosts.first(),
    )  # fmt: skip
    with hosts.interrupt() as interrupt, partial, bar:
        asked = [requests[i] for i in waiting]
        for number, result in decoder.run(loaded.params, asked, stopped=interrupt.due):
            if result.end != "interrupted":
                partial.add(waiting[number], result)
                bar.update()
    if interrupt.signal:
        print(
            f"{interrupt.signal}: {len(partial.done)} of {len(requests)} are kept in {partial.path}; run the "
            "same command to go on"
        )
        return 0
    if hosts.first():
        written = []
        for i in range(len(requests)):
            number, sample = requests[i].stream
            extra = {"sample": sample} if decode.samples > 1 else {}
            written.append({**lines[number], **extra, **partial.done[i]})
        files.write(target, "".join(map(line_of, written)))
        partial.path.unlink()
        print(f"written to {target}: {len(written)} texts")
    hosts.agree(True)  # the others wait for it
    return 0


def begin(
    loaded: LoadedModel, source: Path, target: Path, date: datetime.date | None
) -> tuple[list[dict], list[Request], frozenset[int], "Partial"]:
    """What is asked, what ends a text, and what of it is finished."""
    decode, lines = loaded.engine.decode, read(source)
    if target.exists():
        raise ValueError(f"--output={target} exists; give another, or remove it")
    talks = any("messages" in line for line in lines.values())
    form = loading.form_of(loaded, date) if talks else None
    requests = []
    for number, (place, line) in enumerate(lines.items()):
        where = f"{source}, line {place}"
        try:
            tokens = prompt_of(line, loaded.tokenizer, form)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        loading.fit(len(tokens), decode.max_new_tokens, loaded.context, where)
        for sample in range(decode.samples):
            requests.append(Request(tokens, decode.max_new_tokens, decode.seed, (number, sample)))
    if form and form.note and hosts.first():
        print(form.note, file=sys.stderr)
    ends = loaded.ends | (form.ends if form else frozenset())
    partial = Partial(target, signature(loaded, requests, ends), bool(form and form.dated))
    return list(lines.values()), requests, ends, partial


def read(source: Path) -> dict[int, dict]:
    """By line number, from 1; empty lines are passed over. ValueError names the line that is wrong."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input={source} cannot be read ({error})") from error
    lines = {}
    for number, written in enumerate(text.split("\n"), 1):
        if written.strip():
            lines[number] = _line(written, f"{source}, line {number}")
    if not lines:
        raise ValueError(f"--input={source} is empty")
    return lines


def _line(text: str, where: str) -> dict:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise ValueError(f"{where}: no JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError(f'{where}: it must have "prompt" or "messages"')
    if taken := [key for key in OWN if key in line]:
        raise ValueError(f"{where}: {taken[0]!r} is written by this command; rename the field")
    return line


def line_of(line: dict) -> str:
    """As JSON, readable where UTF-8 can hold it: an escaped lone surrogate stays escaped."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(line)
    return text + "\n"


def prompt_of(line: dict, tokenizer: Tokenizer, form: Form | None) -> list[int]:
    if form and "messages" in line:
        functions = line.get("tools") or []
        if not isinstance(functions, list) or not all(isinstance(one, dict) for one in functions):
            raise ValueError("tools must be a list of JSON schemas")
        return form.write(messages.read(line["messages"]), functions)
    if not isinstance(line["prompt"], str):
        raise ValueError(f"prompt={json_file.shown(line['prompt'])} must be a text")
    return loading.prompt_tokens(tokenizer, line["prompt"])


def signature(loaded: LoadedModel, requests: list[Request], ends: frozenset[int]) -> str:
    """What the texts depend on: not on how many are decoded at a time, nor on where the weights lie."""
    said = dataclasses.asdict(dataclasses.replace(loaded.engine.decode, rows=1))
    text = repr((said, loaded.identity, loaded.draft, sorted(ends), requests))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Partial:
    """What is finished, a line each, appended as it ends; a line cut short is dropped.

    The first host's file; the others keep what is finished while they run.
    """

    def __init__(self, target: Path, signature: str, dated: bool = False):
        """dated: whether the prompts are of the day, for what is said where they are other ones."""
        self.path = target.with_name(target.name + ".partial")
        self.done: dict[int, dict] = {}
        if not hosts.first():
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = []
        for text in lines:
            try:
                kept.append(json.loads(text))
            except json.JSONDecodeError:
                break
        if kept and kept[0] != {"signature": signature}:
            raise ValueError(
                f"{self.path} is of other prompts, settings or weights; remove it, or give another --output"
                + ("; the chat template has today's date, --date=YYYY-MM-DD that of then" * dated)
            )
        for number, result in kept[1:]:
            self.done[number] = result
        head = [{"signature": signature}, *([n, r] for n, r in self.done.items())]
        files.write(self.path, "".join(json.dumps(one) + "\n" for one in head))

    def __enter__(self):
        self._file = (self.path if hosts.first() else Path(os.devnull)).open("a")
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, number: int, result: Completion) -> None:
        made = {
            "text": result.text, "end": result.end, "tokens": result.tokens,
            "logprobs": [round(value, 6) for value in result.logprobs[: len(result.tokens)]],
        }  # fmt: skip
        self.done[number] = made
        self._file.write(json.dumps([number, made]) + "\n")
        self._file.flush()
