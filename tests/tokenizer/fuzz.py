"""Strings that tokenizers get wrong: rare characters, runs of white space, names of specials."""

import random

# Ranges of one kind each: controls, letters and digits, marks, Asian scripts, emoji, private use.
RANGES = (
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700),
    (0x900, 0xE00), (0x1100, 0x1200), (0x2000, 0x2070), (0x2190, 0x2800), (0x3000, 0x3100),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0xFE00, 0xFE10), (0xFF00, 0xFFF0),
    (0x10330, 0x10350), (0x1F1E6, 0x1F200), (0x1F300, 0x1F700), (0x20000, 0x20100), (0xE0100, 0xE0110),
)  # fmt: skip
SPACES = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u3000"
FAMILY = "\u200d".join("\U0001f469\U0001f469\U0001f467\U0001f466")  # one emoji of seven characters
WORDS = (
    "the", "The", " the", "llama", "'s", "'LL", "we've", "1234567", "\uff13", "\xb2", "naïve", "\ufb01",
    "ß", "\u0130", FAMILY, "\U0001f3f3\ufe0f\u200d\U0001f308", "e\u0301", "\u200d", "\ufeff", "\x00",
    "// ", "==", "...", "!!!\n", "</div>", "<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>",
    "<|begin_of_text|>", "<|python_tag|>", "[INST]",
)  # fmt: skip


def strings(count: int, seed: int) -> list[str]:
    """Texts of up to some hundred characters, no lone surrogates; the first is empty."""
    rng = random.Random(seed)
    return [""] + [_string(rng) for _ in range(count - 1)]


def _string(rng: random.Random) -> str:
    kinds = (_word, _word, _space, _characters, _run)
    return "".join(rng.choice(kinds)(rng) for _ in range(rng.randint(1, 12)))


def _word(rng):
    return rng.choice(("", " ")) + rng.choice(WORDS)


def _space(rng):
    return "".join(rng.choices(SPACES, k=rng.randint(1, 5)))


def _run(rng):
    return rng.choice((*SPACES, *"a0=\u65e5\U0001f642")) * int(rng.paretovariate(0.6) % 150 + 1)


def _characters(rng):
    low, high = rng.choice(RANGES)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8)))
