"""The network: what its layers compute and how."""

import dataclasses

from llama_jax.config.aspects import how
from llama_jax.config.rules import choose, divides, not_negative, positive, refuse_idle

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
        positive(self, "model.rope", "theta", "factor", "low_freq_factor", "original_length")
        not_negative(self, "model.rope", "rotary_dim")
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
        refuse_idle(self, "model.rope", idle, why)


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
    placement: str = "pre"  # where a layer has its norms and residuals
    qk_norm: str = "none"  # norm applied to the queries and keys of each head
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
    kernel: str = how("blockwise")
    remat: str = how("none")
    unroll: int = how(1)  # most layer groups in a turn of the scan; see `unrolled`

    def __post_init__(self):
        positive(
            self,
            "model",
            *("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim"),
            *("norm_eps", "init_std", "unroll"),
        )
        divides("model.kv_heads", self.kv_heads, "model.heads", self.heads)
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} must be even: rotary embedding turns pairs; "
                f"try {self.head_dim + 1}"
            )
        if not self.pattern:
            raise ValueError("model.pattern=() must name at least one kind of layer; try ('self',)")
        divides("len(model.pattern)", len(self.pattern), "model.layers", self.layers)
        choose(("untied", "tied"), self.output, "model.output")
        choose(("none", "qkv", "all"), self.bias, "model.bias")
        not_negative(self, "model", "max_positions", "window", "softcap", "mup_base_dim")
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
                refuse_idle(self, "model", (name,), f"model.{field}={chosen!r}")
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
