"""GPT-2's character for every byte, in which Hugging Face spells byte-level tokens."""


def _alphabet() -> str:
    """A byte's own character where it prints, else the next from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    chars = {byte: chr(byte) for byte in printing}
    chars |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return "".join(chars[byte] for byte in range(256))


CHARS = _alphabet()
BYTES = {char: byte for byte, char in enumerate(CHARS)}
