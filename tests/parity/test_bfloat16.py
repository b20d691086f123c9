"""bfloat16 against transformers' bfloat16 and against our own float32, with tolerances of its own.

A rounding to bfloat16 errs by at most 2^-9 and by about 2^-9 / sqrt(3) in the root mean square. A logit of
two layers passes some 30 of them, and as many rounded parameters: sqrt(60) / sqrt(3) = 4.5 x 2^-9, and
scores of 2 about double what reaches them. Measured over four variants, near and far: 7.2 to 9.3 x 2^-9
from float32, transformers' own 7.6 to 9.8, 6.2 to 8.3 between the two. Gradients pass as many again.
"""

import dataclasses

import numpy as np
import pytest

from tests.parity import twin
from tests.parity.twin import torch

LOGITS = 11 * 2**-9  # |a - b| / |b| over all logits; measured 9.3
LARGEST = 20 * 2**-9  # largest difference as a part of the largest logit; measured 14.8
GRADIENT = 23 * 2**-9  # |a - b| / |b| of each parameter; measured 20

STEMS = ["7b", "llama2_70b", "llama31_8b", "llama32_1b"]


def half(model):
    return dataclasses.replace(model, compute_dtype="bfloat16")


@pytest.mark.parametrize("where", ["NEAR", "FAR"])
@pytest.mark.parametrize("stem", STEMS)
def test_bfloat16_logits_are_near_those_of_transformers_and_near_float32(stem, where, layout):
    model = twin.tiny(stem)
    tokens, positions = twin.row(model, getattr(twin, where))
    exact = twin.ours(*twin.network(model, layout), tokens, positions)
    module, params = twin.network(half(model), layout)
    ours = twin.ours(module, params, tokens, positions)
    their_model = twin.llama(half(model), params)
    assert their_model.lm_head.weight.dtype == torch.bfloat16
    theirs = twin.theirs(their_model, tokens, positions)
    for other in (exact, theirs):
        assert 2**-9 < twin.distance(ours, other) <= LOGITS
        assert twin.gap(ours, other) <= LARGEST
    # No further from float32 than they are, but for chance.
    assert twin.distance(ours, exact) <= 1.1 * twin.distance(theirs, exact)


def test_angles_rounded_to_bfloat16_miss_the_tolerance_tenfold(layout):
    model = half(twin.tiny("llama32_1b"))
    module, params = twin.network(model, layout)
    tokens, positions = twin.row(model, twin.FAR)
    their_model = twin.llama(model, params)
    their_model.model.rotary_emb.to(torch.bfloat16)
    theirs = twin.theirs(their_model, tokens, positions)
    assert twin.distance(twin.ours(module, params, tokens, positions), theirs) > 10 * LOGITS


@pytest.mark.parametrize("stem", ["7b", "llama32_1b"])
def test_bfloat16_gradients_are_near_those_of_transformers_and_near_float32(stem, layout):
    model = twin.tiny(stem)
    rows = twin.packed(model)
    exact, _ = twin.gradients(model, layout, rows)
    ours, theirs = twin.gradients(half(model), layout, rows)
    for other in (exact, theirs):
        apart = {name: twin.distance(ours[name], other[name]) for name in other}
        assert max(apart.values()) <= GRADIENT, apart
        assert np.mean(list(apart.values())) > 2**-9
