"""A conversation with a network, on a terminal or through a pipe.

What the network is shown is the whole conversation. When it no longer fits, with room for an answer, the
oldest question with its answer is left out, the system message never; a line says so. Commands: /reset,
/save FILE, /system TEXT, /help, /quit. Where the network calls a tool, what the tool gave is asked for. An
answer that is interrupted is kept as far as it went.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llama_jax import files
from llama_jax.decode.generate import Decoder, Request
from llama_jax.interrupt import Interrupt
from llama_jax.run.loading import LoadedModel, say
from llama_jax.tokenizer import tools
from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.forms import Form

HELP = """/reset         forget the conversation, keep the system message
/save FILE     write it as JSON
/system TEXT   what the model is told first; a new conversation begins
/quit"""


class Chat:
    def __init__(self, loaded: LoadedModel, form: Form, system: str):
        self.loaded, self.form, self.system = loaded, form, system
        self.messages: list[Message] = []
        decode = loaded.engine.decode
        self.length = 0  # that the decoder has room for
        if decode.max_new_tokens >= loaded.context:
            raise ValueError(
                f"decode.max_new_tokens={decode.max_new_tokens} leaves no room for a question in "
                f"the {loaded.context} tokens that the model was trained for"
            )
        if decode.samples > 1:
            raise ValueError(
                f"decode.samples={decode.samples} has no effect in a chat, which has one answer; set it to 1"
            )
        self.terminal = sys.stdin.isatty()

    def run(self) -> int:
        if self.form.note:
            note(self.form.note)
        if self.terminal:
            note("/help lists the commands")
        for line in self.lines():
            if line.startswith("/"):
                if self.command(line) == "quit":
                    break
            elif line.strip() and not self.ask(Message("user", line)):
                return 0
        return 0

    def lines(self) -> Iterator[str]:
        while True:
            line = self.read("> ")
            if line is None:
                return
            yield line

    def read(self, prompt: str) -> str | None:
        """A line, None at the end of the input."""
        if self.terminal:
            try:
                return input(prompt)
            except (EOFError, KeyboardInterrupt):
                print()
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def command(self, line: str) -> str:
        name, _, rest = line[1:].partition(" ")
        if name == "reset":
            self.messages = []
        elif name == "system":
            self.system, self.messages = rest.strip(), []
        elif name == "save" and rest.strip():
            self.save(rest.strip())
        elif name == "help":
            note(HELP)
        elif name != "quit":
            note(f"/{name} is no command, or lacks something\n{HELP}")
        return name

    def save(self, path: str) -> None:
        if why := files.why_not_local(path):
            note(f"{path} {why}")
            return
        shown = [{"role": one.role, "content": one.content} for one in self.shown()]
        try:
            files.write(
                Path(path).expanduser(), json.dumps(shown, indent=2, ensure_ascii=False) + "\n"
            )
            note(f"saved to {path}")
        except OSError as error:
            note(f"{path} cannot be written: {error.strerror}")

    def shown(self) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        return [*system, *self.messages]

    def ask(self, message: Message) -> bool:
        """Answer, tools' results asked for where they are called. False to end."""
        before = list(self.messages)
        self.messages.append(message)
        try:
            while calls := self.answer():
                for call in calls:
                    given = self.read(f"result of {call.name}: ")
                    if given is None:
                        return False
                    self.messages.append(Message("ipython", given))
        except ValueError as error:  # what was said cannot be written in the form, or is too long
            self.messages = before
            note(str(error))
        except Stopped:
            return False
        return True

    def answer(self) -> tuple[tools.Call, ...]:
        """Say and keep one message; the calls in it."""
        decode = self.loaded.engine.decode
        tokens = self.fitted()
        request = Request(tokens, decode.max_new_tokens, decode.seed, (len(self.messages), 0))
        self.grow(len(tokens) + decode.max_new_tokens)
        with Interrupt() as interrupt:
            listen = lambda _, text: say(text)  # noqa: E731
            ((_, result),) = self.decoder.run(self.loaded.params, [request], listen, interrupt.due)
        say("\n")
        message = self.form.answer(result.text, result.tokens, result.last)
        self.messages.append(message)
        if interrupt.signal == "SIGTERM":
            raise Stopped
        if result.end == "length":
            note(f"(cut after decode.max_new_tokens={decode.max_new_tokens})")
        return tools.parse(message) if self.form.calls else ()

    def grow(self, length: int) -> None:
        """Room for twice as long a conversation where there is too little; the whole context may be large."""
        if length > self.length:
            self.length = min(2 * length, self.loaded.context)
            ends = self.loaded.ends | self.form.ends
            self.decoder = Decoder(self.loaded.engine, self.loaded.tokenizer, ends, 1, self.length)

    def fitted(self) -> list[int]:
        """The conversation as tokens, without its beginning if it is too long."""
        room = self.loaded.context - self.loaded.engine.decode.max_new_tokens
        dropped = 0
        while len(tokens := self.form.write(self.shown(), ())) > room:
            second = [i for i, one in enumerate(self.messages) if one.role == "user"][1:2]
            if not second:
                raise ValueError(
                    f"the question has {len(tokens)} tokens with what stands before it; there is room for "
                    f"{room}, beside decode.max_new_tokens; it is left out"
                )
            self.messages = self.messages[second[0] :]
            dropped += 1
        if dropped:
            note(f"(the oldest {dropped} of the questions no longer fit, and are forgotten)")
        return tokens


class Stopped(Exception):
    """The process is asked to end."""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
