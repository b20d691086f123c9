"""The text: its sources, tokenizer and rows."""

import dataclasses

from llama_jax.config.aspects import how, where
from llama_jax.config.rules import choose, local, positive


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """kind byte: 256 bytes and specials. sp: SentencePiece. bpe: tiktoken ranks of Llama 3. json: any
    tokenizer.json of Hugging Face, by the `tokenizers` library. folder: that of a converted model or of a
    run's workdir, with the tokens that the checkpoint adds to it.

    sp with an empty path trains one with LLaMA's settings on the training text, vocabulary
    `model.vocab_size`, and keeps it beside the rows.
    """

    kind: str = "sp"
    path: str = where("")

    def __post_init__(self):
        choose(("byte", "sp", "bpe", "json", "folder"), self.kind, "data.tokenizer.kind")
        local(self, "data.tokenizer", "path")
        if self.kind == "byte" and self.path:
            raise ValueError(
                f"data.tokenizer.path={self.path!r} has no effect on kind 'byte'; set kind 'sp' or 'bpe'"
            )
        needed = {
            "bpe": "ranks file (Llama 3's tokenizer.model)",
            "json": "tokenizer.json",
            "folder": "converted model or the workdir of a run",
        }
        if self.kind in needed and not self.path:
            what = needed[self.kind]
            raise ValueError(f"data.tokenizer.path='' must name the {what} of kind {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Source:
    """One body of text and its share of the tokens.

    kind stdlib: the Python standard library on this machine, no path. files: a glob of .txt, .py,
    .md, .jsonl (.gz, .zst) or .parquet. tfds: `name/config` of a TFDS text data set. rows: a folder
    of rows already tokenised (ArrayRecord with TFDS metadata).
    """

    name: str = "corpus"
    kind: str = where("stdlib")
    path: str = where("")
    text_field: str = where("text")  # of jsonl, parquet and tfds records
    # Share of the training tokens, relative to the other sources. In the editing form 0 leaves it out.
    weight: float = 1.0

    def __post_init__(self):
        place = f"data.sources.{self.name}"
        choose(("stdlib", "files", "tfds", "rows"), self.kind, f"{place}.kind")
        if self.kind == "stdlib" and self.path:
            raise ValueError(
                f"{place}.path={self.path!r} has no effect on kind 'stdlib'; set {place}.kind to 'files'"
            )
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f"{place}.path='' must be set for kind {self.kind!r}")
        local(self, place, "path")
        positive(self, place, "weight")


@dataclasses.dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = (Source(),)  # in the editing form a dict by name
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = 2048  # T: tokens predicted a row
    packing: str = "concat"  # "concat": concatenate and split; "best_fit": keep documents whole
    segments: str = "none"  # "document": no attention and no positions across documents
    validation_fraction: float = 0.05  # share of the documents that is held out
    seed: int = 0  # RNG seed of the data order
    cache: str = how("~/.cache/llama_jax")  # rows and tokenizers by fingerprint, compiled programs
    threads: int = how(4)  # readers of rows

    def __post_init__(self):
        positive(self, "data", "seq_len", "threads")
        local(self, "data", "cache")
        choose(("concat", "best_fit"), self.packing, "data.packing")
        choose(("none", "document"), self.segments, "data.segments")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1; try 0.05"
            )
        if not self.sources:
            raise ValueError("data.sources is empty; give at least one source, of a weight above 0")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources={names} must have different names")
