"""What the published networks were trained on, as sources of rows under `rows/`.

A source is a folder of rows made beforehand: point `--config.data.sources.NAME.path` elsewhere, or link
`rows/NAME`. `--config.data.sources.NAME.kind=files` makes rows on the way of the text at its path;
`--config.data.sources.NAME.weight=0` leaves a source out.
"""

import dataclasses

from llama_jax.config import Data, Source, TokenizerConfig


def _rows(**weights: float) -> tuple[Source, ...]:
    return tuple(
        Source(name=name, kind="rows", path=f"rows/{name}", weight=weight)
        for name, weight in sorted(weights.items())
    )


# arXiv:2302.13971 table 1: shares of the tokens, in percent.
LLAMA1_SOURCES = _rows(
    commoncrawl=67.0, c4=15.0, github=4.5, wikipedia=4.5, books=4.5, arxiv=2.5, stackexchange=2.0
)
LLAMA1 = Data(
    sources=LLAMA1_SOURCES, tokenizer=TokenizerConfig("sp", "tokenizer.model"), seq_len=2048
)

# Llama 2 publishes no mixture (arXiv:2307.09288 section 2.1): one source, yours.
LLAMA2 = Data(
    sources=_rows(llama2=1.0), tokenizer=TokenizerConfig("sp", "tokenizer.model"), seq_len=4096
)

# arXiv:2407.21783 section 3.1.2: half general knowledge, a quarter mathematics and reasoning, 17% code,
# 8% multilingual.
LLAMA3 = Data(
    sources=_rows(general=50.0, mathematics=25.0, code=17.0, multilingual=8.0),
    tokenizer=TokenizerConfig("bpe", "tokenizer.model"),
    seq_len=8192,
)
LLAMA31 = dataclasses.replace(LLAMA3, seq_len=131_072)

# Python's own standard library, with a SentencePiece vocabulary trained on it: no download.
STDLIB = Data(
    sources=(Source(name="corpus", kind="stdlib"),), tokenizer=TokenizerConfig("sp"), seq_len=256
)
