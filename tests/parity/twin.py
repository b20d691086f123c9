"""The same network twice: a tiny model of a published page, ours and transformers', with equal weights."""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.convert import names
from llama_jax.data import batch
from llama_jax.model import transformer
from llama_jax.model.context import OneSegment
from llama_jax.train import loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LOGITS = 2e-5  # float32, as a part of the largest logit
GRADIENTS = 1e-4  # float32, |a - b| / |b| of each parameter
LOSS = 1e-4  # nats, at each of fifty steps

NEAR = np.arange(21)
# One row with jumps, so that near and far keys compete: within LLaMA 1's context, around Llama 3's
# 8,192, past the 80,000 where a wrong factor spoils text, at the end of Llama 3.1's context.
FAR = np.array([
    *(0, 1, 2, 700, 2047, 2048, 4095, 8190, 8191, 8192, 8193, 8194, 30_001),
    *(79_999, 80_000, 80_001, 80_002, 100_003, 131_069, 131_070, 131_071),
])  # fmt: skip


class Traits(NamedTuple):
    """What tells the variants apart, as the checkpoints' config.json has it; sizes left out."""

    norm_eps: float
    theta: float
    factor: float  # 1: no rope scaling
    group: int  # query heads a kv head
    head_dim: int
    output: str
    vocab_size: int


VARIANTS = {
    "7b": Traits(1e-6, 1e4, 1, 1, 128, "untied", 32_000),
    "65b": Traits(1e-5, 1e4, 1, 1, 128, "untied", 32_000),
    "llama2_7b": Traits(1e-5, 1e4, 1, 1, 128, "untied", 32_000),
    "llama2_70b": Traits(1e-5, 1e4, 1, 8, 128, "untied", 32_000),
    "llama3_8b": Traits(1e-5, 5e5, 1, 4, 128, "untied", 128_256),
    "llama3_70b": Traits(1e-5, 5e5, 1, 8, 128, "untied", 128_256),
    "llama31_8b": Traits(1e-5, 5e5, 8, 4, 128, "untied", 128_256),
    "llama31_70b": Traits(1e-5, 5e5, 8, 8, 128, "untied", 128_256),
    "llama31_405b": Traits(1e-5, 5e5, 8, 16, 128, "untied", 128_256),
    "llama32_1b": Traits(1e-5, 5e5, 32, 4, 64, "tied", 128_256),
    "llama32_3b": Traits(1e-5, 5e5, 32, 3, 128, "tied", 128_256),
}


def page(stem: str) -> config.Run:
    return config.freeze(importlib.import_module(f"configs.{stem}").get_config())


def traits(model: config.Model) -> Traits:
    return Traits(
        model.norm_eps,
        model.rope.theta,
        model.rope.factor,
        model.heads // model.kv_heads,
        model.head_dim,
        model.output,
        model.vocab_size,
    )


def tiny(stem: str, **changes: Any) -> config.Model:
    """A page's model with small sizes and vocabulary; eps, rope, head width, heads a kv head and tying stay.

    Two kv heads at least, so that swapped ones show.
    """
    model = page(stem).model
    group = model.heads // model.kv_heads
    kv_heads = 3 if group == 1 else 2
    sizes = dict(vocab_size=211, dim=96, layers=2, ffn_dim=112, heads=group * kv_heads)
    how = dict(compute_dtype="float32", remat="none")
    return dataclasses.replace(model, kv_heads=kv_heads, **{**sizes, **how, **changes})


def parameters(module: transformer.Transformer) -> Any:
    """Random weights under which every part shows.

    Embeddings are small enough (0.03, squared 9e-4) for eps to matter, queries and keys large enough
    (scores of about 2) for attention to choose, the last scale makes logits of about 3.
    """
    rng = np.random.default_rng(0)

    def draw(shape, letters):
        if letters in ("D", "LD"):
            scale = rng.uniform(0.5, 1.5, shape.shape)
            return (10 * scale if letters == "D" else scale).astype(np.float32)
        if letters in ("VD", "DV"):
            return rng.normal(scale=0.03, size=shape.shape).astype(np.float32)
        outputs = 2 if letters in ("LDNH", "LDKH") else 1
        gain = 1.5 if outputs == 2 else 1.0
        inputs = np.prod(shape.shape[1:-outputs])
        return rng.normal(scale=gain * inputs**-0.5, size=shape.shape).astype(np.float32)

    return jax.tree.map(draw, transformer.abstract(module), transformer.letters(module))


