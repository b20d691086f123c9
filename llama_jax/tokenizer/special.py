"""Special tokens that a text asks for by name."""

import re


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text in which the tokenizer's special names stand for their tokens.

    What stands between two names is encoded as a text of its own: SentencePiece puts its space
    before it again, as Meta's code does with every turn of a dialogue.
    """
    names = re.compile("(" + "|".join(re.escape(name) for name in tokenizer.special) + ")")
    ids = []
    for i, part in enumerate(names.split(text)):
        ids += [tokenizer.special[part]] if i % 2 else tokenizer.encode(part)
    return ids
