"""A file of prompts, continued: every line answered, in their order, gone on with after an interruption.

A line is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}; what else it has is kept.
To each the output adds text, end, tokens and logprobs, and with several samples a line for each, `sample`.
What is finished waits in OUTPUT.partial until all is.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments import chat, hosts, loading
from llama_jax import files
from llama_jax.decode.generate import Decoder, Request
from llama_jax.train import loop


def run(loaded, source: Path, target: Path) -> int:
    decode = loaded.engine.decode
    lines, requests, partial = hosts.together(lambda: begin(loaded, source, target))
    known = zlib.crc32(repr(requests).encode()) % 2**31
    if not hosts.agree(hosts.first_says(known) == known):
        raise ValueError(f"--input={source} is not the same on all hosts")
    is_done = np.isin(np.arange(len(requests)), list(partial.done))
    waiting = np.flatnonzero(~hosts.first_lists(is_done)).tolist()
    length = max(len(request.tokens) + request.max_new_tokens for request in requests)
    rows = min(decode.rows, len(requests))
    decoder = Decoder(loaded.engine, loaded.tokenizer, loaded.ends, rows, length)
    bar = tqdm(
        total=len(requests), initial=len(partial.done), unit="text", dynamic_ncols=True,
        disable=not hosts.first(),
    )  # fmt: skip
    with loop.Interrupt() as interrupt, partial, bar:
        asked = [requests[i] for i in waiting]
        for number, result in decoder.run(asked, stopped=interrupt.asked):
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
        files.write(target, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in written))
        partial.path.unlink()
        print(f"written to {target}: {len(written)} texts")
    hosts.agree(True)  # the others wait for it
    return 0


def begin(loaded, source: Path, target: Path) -> tuple[list[dict], list[Request], "Partial"]:
    """What is asked, and what of it is finished."""
    decode, lines, requests = loaded.engine.decode, read(source), []
    if target.exists():
        raise ValueError(f"--output={target} exists; give another, or remove it")
    for number, line in enumerate(lines):
        tokens = prompt_of(line, loaded, f"{source}, line {number + 1}")
        for sample in range(decode.samples):
            requests.append(Request(tokens, decode.max_new_tokens, decode.seed, (number, sample)))
    return lines, requests, Partial(target, signature(loaded, source))


def read(source: Path) -> list[dict]:
    """ValueError names the line that is not one."""
    try:
        texts = source.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input={source} cannot be read ({error})") from error
    if not texts:
        raise ValueError(f"--input={source} is empty")
    lines = []
    for number, text in enumerate(texts.split("\n"), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: no JSON ({error.msg})") from None
        if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
            raise ValueError(f'{source}, line {number}: it must have "prompt" or "messages"')
        lines.append(line)
    return lines


def prompt_of(line: dict, loaded, where: str) -> list[int]:
    tokenizer = loaded.tokenizer
    if "messages" in line:
        tokens = chat.tokens_of(line["messages"], loaded, where)
    elif isinstance(line["prompt"], str):
        tokens = [tokenizer.bos, *tokenizer.encode(line["prompt"])]
    else:
        raise ValueError(f"{where}: prompt={line['prompt']!r} must be a text")
    loading.fit(len(tokens), loaded.engine.decode.max_new_tokens, loaded.context, where)
    return tokens


def signature(loaded, source: Path) -> str:
    """What the texts depend on."""
    said = dataclasses.asdict(loaded.engine.decode)
    text = json.dumps([said, str(loaded.folder), loaded.draft]) + source.read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Partial:
    """What is finished, a line each, appended as it ends; a line cut short is dropped.

    The first host's file; the others keep what is finished while they run.
    """

    def __init__(self, target: Path, signature: str):
        self.path = target.with_name(target.name + ".partial")
        self.done: dict[int, dict] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = []
        for text in lines:
            try:
                kept.append(json.loads(text))
            except json.JSONDecodeError:
                break
        if kept and kept[0] != {"signature": signature}:
            raise ValueError(
                f"{self.path} is of other prompts or settings; remove it, or give another --output"
            )
        for number, result in kept[1:]:
            self.done[number] = result
        head = [{"signature": signature}, *([n, r] for n, r in self.done.items())]
        if hosts.first():
            files.write(self.path, "".join(json.dumps(one) + "\n" for one in head))

    def __enter__(self):
        self._file = (self.path if hosts.first() else Path(os.devnull)).open("a")
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, number: int, result) -> None:
        made = {
            "text": result.text, "end": result.end, "tokens": result.tokens,
            "logprobs": [round(value, 6) for value in result.logprobs],
        }  # fmt: skip
        self.done[number] = made
        self._file.write(json.dumps([number, made]) + "\n")
        self._file.flush()
