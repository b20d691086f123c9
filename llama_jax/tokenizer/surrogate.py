"""Lone surrogates: half of a UTF-16 pair, which Python's str can hold and UTF-8 cannot."""


def refuse(text: str) -> None:
    """ValueError at the first lone surrogate: it has no bytes, so no tokenizer has ids for it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text[{error.start}]=U+{ord(text[error.start]):04X} is a lone surrogate, which has no "
            "UTF-8: read the text with errors='replace', or join UTF-16 pairs before"
        ) from error
