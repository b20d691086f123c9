"""A file of prompts, continued: every line answered, in their order, gone on with after an interruption.

A line is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}; what else it has is kept.
To each the output adds text, end, tokens and logprobs, and with several samples a line for each, `sample`.
What is finished waits in OUTPUT.partial until all is.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from experiments import chat, loading
from llama_jax import files
from llama_jax.decode.generate import Decoder, Request
from llama_jax.train import loop


def run(loaded, source: Path, target: Path) -> int:
    decode = loaded.engine.decode
    lines = read(source)
    if target.exists():
        raise ValueError(f"--output={target} exists; give another, or remove it")
    requests = []
    for number, line in enumerate(lines):
        tokens = prompt_of(line, loaded, f"{source}, line {number + 1}")
        for sample in range(decode.samples):
            requests.append(Request(tokens, decode.max_new_tokens, decode.seed, (number, sample)))
    partial = Partial(target, signature(loaded, source))
    waiting = [i for i in range(len(requests)) if i not in partial.done]
    length = max(len(request.tokens) + request.max_new_tokens for request in requests)
    rows = min(decode.rows, len(requests))
    decoder = Decoder(loaded.engine, loaded.tokenizer, loaded.ends, rows, length)
    bar = tqdm(total=len(requests), initial=len(partial.done), unit="text", dynamic_ncols=True)
    with loop.Interrupt() as interrupt, partial, bar:
        stopped = lambda: bool(interrupt.signal)  # noqa: E731
        for number, result in decoder.run([requests[i] for i in waiting], stopped=stopped):
            if result.end != "interrupted":
                partial.add(waiting[number], result)
                bar.update()
    if interrupt.signal:
        print(
            f"{interrupt.signal}: {len(partial.done)} of {len(requests)} are kept in {partial.path}; run the "
            "same command to go on"
        )
        return 0
    written = []
    for i in range(len(requests)):
        number, sample = requests[i].stream
        extra = {"sample": sample} if decode.samples > 1 else {}
        written.append({**lines[number], **extra, **partial.done[i]})
    files.write(target, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in written))
    partial.path.unlink()
    print(f"written to {target}: {len(written)} texts")
    return 0


def read(source: Path) -> list[dict]:
    """ValueError names the line that is not one."""
    lines = []
    if not source.read_text().strip():
        raise ValueError(f"--input={source} is empty")
    for number, text in enumerate(source.read_text().rstrip().split("\n"), 1):
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
    text = json.dumps([said, str(loaded.folder)]) + source.read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Partial:
    """What is finished, a line each, appended as it ends; a line cut short is dropped."""

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
        files.write(self.path, "".join(json.dumps(one) + "\n" for one in head))

    def __enter__(self):
        self._file = self.path.open("a")
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
