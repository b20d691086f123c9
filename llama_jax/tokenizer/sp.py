"""SentencePiece: load any model, and train one with the settings of LLaMA's.

The settings are the trainer_spec and normalizer_spec stored in Meta's published tokenizer.model
(the same file for LLaMA 1 and Llama 2); arXiv:2302.13971 section 2.1 names digits and bytes.
"""

import functools
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.tokenizer import special as names
from llama_jax.tokenizer import surrogate

# A sentence beyond this many bytes is skipped by the trainer, so longer lines are split before it.
MAX_SENTENCE_BYTES = 4192
# Encoding slows down with the length of a text (Alice x 64: 1.1 MB/s whole, 3.5 MB/s in parts).
PART_CHARS = 4096
SPACE = "\u2581"  # SentencePiece's visible space
# A piece with a space inside; a single space between two characters that are none.
_INNER_SPACE = re.compile("[^\u2581]\u2581")
_BETWEEN = re.compile("[^ \u2581] [^ \u2581]")


class SentencePiece:
    """A loaded model. A model without a padding piece (LLaMA's has none) pads with eos."""

    def __init__(self, processor: Any):
        self._processor = processor
        self.vocab_size = processor.get_piece_size()
        self.bos, self.eos = processor.bos_id(), processor.eos_id()
        self.pad = processor.pad_id() if processor.pad_id() >= 0 else self.eos
        self.fingerprint = _fingerprint(processor)
        self.prefix = (self.bos,)
        ids = range(self.vocab_size)
        self.user_defined = _user_defined(processor)
        controls = [i for i in ids if processor.is_control(i)]
        named = sorted([*controls, *self.user_defined])
        self.special = {processor.id_to_piece(i): i for i in named}
        # A newline that is a byte piece never merges with its neighbours, so that a text may be cut
        # behind it: `encode("\n" + rest)` without the newline's own ids continues exactly.
        newline = processor.encode("\n")
        self._newline = len(newline) if newline and processor.is_byte(newline[-1]) else 0
        # Where no piece goes on past a word's end, it may be cut before a word, too: the space that the
        # cut takes away is the one that every text gets.
        pieces = processor.id_to_piece(list(range(self.vocab_size)))
        self._words = not any(_INNER_SPACE.search(piece) for piece in pieces) and (
            processor.encode("a b") == processor.encode("a") + processor.encode("b")
        )

    def encode(self, text: str, special: bool = False) -> list[int]:
        surrogate.refuse(text)
        if special:
            return names.encode(self, text)
        if len(text) > 2 * PART_CHARS:
            return self.encode_batch([text], 1)[0].tolist()
        return self._processor.encode(text)

    def encode_inner(self, text: str) -> list[int]:
        surrogate.refuse(text)
        return self._inner.encode(text)

    @functools.cached_property
    def _inner(self):
        """The model without its space before a text."""
        import sentencepiece

        model = messages().ModelProto()
        model.ParseFromString(self._processor.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        parts: list[str] = []
        skips: list[
            list[int]
        ] = []  # of each text, for each part, the leading ids that are not its own
        for text in texts:
            surrogate.refuse(text)
            found = self._parts(text)
            parts += [part for part, _ in found]
            skips.append([skip for _, skip in found])
        ids = iter(self._processor.encode(parts, num_threads=threads, return_type="numpy"))
        return [
            np.concatenate([next(ids)[skip:] for skip in own]).astype(np.int32, copy=False)
            for own in skips
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def id_of(self, name: str) -> int:
        found = self._processor.piece_to_id(name)  # the unknown piece's for a name that is none
        return found if self._processor.id_to_piece(found) == name else -1

    def token_bytes(self, token: int) -> bytes:
        processor, token = self._processor, int(token)
        if token >= self.vocab_size:
            return b""
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        return piece.replace("\u2581", " ").encode()

    def _parts(self, text: str) -> list[tuple[str, int]]:
        """Texts whose ids, but for so many at the start of each, are together those of the text."""
        found, start, skip = [], 0, 0
        while len(text) - start > 2 * PART_CHARS:
            soon = start + PART_CHARS
            # Not further for a newline where words will do: a text without would be searched each time.
            far = soon + PART_CHARS if self._words else len(text)
            newline = text.find("\n", soon, far) + 1 if self._newline else 0
            word = _BETWEEN.search(text, soon) if self._words and not newline else None
            if 0 < newline < len(text):
                stop, after, ids = newline, newline, self._newline
            elif word:
                stop, after, ids = word.start() + 1, word.start() + 2, 0
            else:
                break
            found.append((_led(text[start:stop], skip), skip))
            start, skip = after, ids
        return [*found, (_led(text[start:], skip), skip)]


def _led(part: str, skip: int) -> str:
    return ("\n" if skip else "") + part


def load(path: str) -> SentencePiece:
    """The model in a file. ValueError names a file that is missing, damaged or something else."""
    import sentencepiece

    file = os.path.expanduser(path)
    try:
        with open(file, "rb") as f:
            content = f.read()
    except OSError as error:
        raise ValueError(
            f"data.tokenizer.path={path!r} cannot be read: {error.strerror}; "
            "name a SentencePiece model"
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
        pieces = processor.get_piece_size()
    except (RuntimeError, OSError) as error:
        raise ValueError(_no_model(path, content)) from error
    if not pieces:
        raise ValueError(_no_model(path, content))
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError(
            f"data.tokenizer.path={path!r} has no begin or end piece (ids {processor.bos_id()} and "
            f"{processor.eos_id()}); documents need both: train it with bos_id=1, eos_id=2"
        )
    return SentencePiece(processor)


def train(lines: Iterable[str], vocab_size: int, path: str, threads: int) -> None:
    """Train on lines with LLaMA's settings and write the model to `path`, whole or not at all.

    The pieces depend on the lines and vocab_size alone, not on the number of threads.
    """
    import sentencepiece

    model = io.BytesIO()
    seen = _Seen()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=seen.count(_sentences(lines)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_surface=" \u2047 ",
            input_sentence_size=200_000_000,
            shuffle_input_sentence=True,
            self_test_sample_size=0,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_cannot_train(str(error), vocab_size, seen.lines)) from error
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tokenizer-", delete=False) as file:
        try:
            file.write(model.getvalue())
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, os.path.expanduser(path))
        except BaseException:
            os.unlink(file.name)
            raise


class _Seen:
    """Counts what passes: SentencePiece's own messages do not say how little text it got."""

    lines = 0

    def count(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self.lines += 1
            yield line


def _sentences(lines: Iterable[str]) -> Iterator[str]:
    """Lines, the long ones in parts within the limit, cut before a space where there is one."""
    for line in lines:
        raw = line.encode()
        while len(raw) > MAX_SENTENCE_BYTES:
            end = raw.rfind(b" ", 1, MAX_SENTENCE_BYTES)
            if end < 0:
                end = MAX_SENTENCE_BYTES
                while raw[end] & 0xC0 == 0x80:  # not inside a character
                    end -= 1
            yield raw[:end].decode()
            raw = raw[end:]
        if raw:
            yield raw.decode()


def _cannot_train(message: str, vocab_size: int, lines: int) -> str:
    if not lines:
        return "the tokenizer's training text is empty; give data.sources some text"
    if most := re.search(r"value <= (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too large for this text; "
            f"it allows at most {most[1]}: lower model.vocab_size or give more text"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too small for this text: "
            f"bytes, specials and characters alone take {least[1]}; raise model.vocab_size"
        )
    return f"SentencePiece cannot train {vocab_size} pieces on {lines} lines: {message}"


def _no_model(path: str, content: bytes) -> str:
    ranks = re.match(rb"[A-Za-z0-9+/=]+ \d+\n", content)
    hint = (
        "it looks like tiktoken ranks: set data.tokenizer.kind='bpe'"
        if ranks
        else "it may be truncated: fetch it again"
    )
    return (
        f"data.tokenizer.path={path!r} ({len(content)} bytes) is not a SentencePiece model; {hint}"
    )


def messages() -> Any:
    """The classes of a model file, which protobuf makes when it is imported."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _user_defined(processor) -> frozenset[int]:
    proto = messages()
    model = proto.ModelProto()
    model.ParseFromString(processor.serialized_model_proto())
    kind = proto.ModelProto.SentencePiece.USER_DEFINED
    return frozenset(i for i, piece in enumerate(model.pieces) if piece.type == kind)


def _fingerprint(processor) -> str:
    """Of pieces and scores, and of a probe that shows the normaliser; not of the file, which also
    stores how many threads trained it."""
    ids = list(range(processor.get_piece_size()))
    digest = hashlib.sha256("\0".join(processor.id_to_piece(ids)).encode())
    digest.update(np.array(processor.get_score(ids), "<f4").tobytes())
    digest.update(np.array(processor.encode(" A\uff11  \ufb01\n "), "<i4").tobytes())
    return digest.hexdigest()
