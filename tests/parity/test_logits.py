"""Our float32 logits against those of transformers' LlamaForCausalLM, for every published variant."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.data import batch
from llama_jax.model import kernels
from llama_jax.model.context import Segments
from tests.parity import twin

PAGES = sorted(path.stem for path in Path(__file__).parents[2].glob("configs/*[0-9]b.py"))


@pytest.mark.parametrize("stem", twin.VARIANTS)
def test_a_page_has_the_numbers_of_its_checkpoint(stem):
    assert twin.traits(twin.page(stem).model) == twin.VARIANTS[stem]


def test_every_published_page_is_one_of_the_variants():
    published = [stem for stem in PAGES if not stem.startswith("research")]
    assert len(published) >= 14
    for stem in published:
        assert twin.traits(twin.page(stem).model) in twin.VARIANTS.values(), stem


@pytest.mark.parametrize("stem", twin.VARIANTS)
def test_logits_are_those_of_transformers(stem, layout):
    model = twin.tiny(stem)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, twin.NEAR)
    theirs = twin.theirs(twin.llama(model, params), tokens, positions)
    assert np.abs(theirs).max() > 5
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) <= twin.LOGITS


@pytest.mark.parametrize("stem", twin.VARIANTS)
def test_logits_are_those_of_transformers_beyond_8192_and_80000(stem, layout):
    model = twin.tiny(stem)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, twin.FAR)
    theirs = twin.theirs(twin.llama(model, params), tokens, positions)
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) <= twin.LOGITS


@pytest.mark.parametrize("start", [8_180, 80_000, 131_051])
def test_logits_are_those_of_transformers_in_a_row_that_starts_far(start, layout):
    model = twin.tiny("llama32_1b")
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, start + twin.NEAR)
    theirs = twin.theirs(twin.llama(model, params), tokens, positions)
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) <= twin.LOGITS


def test_logits_are_those_of_transformers_over_128256_entries(layout):
    model = twin.tiny("llama3_8b", vocab_size=128_256, dim=32)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, np.arange(9))
    tokens[0, 3:5] = 128_000, 128_255  # the first special token and the last
    theirs = twin.theirs(twin.llama(model, params), tokens, positions)
    assert theirs.shape == (1, 9, 128_256)
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) <= twin.LOGITS


def _with_attention(params, change):
    """Parameters whose q, k, v and o went through `change`."""
    block = params["groups"]["self_0"]
    attention = {**block["attention"], **change(block["attention"])}
    return {**params, "groups": {"self_0": {**block, "attention": attention}}}


def _interleaved(params):
    def meta(array):
        H = array.shape[-1]
        return array[..., np.arange(H).reshape(2, -1).T.ravel()]

    return _with_attention(params, lambda a: {"q": meta(a["q"]), "k": meta(a["k"])})


def _heads_in_turns(params):
    """Query head n with kv head n mod K instead of n // G."""

    def turns(array, axis):
        K = params["groups"]["self_0"]["attention"]["k"].shape[2]
        order = np.arange(array.shape[axis]).reshape(K, -1).T.ravel()
        return np.take(array, order, axis)

    return _with_attention(params, lambda a: {"q": turns(a["q"], 2), "o": turns(a["o"], 1)})


def _change(field, value):
    return lambda model: dataclasses.replace(model, **{field: value})


def _rope(**changes):
    return lambda m: dataclasses.replace(m, rope=dataclasses.replace(m.rope, **changes))


WRONG_NUMBERS = {
    "LLaMA 7B with 65B's eps": ("7b", _change("norm_eps", 1e-5)),
    "LLaMA 65B with 7B's eps": ("65b", _change("norm_eps", 1e-6)),
    "Llama 2 with LLaMA's eps": ("llama2_7b", _change("norm_eps", 1e-6)),
    "Llama 3 with LLaMA's eps": ("llama3_8b", _change("norm_eps", 1e-6)),
    "Llama 3.2 with LLaMA's eps": ("llama32_1b", _change("norm_eps", 1e-6)),
    "Llama 2 with Llama 3's theta": ("llama2_7b", _rope(theta=5e5)),
    "Llama 3 with Llama 2's theta": ("llama3_8b", _rope(theta=1e4)),
    "Llama 3.1 without scaling": ("llama31_8b", _rope(factor=1.0)),
    "Llama 3 with 3.1's scaling": ("llama3_8b", _rope(factor=8.0)),
    "Llama 3.1 with 3.2's factor": ("llama31_8b", _rope(factor=32.0)),
    "Llama 3.2 with 3.1's factor": ("llama32_1b", _rope(factor=8.0)),
    "Llama 3.2 with another original length": ("llama32_1b", _rope(original_length=4096)),
}  # fmt: skip
WRONG_WEIGHTS = {
    "pairs interleaved": ("7b", _interleaved),
    "query heads dealt to kv heads in turns": ("llama2_70b", _heads_in_turns),
}


