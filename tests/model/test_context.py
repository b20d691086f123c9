"""A kind of block is entries of tables: one that reads a memory is trained, decoded, counted and named."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding, tree
from llama_jax.analysis import flops, memory
from llama_jax.convert import names
from llama_jax.data import iterator
from llama_jax.data.batch import Batch
from llama_jax.model import cache, transformer
from llama_jax.model.context import Cached, CachedMemory, Memory, NoMemory, OneSegment, Segments
from llama_jax.model.position import frequencies
from llama_jax.train import loss, program
from llama_jax.train import state as train_state
from llama_jax.train.objective import Sums
from tests import oracle, parameters
from tests.model import cross

B, T, M = 16, 10, cross.STATES
MODEL = config.Model(
    vocab_size=44, dim=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_dim=20, norm_eps=1e-3,
    pattern=("self", "cross", "self"), compute_dtype="float32",
)  # fmt: skip
RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(0, MODEL.vocab_size, (2, B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
STATES_BMD = RNG.normal(size=(B, M, MODEL.dim)).astype(np.float32)
# Row b sees the first 1 + b % M states, from its token b % 4 on.
VISIBLE = (np.arange(T)[:, None] >= np.arange(B)[:, None, None] % 4) & (
    np.arange(M) <= np.arange(B)[:, None, None] % M
)
MEMORY = Memory(STATES_BMD, VISIBLE)
MANY = config.Mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    cross.register(monkeypatch)


def network(layout, model=MODEL):
    """Parameters large enough for every part to matter."""
    module = transformer.build(model, layout)

    def stronger(leaf):
        wave = 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
        return leaf * 8 if leaf.ndim > 2 else leaf + wave

    return module, parameters.drawn(module, stronger)


def on(devices: str, layout):
    return layout if devices == "one" else sharding.make(MANY, jax.devices())


def expected_logits(params, row: int, states_MD=None):
    """[T, V] of one row in float64: the layers one after another, heads and queries in loops."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    group, states_MD = params["groups"], STATES_BMD[row] if states_MD is None else states_MD
    angles = frequencies(MODEL.head_dim, MODEL.rope)
    x = params["embed"][TOKENS[row]]
    for kind in ("self_0", "cross_1", "self_2"):
        layer = jax.tree.map(lambda leaf: leaf[0], group[kind])
        part = layer["attention" if kind.startswith("self") else "cross_attention"]
        h = oracle.rms_norm(x, layer["attention_norm"]["scale"], MODEL.norm_eps)
        sees_T1 = np.ones((T, 1))
        if kind.startswith("self"):
            q, k, v = (np.tensordot(h, part[name], 1) for name in "qkv")
            for t in range(T):
                for heads in (q, k):
                    for n in range(heads.shape[1]):
                        heads[t, n] = oracle.rotate(heads[t, n], t, angles)
            out = oracle.attention(q, k, v, np.ones(T))
        else:
            sees_T1 = VISIBLE[row].any(-1, keepdims=True)
            q = np.tensordot(h, part["q"], 1)
            k, v = (np.tensordot(states_MD, part[name], 1) for name in "kv")
            out = np.zeros_like(q)
            for t in np.flatnonzero(sees_T1):
                seen = np.flatnonzero(VISIBLE[row, t])
                for n in range(MODEL.heads):
                    of = n // (MODEL.heads // MODEL.kv_heads)
                    weights = np.exp(k[seen, of] @ q[t, n] / np.sqrt(MODEL.head_dim))
                    out[t, n] = weights @ v[seen, of] / weights.sum()
        x = x + sees_T1 * np.tensordot(out, part["o"], 2)
        h = oracle.rms_norm(x, layer["ffn_norm"]["scale"], MODEL.norm_eps)
        ffn = layer["ffn"]
        x = x + sees_T1 * ((oracle.silu(h @ ffn["gate"]) * (h @ ffn["up"])) @ ffn["down"])
    return oracle.rms_norm(x, params["norm"]["scale"], MODEL.norm_eps) @ params["output"]


