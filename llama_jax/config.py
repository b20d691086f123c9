"""The schema: every setting of a run, its default, its rule.

Two forms. The contract is the frozen, hashable `Run` below: all of `llama_jax` reads it and nothing
else. The editing form is a locked `ml_collections.ConfigDict` made by `edit(run)`, which
`configs/*.py` and the command line change; `freeze` turns it into the contract, once.

Rules are checked where a part is constructed, so that an invalid `Run` cannot exist. A message gives
value, place, rule and the nearest valid value.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections

from llama_jax import files


def choose(slots, name: str, place: str):
    """`slots[name]`, or `name` itself of a plain collection; ValueError with the nearest otherwise."""
    if name not in slots:
        known, few = ", ".join(slots), 1
        if len(slots) > _LISTED:
            known, few = f"the {len(slots)} that there are", 3
        near = ", ".join(map(repr, difflib.get_close_matches(str(name), slots, few, cutoff=0.0)))
        raise ValueError(f"{place}={name!r} is not one of {known}; nearest: {near}")
    return slots[name] if isinstance(slots, dict) else name


_LISTED = 64  # names that a message lists; a tokenizer of Llama 3 has 256 special tokens


def nearest(name: str, known) -> str:
    return difflib.get_close_matches(str(name), known, 1, cutoff=0.0)[0]


def _positive(part, place, *names):
    for name in names:
        if not getattr(part, name) > 0:
            raise ValueError(f"{place}.{name}={getattr(part, name)} must be positive")


def _not_negative(part, place, *names):
    for name in names:
        if not getattr(part, name) >= 0:
            raise ValueError(f"{place}.{name}={getattr(part, name)} must not be negative")


def check_seed(seed: int, place: str) -> None:
    """ValueError if JAX would take it for another one: its keys have 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{place}={seed} must be from 0 to {2**32 - 1}; try {seed % 2**32}")


def _local(part, place, *names):
    for name in names:
        if why := files.why_not_local(getattr(part, name)):
            raise ValueError(f"{place}.{name}={getattr(part, name)!r} {why}")


