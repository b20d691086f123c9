"""How a trained network is used: sampled from, and quantised."""

import dataclasses
import math

from llama_jax.config.rules import check_seed, choose, not_negative, positive, refuse_idle


@dataclasses.dataclass(frozen=True)
class Decode:
    """How a text is continued. Not part of a run: a trained model is decoded in many ways."""

    max_new_tokens: int = 100
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # draw from so many of the likeliest; 0: from all
    top_p: float = 1.0  # draw from the fewest that have this probability together
    min_p: float = 0.0  # draw from those of at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # lowers logits of tokens already in the sequence; 1: none
    seed: int = 0  # RNG seed of sampling
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
        positive(self, "decode", "max_new_tokens", "repetition_penalty", "samples", "rows")
        not_negative(self, "decode", "temperature", "top_k")
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
            refuse_idle(self, "decode", drawn, "decode.temperature=0.0")


@dataclasses.dataclass(frozen=True)
class Quant:
    """How weights are made smaller. Not part of a run: it is done to what a run has made."""

    bits: int = 8  # width of the integers in layers: 8, with one scale a channel, or 4
    group: int = 32  # of 4 bits: values that share a scale, about: a number that divides them
    method: str = "gptq"  # of 4 bits: "gptq" reads a text, "nearest" does not
    rows: int = 128  # calibration sequences of "gptq"
    row_tokens: int = (
        2048  # tokens of a calibration or held-out sequence; at most the context length
    )
    # Of 8 bits: "int16" rounds what they are multiplied with, too. Fast where products of int8 are: on CPUs.
    activations: str = "compute"

    def __post_init__(self):
        positive(self, "quant", "group", "rows", "row_tokens")
        if self.bits not in (8, 4):
            raise ValueError(f"quant.bits={self.bits} must be 8 or 4")
        if self.row_tokens == 1:
            raise ValueError("quant.row_tokens=1 must be 2 or more: the first token is given")
        choose(("gptq", "nearest"), self.method, "quant.method")
        choose(("compute", "int16"), self.activations, "quant.activations")
        if self.bits == 8:
            refuse_idle(self, "quant", ("group", "method", "rows"), "quant.bits=8")
        else:
            refuse_idle(self, "quant", ("activations",), "quant.bits=4")
            if self.method == "nearest":
                refuse_idle(self, "quant", ("rows",), "quant.method='nearest'")

    @property
    def reads_text(self) -> bool:
        return self.bits == 4 and self.method == "gptq"