def whole(module, params, memory=MEMORY):
    """Logits of whole sequences, [B, T, V]."""
    apply = lambda params, memory: transformer.logits(
        module.apply({"params": params}, TOKENS, POSITIONS, OneSegment(), memory)
    )
    return np.asarray(jax.jit(apply)(params, memory))


def test_logits_are_those_of_the_float64_oracle(layout):
    module, params = network(layout)
    ours = whole(module, params)
    for row in (0, 3, 6, 9):
        expected = expected_logits(params, row)
        np.testing.assert_allclose(ours[row], expected, atol=2e-5 * np.abs(expected).max())


def test_without_a_memory_the_other_layers_are_the_network(layout):
    module, params = network(layout)
    groups = {"self_0": params["groups"]["self_0"], "self_1": params["groups"]["self_2"]}
    plain = transformer.build(
        dataclasses.replace(MODEL, layers=2, pattern=("self", "self")), layout
    )
    expected = whole(plain, {**params, "groups": groups})
    ours = whole(module, params, NoMemory())
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(whole(module, params) - ours).max() > 0.1, "the memory is read"


class Pictured(NamedTuple):
    """A batch of text with a memory for each sequence."""

    text: Batch
    memory: Memory


BATCH = Pictured(
    Batch(TOKENS, TARGETS, np.ones((B, T), np.float32), POSITIONS, np.ones((B, T), np.int32)),
    MEMORY,
)


def next_token(run: config.Run, module):
    """Pretraining's loss of a batch with a memory."""
    layout, pretraining = module.layout, loss.pretraining(run, module)

    def sums(params, frozen, batch: Pictured) -> Sums:
        text = batch.text
        keys = Segments(text.segments_BT)
        hidden = module.apply(
            {"params": params}, text.tokens_BT, text.positions_BT, keys, batch.memory
        )
        total, _ = loss.cross_entropy(hidden, text.targets_BT, text.weights_BT, layout)
        return Sums(total, jnp.sum(text.weights_BT), {})

    def abstract(run, layout) -> Pictured:
        of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch("B"))
        return Pictured(iterator.abstract(run, layout), jax.tree.map(of, MEMORY))

    tokens = lambda batch: jnp.sum(batch.text.weights_BT)
    return pretraining._replace(sums=sums, tokens=tokens, batch=abstract)


def test_a_step_trains_every_parameter_on_the_mean_of_the_oracles_loss(layout):
    """Two microbatches on eight devices, recomputed: the memory is split and sharded with its rows."""
    run = config.Run(
        model=dataclasses.replace(MODEL, remat="full"),
        data=config.Data(seq_len=T),
        optim=config.Optim(warmup_steps=0, learning_rate=1e-3),
        train=config.Train(batch_size=B, microbatches=2, steps=100),
    )
    built = program.build(run, on("eight", layout), next_token)
    _, params = network(layout)
    place = lambda x, of: jax.device_put(np.array(x), of.sharding)
    began = train_state.begin(
        built.objective,
        built.tx,
        built.module.layout,
        jax.tree.map(place, params, built.state.params),
    )
    trained, metrics = built.step(began, {}, jax.tree.map(place, BATCH, built.batch))
    nats = [oracle.cross_entropy(expected_logits(params, b), TARGETS[b]).mean() for b in range(B)]
    assert float(metrics.loss) == pytest.approx(np.mean(nats), rel=1e-5)
    after = tree.paths(trained.params)
    for name, before in tree.paths(params).items():
        assert np.abs(np.asarray(after[name]) - before).mean() > 1e-4, f"{name} is not trained"