def _divides(small_place, small, large_place, large):
    if large % small:
        low = [n for n in range(1, math.isqrt(large) + 1) if large % n == 0]
        fits = sorted({*low, *(large // n for n in low)})
        near = sorted(sorted(fits, key=lambda n: abs(n - small))[:6])
        tries = f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if near[1:] else f"{near[0]}"
        raise ValueError(f"{small_place}={small} must divide {large_place}={large}; try {tries}")


def _idle(part, place, names, why):
    """ValueError if a field of these is set: under `why` it has no effect."""
    for name in names:
        value, default = getattr(part, name), type(part).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(
                f"{place}.{name}={value!r} has no effect while {why}; "
                f"change that or leave it at {default!r}"
            )


_BANDS = ("low_freq_factor", "high_freq_factor", "original_length")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding (arXiv:2104.09864), stretched by `factor` to reach past its original length.

    factor 1 leaves the frequencies alone. Llama 3.1 and 3.2-Vision use 8, Llama 3.2 1B and 3B use 32,
    each with low 1, high 4 and original length 8192 (the `rope_scaling` of their checkpoints). YaRN's
    paper has low 1 and high 32.
    """

    theta: float = 10_000.0
    rotary_dim: int = 0  # so many entries of a head turn, the others stay; 0: all of them
    factor: float = 1.0
    scaling: str = "llama3"  # by which rule: "linear", "ntk", "llama3" or "yarn"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        _positive(self, "model.rope", "theta", "factor", "low_freq_factor", "original_length")
        _not_negative(self, "model.rope", "rotary_dim")
        choose(("linear", "ntk", "llama3", "yarn"), self.scaling, "model.rope.scaling")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope.high_freq_factor={self.high_freq_factor} must exceed "
                f"model.rope.low_freq_factor={self.low_freq_factor}; Llama 3.1 uses 4 and 1"
            )
        idle, why = (), ""
        if self.scaling in ("linear", "ntk"):
            idle, why = _BANDS, f"model.rope.scaling={self.scaling!r}"
        if self.factor == 1.0:
            idle, why = ("scaling", *_BANDS), "model.rope.factor=1.0"
        _idle(self, "model.rope", idle, why)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. Sizes are final: nothing is rounded. Defaults are LLaMA 7B's."""

    vocab_size: int = 32_000
    dim: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    ffn_dim: int = 11_008
    pattern: tuple[str, ...] = ("self",)  # one group of layers; the depth repeats it
    norm: str = "rms"
    norm_eps: float = 1e-6
    placement: str = "pre"  # of the norms and residuals of a layer
    qk_norm: str = "none"  # of each head's queries and keys: a norm
    position: str = "rope"
    rope: Rope = Rope()
    max_positions: int = 0  # rows of the table of position "learned"
    window: int = 0  # a query sees so many keys, its own among them; 0: all before it
    softcap: float = 0.0  # scores are softcap x tanh(score / softcap); 0: as they are
    bias: str = "none"  # added after linear layers: "qkv", or "all" of a layer
    ffn: str = "swiglu"
    output: str = "untied"  # "tied": logits are products with the embedding
    init: str = "normal"
    init_std: float = 0.02
    mup_base_dim: int = 0  # of init "mup": the width at which it is the same as "normal"
    # From here on: how it is computed, never what.
    compute_dtype: str = "bfloat16"
    kernel: str = "blockwise"
    remat: str = "none"
    unroll: int = 1  # most layer groups in a turn of the scan; see `unrolled`

    def __post_init__(self):
        _positive(
            self,
            "model",
            *("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim"),
            *("norm_eps", "init_std", "unroll"),
        )
        _divides("model.kv_heads", self.kv_heads, "model.heads", self.heads)
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} must be even: rotary embedding turns pairs; "
                f"try {self.head_dim + 1}"
            )
        if not self.pattern:
            raise ValueError("model.pattern=() must name at least one kind of layer; try ('self',)")
        _divides("len(model.pattern)", len(self.pattern), "model.layers", self.layers)
        choose(("untied", "tied"), self.output, "model.output")
        choose(("none", "qkv", "all"), self.bias, "model.bias")
        _not_negative(self, "model", "max_positions", "window", "softcap", "mup_base_dim")
        if self.rope.rotary_dim % 2 or self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"model.rope.rotary_dim={self.rope.rotary_dim} must be even and at most "
                f"model.head_dim={self.head_dim}; try {self.head_dim // 4 * 2}"
            )
        for name, field, choice in (
            ("max_positions", "position", "learned"),
            ("mup_base_dim", "init", "mup"),
        ):
            chosen = getattr(self, field)
            if chosen != choice:
                _idle(self, "model", (name,), f"model.{field}={chosen!r}")
            elif not getattr(self, name):
                raise ValueError(f"model.{name}=0 must be set for model.{field}={choice!r}")
        choose(("float32", "bfloat16"), self.compute_dtype, "model.compute_dtype")

    @property
    def groups(self) -> int:
        return self.layers // len(self.pattern)

    @property
    def blocks(self) -> dict[str, int]:
        """How many layers are of each kind of block."""
        return {kind: self.groups * self.pattern.count(kind) for kind in set(self.pattern)}

    @property
    def unrolled(self) -> int:
        """Layer groups laid out one after another in each turn of the scan: as many as divide them all."""
        most = min(self.unroll, self.groups)
        return next(n for n in range(most, 0, -1) if self.groups % n == 0)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """kind byte: 256 bytes and specials. sp: SentencePiece. bpe: tiktoken ranks of Llama 3. json: any
    tokenizer.json of Hugging Face, by the `tokenizers` library.

    sp with an empty path trains one with LLaMA's settings on the training text, vocabulary
    `model.vocab_size`, and keeps it beside the rows.
    """

    kind: str = "sp"
    path: str = ""

    def __post_init__(self):
        choose(("byte", "sp", "bpe", "json"), self.kind, "data.tokenizer.kind")
        _local(self, "data.tokenizer", "path")
        if self.kind == "byte" and self.path:
            raise ValueError(
                f"data.tokenizer.path={self.path!r} has no effect on kind 'byte'; set kind 'sp' or 'bpe'"
            )
        if self.kind in ("bpe", "json") and not self.path:
            file = {"bpe": "ranks file (Llama 3's tokenizer.model)", "json": "tokenizer.json"}[
                self.kind
            ]
            raise ValueError(f"data.tokenizer.path='' must name the {file} of kind {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Source:
    """One body of text and its share of the tokens.

    kind stdlib: the Python standard library on this machine, no path. files: a glob of .txt, .py,
    .md, .jsonl (.gz, .zst) or .parquet. tfds: `name/config` of a TFDS text data set. rows: a folder
    of rows already tokenised (ArrayRecord with TFDS metadata).
    """

    name: str = "corpus"
    kind: str = "stdlib"
    path: str = ""
    text_field: str = "text"  # of jsonl, parquet and tfds records
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
        _local(self, place, "path")
        _positive(self, place, "weight")


@dataclasses.dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = (Source(),)  # in the editing form a dict by name
    tokenizer: Tokenizer = Tokenizer()
    seq_len: int = 2048  # T: tokens predicted a row
    packing: str = "concat"  # "concat": concatenate and split; "best_fit": keep documents whole
    segments: str = "none"  # "document": no attention and no positions across documents
    validation_fraction: float = 0.05  # of the documents
    seed: int = 0  # of the order
    cache: str = "~/.cache/llama_jax"  # rows and tokenizers by fingerprint, compiled programs
    threads: int = 4  # readers of rows

    def __post_init__(self):
        _positive(self, "data", "seq_len", "threads")
        _local(self, "data", "cache")
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


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW of LLaMA (arXiv:2302.13971 section 2.3) unless said otherwise."""

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 2000
    final_fraction: float = 0.1  # of the peak learning rate, at the last step
    decay_fraction: float = (
        0.1  # of the steps after warm-up, at the end, in which schedule "wsd" falls
    )
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0
    # Parameters that are trained, by globs of their paths or by letters: ("groups/*/attention/*", "D").
    train: tuple[str, ...] = ("*",)

    def __post_init__(self):
        if not self.train:
            raise ValueError("optim.train=() trains nothing; ('*',) trains every parameter")
        _positive(self, "optim", "learning_rate", "eps", "clip_norm")
        for name in ("beta1", "beta2", "final_fraction", "decay_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name.startswith("beta") and value == 1):
                raise ValueError(f"optim.{name}={value} must lie between 0 and 1")
        idle = {"lion": ("eps",), "adafactor": ("beta1", "beta2", "eps")}.get(self.name, ())
        _idle(self, "optim", idle, f"optim.name={self.name!r}")
        idle = [] if self.schedule == "wsd" else ["decay_fraction"]
        idle += ["final_fraction"] if self.schedule == "inverse_sqrt" else []
        _idle(self, "optim", idle, f"optim.schedule={self.schedule!r}")
        _not_negative(self, "optim", "warmup_steps", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 238_419  # 1.0T tokens in batches of 4M, LLaMA 7B
    batch_size: int = 2048  # rows an optimiser step, over all devices
    microbatches: int = 1  # gradient accumulation: the batch in so many parts, one after another
    loss_chunks: int = 1  # logits of 1/chunks of the positions exist at a time
    z_loss: float = 0.0  # times the squared log of the partition function (PaLM used 1e-4)
    seed: int = 0  # of the initial parameters
    on_anomaly: str = "stop"  # "skip": leave the update out, report it, go on
    spike_nats: float = (
        0.0  # loss this far above its running mean is an anomaly; 0: only NaN and inf
    )
    max_skips: int = 10  # anomalies in a row that stop even "skip"
    init_from: str = (
        ""  # begin with the weights of this folder: a converted model, or a run's workdir
    )
    init_checksum: str = ""  # of those weights; found when the run begins, and then expected

    def __post_init__(self):
        _positive(self, "train", "steps", "batch_size", "microbatches", "loss_chunks", "max_skips")
        _not_negative(self, "train", "z_loss", "spike_nats")
        check_seed(self.seed, "train.seed")
        _divides("train.microbatches", self.microbatches, "train.batch_size", self.batch_size)
        choose(("stop", "skip"), self.on_anomaly, "train.on_anomaly")
        _local(self, "train", "init_from")
        if not self.init_from:
            _idle(self, "train", ("init_checksum",), "train.init_from=''")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1, allowed once, takes those that are left.

    data repeats the parameters and splits the rows, fsdp splits both, context splits the positions of a
    row, tensor the heads and hidden widths. slices: TPU slices, joined by the data centre's network.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    hardware: str = "any"  # the slice that the page was laid out for, as in 7b.py:v4_32

    def __post_init__(self):
        sizes = {name: n for name, n in dataclasses.asdict(self).items() if name != "hardware"}
        if any(size == 0 or size < -1 for size in sizes.values()):
            raise ValueError(f"mesh={sizes} must be positive, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes} may leave one axis to be filled, not several")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 1000  # steps
    keep: int = 3

    def __post_init__(self):
        _positive(self, "checkpoint", "every", "keep")


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = 1000  # steps
    rows: int = 2048  # held-out rows, at most; an equal share of each source

    def __post_init__(self):
        _positive(self, "eval", "every", "rows")


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 10  # steps
    tensorboard: str = "on"
    wandb: str = "off"
    audit: str = "off"  # "on": audit.jsonl lists the rows that each step consumed
    peak_tflops: float = 0.0  # a device, for MFU; 0: look it up by the device's name
    watts_per_chip: float = 0.0  # for energy and CO2; 0: look it up

    def __post_init__(self):
        _positive(self, "log", "every")
        _not_negative(self, "log", "peak_tflops", "watts_per_chip")
        for name in ("tensorboard", "wandb", "audit"):
            choose(("on", "off"), getattr(self, name), f"log.{name}")


@dataclasses.dataclass(frozen=True)
class Decode:
    """How a text is continued. Not part of a run: a trained model is decoded in many ways."""

    max_new_tokens: int = 100
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # draw from so many of the likeliest; 0: from all
    top_p: float = 1.0  # draw from the fewest that have this probability together
    min_p: float = 0.0  # draw from those of at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # of the tokens that the text already has
    seed: int = 0  # of the draws
    samples: int = 1  # continuations of each prompt
    stop: tuple[str, ...] = ()  # a text ends before any of these
    stop_tokens: tuple[str, ...] = ()  # or at a special token of one of these names
    rows: int = 8  # texts at a time, at most
    cache: str = (
        "compute"  # what keys and values are kept in: "compute" (its dtype), "bfloat16" or "int8"
    )
    # Of whatever is decoded, a draft model too: "stored" (the checkpoint's), "float32" or "bfloat16".
    # experiments.quantise computes in the checkpoint's, which experiments.convert --dtype sets.
    compute_dtype: str = "stored"

    def __post_init__(self):
        choose(("stored", "float32", "bfloat16"), self.compute_dtype, "decode.compute_dtype")
        _positive(self, "decode", "max_new_tokens", "repetition_penalty", "samples", "rows")
        _not_negative(self, "decode", "temperature", "top_k")
        if 0 < self.temperature < 1e-6 or not math.isfinite(self.temperature):
            raise ValueError(
                f"decode.temperature={self.temperature} must be 0, which takes the likeliest token, or at "
                "least 1e-06: float32 logits divided by less are infinite"
            )
        if not math.isfinite(self.repetition_penalty):
            raise ValueError(f"decode.repetition_penalty={self.repetition_penalty} must be finite")
        check_seed(self.seed, "decode.seed")
        choose(("compute", "bfloat16", "int8"), self.cache, "decode.cache")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"decode.top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"decode.min_p={self.min_p} must be at least 0 and below 1")
        if "" in self.stop:
            raise ValueError("decode.stop has an empty text, which would end every text at once")
        if self.temperature == 0:
            drawn = ("seed", "top_k", "top_p", "min_p", "samples")
            _idle(self, "decode", drawn, "decode.temperature=0.0")


@dataclasses.dataclass(frozen=True)
class Quant:
    """How weights are made smaller. Not part of a run: it is done to what a run has made."""

    bits: int = 8  # of the matrices in layers: 8, one scale a channel, or 4
    group: int = 32  # of 4 bits: values that share a scale, about: a number that divides them
    method: str = "gptq"  # of 4 bits: "gptq" reads a text, "nearest" does not
    rows: int = 128  # of that text
    row_tokens: int = 2048  # of each row, read or measured; at most the network's context
    # Of 8 bits: "int16" rounds what they are multiplied with, too. Fast where products of int8 are: on CPUs.
    activations: str = "compute"

    def __post_init__(self):
        _positive(self, "quant", "group", "rows", "row_tokens")
        if self.bits not in (8, 4):
            raise ValueError(f"quant.bits={self.bits} must be 8 or 4")
        if self.row_tokens == 1:
            raise ValueError("quant.row_tokens=1 must be 2 or more: the first token is given")
        choose(("gptq", "nearest"), self.method, "quant.method")
        choose(("compute", "int16"), self.activations, "quant.activations")
        if self.bits == 8:
            _idle(self, "quant", ("group", "method", "rows"), "quant.bits=8")
        else:
            _idle(self, "quant", ("activations",), "quant.bits=4")
            if self.method == "nearest":
                _idle(self, "quant", ("rows",), "quant.method='nearest'")

    @property
    def reads_text(self) -> bool:
        return self.bits == 4 and self.method == "gptq"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run."""

    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()

    def __post_init__(self):
        if self.optim.train != ("*",) and not self.train.init_from:
            raise ValueError(
                f"optim.train={self.optim.train} freezes the other parameters, and those need weights: give "
                "train.init_from, a converted model or a run's workdir"
            )
        _divides("train.loss_chunks", self.train.loss_chunks, "data.seq_len", self.data.seq_len)
        if self.model.init == "mup" and self.optim.name in ("adafactor", "muon"):
            raise ValueError(
                f"model.init='mup' does not know how optim.name={self.optim.name!r} should slow down as a "
                "network grows; set optim.name to 'adamw' or 'lion'"
            )
        if self.model.max_positions and self.model.max_positions < self.data.seq_len:
            raise ValueError(
                f"model.max_positions={self.model.max_positions} must be at least "
                f"data.seq_len={self.data.seq_len}: no position may be without its row"
            )
        if self.eval.rows < len(self.data.sources):
            raise ValueError(
                f"eval.rows={self.eval.rows} must be at least {len(self.data.sources)}, one of each source"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below "
                f"train.steps={self.train.steps}; try {max(self.train.steps // 10, 0)}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len


def edit(run: Run) -> ml_collections.ConfigDict:
    """The editing form of a run: locked, so that a misspelt name raises."""
    return ml_collections.ConfigDict(to_dict(run)).lock()


def add_sources(edited: ml_collections.ConfigDict, settings: Sequence[str]) -> None:
    """Give the editing form the sources whose settings ("books.kind") are named and that it lacks.

    ValueError unless the kind of each new one is among them: a misspelt name is not a new source.
    """
    fields = [field.name for field in dataclasses.fields(Source) if field.name != "name"]
    for setting in settings:
        name, _, field = setting.partition(".")
        place = f"data.sources.{setting}"
        if not name.isidentifier():
            raise ValueError(f"{place}: the name of a source must be of letters, digits and _")
        if field not in fields:
            tried = f"data.sources.{name}.{nearest(field, fields)}"
            raise ValueError(f"{place} is not a setting; nearest: {tried}")
        if name in edited.data.sources:
            continue
        if f"{name}.kind" not in settings:
            there = ", ".join(edited.data.sources)
            raise ValueError(
                f"{place}: there is no source {name!r} but {there}; a new one needs "
                f"data.sources.{name}.kind and data.sources.{name}.path, too"
            )
        new = {k: v for k, v in to_dict(Source(name)).items() if k != "name"}
        with edited.unlocked():
            edited.data.sources[name] = new


def freeze(config: ml_collections.ConfigDict) -> Run:
    """The contract of an edited config. ValueError names what breaks which rule."""
    return from_dict(config.to_dict())


def to_dict(value: Any) -> Any:
    """Plain dicts of a frozen part; named parts in a tuple become a dict by name."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return {
            part.name: {k: v for k, v in to_dict(part).items() if k != "name"} for part in value
        }
    return value


def from_dict(values: dict[str, Any], kind: type = Run, place: str = "") -> Any:
    """The inverse of `to_dict`, also from JSON (lists for tuples). ValueError on what does not fit."""
    return _build(kind, values, place)


def flatten(run: Run) -> dict[str, Any]:
    """{"model.dim": 4096, ...}, in the order of the schema."""
    flat = {}

    def walk(value, place):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{place}.{key}" if place else key)
        else:
            flat[place] = value

    walk(to_dict(run), "")
    return flat


# Settings that say how a run is carried out, not what it computes: a run may go on with others.
HOW = (
    *("mesh.", "log.", "checkpoint.", "eval."),
    *("model.kernel", "model.remat", "model.unroll", "train.microbatches", "train.loss_chunks"),
    *("train.on_anomaly", "train.max_skips", "data.cache", "data.threads"),
)


# Settings that say where text and weights lie. What they are is compared: text by the fingerprint that
# checkpoints keep, weights by train.init_checksum.
WHERE = re.compile(
    r"data\.tokenizer\.path|data\.sources\..*\.(kind|path|text_field)|train\.init_from"
)


def diff(old: Run, new: Run, essential: bool = False) -> list[str]:
    """One line a differing field: `model.dim: 4096 -> 5120`; essential: those of `HOW`, `WHERE` left out."""
    old_flat, new_flat = flatten(old), flatten(new)
    return [
        f"{place}: {old_flat.get(place, 'absent')} -> {new_flat.get(place, 'absent')}"
        for place in dict.fromkeys((*old_flat, *new_flat))
        if old_flat.get(place, "absent") != new_flat.get(place, "absent")
        and not (essential and (place.startswith(HOW) or WHERE.fullmatch(place)))
    ]


def _build(kind: type, values: Any, place: str):
    """One frozen part of plain values, types checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}={values!r} must be a group of settings ({kind.__name__})")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{_join(place, name)} is not a setting; "
                f"nearest: {_join(place, nearest(name, fields))}"
            )
    return kind(**{name: _value(types[name], v, _join(place, name)) for name, v in values.items()})


def _value(kind: Any, value: Any, place: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, place)
    if typing.get_origin(kind) is tuple:
        part = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(part):
            if not isinstance(value, dict):
                raise ValueError(f"{place}={value!r} must be a dict of name -> {part.__name__}")
            # A source of weight 0 is left out: the command line cannot take one away otherwise.
            kept = {
                name: dict(v) for name, v in sorted(value.items()) if dict(v).get("weight") != 0
            }
            return tuple(
                _build(part, {"name": name, **v}, f"{place}.{name}") for name, v in kept.items()
            )
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place}={value!r} must be a tuple of {part.__name__}")
        return tuple(_value(part, v, place) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        quoted = f"; in quotes it is a text: '\"{value}\"'" if kind is str else ""
        raise ValueError(
            f"{place}={value!r} must be {kind.__name__}, not {type(value).__name__}{quoted}"
        )
    return value


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