@pytest.mark.parametrize("wrong", WRONG_NUMBERS)
def test_a_wrong_number_misses_the_bound_fiftyfold(wrong, layout):
    stem, change = WRONG_NUMBERS[wrong]
    model = twin.tiny(stem)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, twin.FAR)
    theirs = twin.theirs(twin.llama(change(model), params), tokens, positions)
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) > 50 * twin.LOGITS


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_wrongly_ordered_weights_miss_the_bound_fiftyfold(wrong, layout):
    stem, change = WRONG_WEIGHTS[wrong]
    model = twin.tiny(stem)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, twin.NEAR)
    theirs = twin.theirs(twin.llama(model, params), tokens, positions)
    assert twin.gap(twin.ours(module, change(params), tokens, positions), theirs) > 50 * twin.LOGITS


def stored(model, segments, seed=2):
    """The batch of one stored row: its segment of every token, 0 for padding."""
    rows = np.random.default_rng(seed).integers(0, model.vocab_size, (1, len(segments)))
    return batch.from_rows(rows, np.asarray(segments)[None], "document", bos=0, eos=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "padding", [np.repeat([0, 1], [5, 11]), np.repeat([1, 0], [11, 5])], ids=["left", "right"]
)
@pytest.mark.parametrize("stem", ["7b", "llama2_70b", "llama32_1b"])
def test_padding_beside_a_longer_row_gives_the_logits_of_transformers(
    stem, padding, attention, layout
):
    """Theirs: attention_mask, and positions counted along it as their generation does."""
    model = twin.tiny(stem)
    module, params = twin.network(model, layout)
    whole = stored(model, np.ones(16, int), seed=3)
    padded = stored(model, padding)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), whole, padded)
    real = both.segments_BT > 0
    their_positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    their_model = twin.llama(model, params, attention)
    theirs = twin.theirs(their_model, both.tokens_BT, their_positions, real.astype(int))
    logits = twin.ours(
        module, params, both.tokens_BT, both.positions_BT, Segments(both.segments_BT)
    )
    assert real.sum() < real.size
    assert np.isfinite(logits).all()
    assert twin.gap(logits[real], theirs[real]) <= twin.LOGITS


# The third document lies across the end of the first block of queries.
PACKED = np.repeat([1, 2, 3, 4, 0], [50, 7, 85, 9, 6])


def packed_both(model, layout):
    """The packed batch, and their logits under a block-diagonal mask with positions restarted."""
    packed = stored(model, PACKED)
    their_model = twin.llama(model, twin.network(model, layout)[1])
    mask = twin.block_diagonal(packed.segments_BT, their_model)
    return packed, twin.theirs(their_model, packed.tokens_BT, packed.positions_BT, mask)


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
@pytest.mark.parametrize("stem", ["65b", "llama31_8b", "llama32_3b"])
def test_packed_documents_have_the_logits_of_transformers_with_a_block_diagonal_mask(
    stem, kernel, layout
):
    model = twin.tiny(stem, kernel=kernel)
    module, params = twin.network(model, layout)
    packed, theirs = packed_both(model, layout)
    assert packed.tokens_BT.shape[1] > kernels.BLOCK
    logits = twin.ours(
        module, params, packed.tokens_BT, packed.positions_BT, Segments(packed.segments_BT)
    )
    assert twin.gap(logits, theirs) <= twin.LOGITS


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_packed_documents_have_the_logits_of_transformers_on_each_alone(kernel, layout):
    model = twin.tiny("llama3_8b", kernel=kernel)
    module, params = twin.network(model, layout)
    packed = stored(model, PACKED)
    logits = twin.ours(
        module, params, packed.tokens_BT, packed.positions_BT, Segments(packed.segments_BT)
    )
    their_model = twin.llama(model, params)
    for segment in (1, 2, 3, 4):
        own = packed.segments_BT[0] == segment
        alone = packed.tokens_BT[:, own]
        theirs = twin.theirs(their_model, alone, np.arange(alone.shape[1])[None])
        assert twin.gap(logits[:, own], theirs) <= twin.LOGITS


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_a_row_longer_than_a_block_has_the_logits_of_transformers(kernel, layout):
    model = twin.tiny("llama2_70b", kernel=kernel)
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, np.arange(2 * kernels.BLOCK + 5))
    theirs = twin.theirs(twin.llama(model, params, "sdpa"), tokens, positions)
    assert twin.gap(twin.ours(module, params, tokens, positions), theirs) <= twin.LOGITS


@pytest.mark.parametrize("wrong", ["segments ignored", "a position skipped", "a document split"])
def test_wrong_packing_misses_the_bound_fiftyfold(wrong, layout):
    model = twin.tiny("llama31_8b")
    module, params = twin.network(model, layout)
    packed, theirs = packed_both(model, layout)
    positions, segments = packed.positions_BT, packed.segments_BT.copy()
    if wrong == "segments ignored":
        segments = np.ones_like(segments)
    elif wrong == "a document split":
        segments[:, 100:142] = 5
    else:
        # Inside the third document; a shift of a whole one turns queries and keys alike.
        positions = np.where(np.arange(positions.shape[1]) >= 100, positions + 1, positions)
    logits = twin.ours(module, params, packed.tokens_BT, positions, Segments(segments))
    assert twin.gap(logits, theirs) > 50 * twin.LOGITS