def test_the_gradient_of_the_memory_is_the_slope_of_the_oracle(layout):
    """As training a projector in front of it needs. By central differences, in a direction of one row."""
    module, params = network(layout)
    row, weight = 7, RNG.normal(size=(T, MODEL.vocab_size))

    def ours(states_BMD):
        hidden = module.apply(
            {"params": params}, TOKENS, POSITIONS, OneSegment(), Memory(states_BMD, VISIBLE)
        )
        return jnp.sum(transformer.logits(hidden)[row] * weight)

    gradient = np.asarray(jax.jit(jax.grad(ours))(STATES_BMD), np.float64)
    direction = gradient[row] * RNG.uniform(size=gradient[row].shape)
    at = lambda sign: np.sum(
        expected_logits(params, row, STATES_BMD[row] + sign * 1e-5 * direction) * weight
    )
    slope = (at(1) - at(-1)) / 2e-5
    assert np.vdot(gradient[row], direction) == pytest.approx(slope, rel=1e-4)
    hidden_from_row = gradient[row, row % M + 1 :]
    assert hidden_from_row.size > 0
    assert not hidden_from_row.any()


@pytest.mark.parametrize(
    ("devices", "dtype", "bound"), [("one", "float32", 1e-5), ("eight", "float32", 1e-5), ("eight", "int8", 3e-2)]
)  # fmt: skip
def test_token_by_token_the_logits_are_those_of_the_whole(devices, dtype, bound, layout):
    """Keys and values of the memory are computed with the first tokens; the calls after have none of its states."""
    expected = whole(*network(layout))
    module, params = network(on(devices, layout))
    loose, params = transformer.unstacked(module), transformer.unstack(module, params)

    @jax.jit
    def extend(held, tokens_BT, positions_BT, memory):
        keys = Cached(jnp.ones(tokens_BT.shape, bool))
        hidden, changed = loose.apply(
            {"params": params, cache.CACHE: held}, tokens_BT, positions_BT, keys, memory,
            mutable=[cache.CACHE],
        )  # fmt: skip
        return transformer.logits(hidden), cache.placed(loose, changed[cache.CACHE])

    held = cache.empty(loose, dtype, B=B, S=T + 3, M=M)
    began = held
    assert cache.slots(loose, held) == T + 3
    found, start = [], 0
    for stop in (4, *range(5, T + 1)):
        at = slice(start, stop)
        memory = CachedMemory(VISIBLE[:, at]) if start else Memory(STATES_BMD, VISIBLE[:, at])
        logits, held = extend(held, TOKENS[:, at], POSITIONS[:, at], memory)
        found.append(np.asarray(logits))
        start = stop
    error = np.abs(np.concatenate(found, axis=1) - expected).max()
    assert error < bound * np.abs(expected).max()
    for before, after in zip(jax.tree.leaves(began), jax.tree.leaves(held), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)


def test_one_sequence_without_rows_has_the_logits_of_the_whole(layout):
    module, params = network(layout)
    expected = whole(module, params)[:1]
    loose, params = transformer.unstacked(module), transformer.unstack(module, params)
    held = cache.without_rows(cache.empty(loose, "float32", B=1, S=T, M=M))
    assert cache.slots(loose, held) == T
    for t in range(3):
        at = (slice(0, 1), slice(t, t + 1))
        memory = CachedMemory(VISIBLE[at]) if t else Memory(STATES_BMD[:1], VISIBLE[at])
        hidden, changed = loose.apply(
            {"params": params, cache.CACHE: held}, TOKENS[at], POSITIONS[at],
            Cached(np.ones((1, 1), bool)), memory, mutable=[cache.CACHE],
        )  # fmt: skip
        held = changed[cache.CACHE]
        error = np.abs(transformer.logits(hidden)[:, 0] - expected[:, t]).max()
        assert error < 1e-5 * np.abs(expected).max()


