"""llama2.c's tokenizer file, read into a SentencePiece model.

The file (karpathy/llama2.c, tokenizer.py `export` and run.c `build_tokenizer`): int32 length of the
longest piece in bytes, then for every piece float32 score, int32 length, bytes; little-endian. A
piece has spaces where SentencePiece has U+2581, begin is "\\n<s>\\n" and end "\\n</s>\\n". Ids are
those of LLaMA: 0 unknown, 1 begin, 2 end, 3..258 the bytes, spelt "<0x00>" or held as one raw byte. A model
trained without byte fallback, one of characters say, has its own pieces from 3 on.
"""

import struct

from llama_jax.tokenizer.sp import SPACE, messages

UNKNOWN, BEGIN, END, BYTES = 0, 1, 2, 3  # ids; bytes, where there are any, end at 258


def llama2c_to_sp(content: bytes) -> bytes:
    """The serialized model that gives the file's ids; ValueError on a damaged file.

    The normaliser is LLaMA's: no change to the text but a space before it. llama2.c's run.c adds
    that space too, and also merges the pair with the best score first. What no piece spells is the unknown
    piece where there are no bytes; run.c then takes ids of other pieces.
    """
    proto = messages()

    pieces, first = _pieces(content)
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for i, (name, score) in enumerate(pieces):
        kind = {UNKNOWN: kinds.UNKNOWN, BEGIN: kinds.CONTROL, END: kinds.CONTROL}.get(
            i, kinds.BYTE if i < first else kinds.NORMAL
        )
        model.pieces.add(piece=name, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = proto.TrainerSpec.BPE, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = UNKNOWN, BEGIN, END, -1
    trainer.byte_fallback = first > BYTES
    trainer.unk_surface = " \u2047 "
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _pieces(content: bytes) -> tuple[list[tuple[str, float]], int]:
    """Every piece as SentencePiece spells it, with its score; the id of the first that is no byte."""
    longest, raw = _records(content)
    bytewise = len(raw) > BYTES and raw[BYTES][0] in (b"<0x00>", b"\0")
    first = BYTES + 256 if bytewise else BYTES
    if len(raw) < first or len(raw) <= BYTES:
        least = f"unknown, begin, end and {'256 bytes' if bytewise else 'a piece'} alone are"
        raise ValueError(
            f"llama2.c tokenizer: {len(raw)} pieces, but {least} {max(first, BYTES + 1)}; the file is "
            "truncated or something else"
        )
    if longest != max(len(piece) for piece, _ in raw):
        raise ValueError(
            f"llama2.c tokenizer: its longest piece has {max(len(p) for p, _ in raw)} bytes, its "
            f"header says {longest}; the file is damaged or truncated"
        )
    seen: dict[str, int] = {}
    pieces = []
    for i, (piece, score) in enumerate(raw):
        name = _name(i, piece, first)
        if seen.setdefault(name, i) != i:
            raise ValueError(
                f"llama2.c tokenizer: pieces {seen[name]} and {i} are both {name!r}; the file is "
                "damaged"
            )
        pieces.append((name, score))
    return pieces, first


def _records(content: bytes) -> tuple[int, list[tuple[bytes, float]]]:
    if len(content) < 4:
        raise ValueError(f"llama2.c tokenizer: {len(content)} bytes are no file; it is truncated")
    (longest,) = struct.unpack_from("<i", content)
    at, records = 4, []
    while at < len(content):
        end, score, size = at + 8, 0.0, 0
        if end <= len(content):
            score, size = struct.unpack_from("<fi", content, at)
            end += size
        if end > len(content) or not 0 < size <= longest or score != score:
            raise ValueError(
                f"llama2.c tokenizer: piece {len(records)} at byte {at} of {len(content)} is not "
                f"(score, length 1..{longest}, bytes); the file is damaged or truncated"
            )
        records.append((content[at + 8 : end], score))
        at = end
    return longest, records


def _name(i: int, piece: bytes, first: int) -> str:
    if i == UNKNOWN or i >= first:
        try:
            return piece.decode().replace(" ", SPACE)
        except UnicodeDecodeError as error:
            raise ValueError(f"llama2.c tokenizer: piece {i}, {piece!r}, is not UTF-8") from error
    if i in (BEGIN, END):
        name, spelt = ("<s>", "</s>")[i - BEGIN], piece.strip().decode(errors="replace")
        if spelt != name:
            raise ValueError(
                f"llama2.c tokenizer: piece {i} is {piece!r}, it must be '\\n{name}\\n'"
            )
        return name
    name = f"<0x{i - BYTES:02X}>"
    if piece not in (name.encode(), bytes([i - BYTES])):
        raise ValueError(f"llama2.c tokenizer: piece {i} is {piece!r}, it must be {name!r}")
    return name