@functools.cache
def network(model: config.Model, layout) -> tuple[transformer.Transformer, Any]:
    module = transformer.build(model, layout)
    return module, parameters(module)


def ours(module: transformer.Transformer, params: Any, tokens, positions, keys=OneSegment()):
    """float32 logits [B, T, V] as NumPy."""
    return np.asarray(_logits(module, params, jnp.asarray(tokens), jnp.asarray(positions), keys))


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens, positions, keys):
    return transformer.logits(module.apply({"params": params}, tokens, positions, keys))


def llama(model: config.Model, params: Any, attention: str = "eager"):
    """LlamaForCausalLM with our parameters, in the model's compute dtype."""
    scaled = dict(
        rope_type="llama3",
        factor=model.rope.factor,
        low_freq_factor=model.rope.low_freq_factor,
        high_freq_factor=model.rope.high_freq_factor,
        original_max_position_embeddings=model.rope.original_length,
    )
    scaling = dict(rope_type="default") if model.rope.factor == 1 else scaled
    settings = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_theta": model.rope.theta, **scaling},
        max_position_embeddings=131_072,
        tie_word_embeddings=model.output == "tied",
        use_cache=False,
        attn_implementation=attention,
    )
    torch.set_num_threads(1)
    dtype = getattr(torch, model.compute_dtype)
    # Not `.to(dtype)`, which would round the rotary frequencies too.
    twin = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    state = {name: tensor(array) for name, array in names.state_dict(params, model).items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.output == "tied" else [])
    assert not missing or twin.lm_head.weight is twin.model.embed_tokens.weight
    return twin.eval()


def theirs(twin, tokens, positions, mask=None) -> np.ndarray:
    """float32 logits [B, T, V]; mask [B, T] of what is not padding, or as `block_diagonal` makes it.

    Without a mask they would read a jump of the positions as the start of another document.
    """
    mask = np.ones(np.shape(tokens), int) if mask is None else mask
    mask = mask if isinstance(mask, torch.Tensor) else tensor(mask)
    with torch.no_grad():
        out = twin(tensor(tokens), attention_mask=mask, position_ids=tensor(positions))
    return out.logits.float().numpy()


def block_diagonal(segments_BT, twin) -> "torch.Tensor":
    """[B, 1, T, T] to add to scores: 0 for keys of the query's segment up to itself, else the least."""
    T = segments_BT.shape[1]
    visible = np.tril(np.ones((T, T), bool)) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    least = torch.finfo(twin.dtype).min
    return torch.where(tensor(visible), 0.0, least)[:, None].to(twin.dtype)


def tensor(array) -> "torch.Tensor":
    """A copy: torch warns about JAX's read-only memory. Integers as torch wants them."""
    array = np.array(array)
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "i" else array)


def row(model, positions, seed=1):
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (1, len(positions)))
    return tokens, positions[None]


PACKED = np.array([np.repeat([1, 2, 3, 0], [9, 6, 7, 3]), np.repeat([1, 2], [11, 14])])


def packed(model, seed=3):
    """Two rows of documents and padding; targets count fully, in part, or not at all."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, model.vocab_size, PACKED.shape)
    made = batch.from_rows(rows, PACKED, "document", bos=0, eos=1)
    parts = rng.choice([0, 0.25, 1], made.weights_BT.shape).astype(np.float32)
    return made._replace(weights_BT=made.weights_BT * parts)


def their_loss(their_model, rows):
    """Mean cross entropy by weight; every document sees itself alone."""
    mask = block_diagonal(rows.segments_BT, their_model)
    logits = their_model(
        tensor(rows.tokens_BT),
        attention_mask=mask,
        position_ids=tensor(rows.positions_BT),
    ).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tensor(rows.targets_BT).flatten(), reduction="none"
    )
    weights = tensor(rows.weights_BT).flatten()
    return (weights * nll).sum() / weights.sum()


def gradients(model, layout, rows):
    """By transformers' names: ours and theirs, as float32 NumPy."""
    module, params = network(model, layout)
    objective = loss.next_token(module, chunks=3).sums

    def mean(params):
        sums = objective(params, {}, rows)
        return sums.total / sums.weight

    ours = names.state_dict(jax.jit(jax.grad(mean))(params), model)
    their_model = llama(model, params)
    their_loss(their_model, rows).backward()
    theirs = {n: p.grad.float().numpy() for n, p in their_model.named_parameters()}
    assert set(ours) == set(theirs)
    return ours, theirs


def distance(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference as a part of the largest number in b."""
    return float(np.abs(a - b).max() / np.abs(b).max())