def test_a_cache_has_what_each_block_of_the_pattern_caches(layout):
    loose = transformer.unstacked(transformer.build(MODEL, layout))
    shapes = {
        name: (leaf.shape, leaf.dtype.name)
        for name, leaf in tree.paths(cache.abstract(loose, "int8", B=3, S=7, M=M)).items()
    }
    wanted = {}
    for block, k in (("self_0/attention", (3, 2, 8, 7)), ("self_2/attention", (3, 2, 8, 7))):
        wanted |= {f"{block}/k": (k, "int8"), f"{block}/v": ((3, 2, 7, 8), "int8")}
        wanted |= {f"{block}/{name}_scale": ((3, 2, 7), "float32") for name in "kv"}
    for name in "kv":
        wanted[f"cross_1/cross_attention/{name}"] = ((3, 2, M, 8), "int8")
        wanted[f"cross_1/cross_attention/{name}_scale"] = ((3, 2, M), "float32")
    assert shapes == {f"group_0/{name}": of for name, of in wanted.items()}
    with pytest.raises(ValueError, match=r"pattern=.* needs a size of M \(states of a memory\)"):
        cache.empty(loose, "float32", B=3, S=7)


def test_flops_of_the_block_are_the_products_that_it_adds_to_a_program(layout):
    """Forward and backward of weights and memory, traced with and without the block."""

    def executed(pattern) -> float:
        model = dataclasses.replace(MODEL, layers=len(pattern), pattern=pattern)
        module = transformer.build(model, layout)

        def total(params, states_BMD):
            memory = Memory(states_BMD, VISIBLE)
            hidden = module.apply({"params": params}, TOKENS, POSITIONS, OneSegment(), memory)
            return jnp.sum(hidden.x_BTD)

        both = jax.make_jaxpr(jax.grad(total, (0, 1)))(transformer.abstract(module), STATES_BMD)
        per_token = flops.per_token(module, T)
        return flops.executed(both.jaxpr).total, B * T * per_token

    with_it, without = executed(MODEL.pattern), executed(("self", "self"))
    assert with_it[0] - without[0] == pytest.approx(with_it[1] - without[1], rel=1e-9)


def test_memory_counts_what_each_kind_of_block_stores():
    two = memory.stored(dataclasses.replace(MODEL, layers=2, pattern=("self", "self")))
    assert memory.stored(MODEL) == two + 5 * 24 + 2 * 4 * 8 + 3 * 20


def test_weights_have_the_names_of_their_kind_of_block_and_come_back(layout):
    """As in checkpoints of Llama 3.2 Vision, Hugging Face numbers all layers, Meta those of each kind."""
    model = dataclasses.replace(MODEL, layers=6)
    module, params = network(layout, model)
    state = names.state_dict(params, model)
    k_DKH = np.asarray(params["groups"]["cross_1"]["cross_attention"]["k"])[1]
    np.testing.assert_array_equal(
        state["model.layers.4.cross_attn.k_proj.weight"], k_DKH.reshape(24, -1).T
    )
    q_DNH = np.asarray(params["groups"]["self_2"]["attention"]["q"])[0]
    np.testing.assert_array_equal(
        state["model.layers.2.self_attn.q_proj.weight"], q_DNH.reshape(24, -1).T
    )
    meta = {unit.hf: unit.meta for unit in names.units(model)}
    assert meta["model.layers.4.cross_attn.k_proj.weight"] == (
        "cross_attention_layers.1.attention.wk.weight"
    )
    assert meta["model.layers.2.self_attn.q_proj.weight"] == "layers.1.attention.wq.weight"
    assert len(state) == len(meta) == 6 * 9 + 3
    letters = tree.paths(transformer.letters(module))
    rows = {u.path: ("L" if u.group >= 0 else "") + u.row.letters for u in names.units(model)}
    assert rows == letters
    back = tree.paths(names.from_state_dict(state, model))
    for name, leaf in tree.paths(params).items():
        np.testing.assert_array_equal(back[name], leaf)


def test_a_kind_of_block_without_names_is_refused(monkeypatch):
    monkeypatch.delitem(names.ROWS, "cross")
    with pytest.raises(ValueError, match=r"model.pattern='cross' is not one of self"):
        names.units(MODEL)
