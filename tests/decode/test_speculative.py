import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.decode import speculative
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder
from llama_jax.decode.speculative import Speculative
from llama_jax.model import transformer
from llama_jax.tokenizer import byte
from tests.decode.test_generate import decoder, network, requests


def both(model, layout, decode, proposals=3, **of_draft):
    """And the parameters of both."""
    pairs = [network(one, layout) for one in (model, dataclasses.replace(model, **of_draft))]
    engine = Speculative(*(Engine(module, decode) for module, _ in pairs), proposals)
    return engine, tuple(transformer.unstack(*pair) for pair in pairs)


DRAFTS = {"another": dict(layers=1, ffn_dim=12), "itself": {}}


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_texts_are_those_of_the_target(model, layout, draft):
    decode = config.Decode()
    engine, params = both(model, layout, decode, **DRAFTS[draft])
    one = Decoder(engine, byte.Byte(), (), 3, 128)
    expected = dict(decoder(model, layout, decode).run(requests()))
    made = dict(one.run(params, requests()))
    for number, result in expected.items():
        assert made[number].tokens == result.tokens
        np.testing.assert_allclose(made[number].logprobs, result.logprobs, rtol=1e-4, atol=1e-5)


def test_the_target_as_its_own_draft_has_every_proposal_taken(model, layout):
    engine, params = both(model, layout, config.Decode(temperature=1.0))
    rows = engine.rows(2, 64)
    for row in range(2):
        rows, _ = engine.begin(params, rows, row, [1, 2, 3], jax.random.key(row))
    taken = []
    for _ in range(5):
        rows, said = engine.advance(params, rows)
        taken.append(np.asarray(said.count_B))
    assert np.mean(taken) > 3.9, "of 3 proposals and one more; rounding may refuse one"


def test_acceptance_gives_the_targets_distribution():
    """Of 40,000 rounds with one proposal drawn from q: the token said first is drawn from p, by Pearson's
    chi-square below the 99.9th percentile of 7 degrees; and of q's draws min(1, p/q) stand."""
    random, rounds, V = np.random.default_rng(0), 40_000, 8
    p, q = random.dirichlet(np.ones(V), 2)
    proposed = random.choice(V, size=(rounds, 1), p=q)
    target = np.broadcast_to(np.stack([p, random.dirichlet(np.ones(V))]), (rounds, 2, V))
    draft = np.broadcast_to(q, (rounds, 1, V))
    keys = jax.random.split(jax.random.key(1), (rounds, 2))
    accepted, last = speculative.accept(
        jnp.asarray(proposed), jnp.asarray(draft), jnp.asarray(target), keys
    )
    first = np.where(np.asarray(accepted) > 0, proposed[:, 0], np.asarray(last))
    expected = rounds * p
    counts = np.bincount(first, minlength=V)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
    share = np.minimum(p, q).sum()
    assert abs(np.mean(accepted) - share) < 4 * np.sqrt(share * (1 - share) / rounds)


def test_where_rounding_leaves_nothing_of_the_difference_it_is_the_target():
    """p below q wherever q is not 0: as float32 sums may have it where the two are equal."""
    q = jnp.array([0.0, 0.5, 0.5])
    keys = jax.random.split(jax.random.key(1), (1000, 2))
    accepted, last = speculative.accept(
        jnp.ones((1000, 1), jnp.int32),
        jnp.tile(q, (1000, 1, 1)),
        jnp.tile(q / 2, (1000, 2, 1)),
        keys,
    )
    assert 400 < int((accepted == 0).sum()) < 600
    counts = np.bincount(np.asarray(last), minlength=3)
    assert counts[0] == 0
    assert 400 < counts[1] < 600


def test_texts_have_the_targets_distribution(model, layout):
    """The second and third token after one prompt, of 600 texts: by a chi-square of two samples with those
    of the target alone, rare tokens together."""
    decode = config.Decode(temperature=0.7, top_k=6, rows=30)
    asked = [one._replace(tokens=[5, 6, 7], max_new_tokens=3) for one in requests([b"x"] * 600)]
    engine, params = both(model, layout, decode, **DRAFTS["another"])
    ours = dict(Decoder(engine, byte.Byte(), (), 30, 64).run(params, asked))
    other = [one._replace(seed=11) for one in asked]
    theirs = dict(decoder(model, layout, decode, rows=30, length=64).run(other))
    for place in (1, 2):
        a, b = (np.bincount([r.tokens[place] for r in made.values()], minlength=260)
                for made in (ours, theirs))  # fmt: skip
        often = a + b >= 20
        a, b = (np.append(x[often], x[~often].sum()) for x in (a, b))
        statistic = ((a - b) ** 2 / np.maximum(a + b, 1)).sum()
        freedom = len(a) - 1
        assert freedom >= 5
        assert statistic < freedom + 3.5 * np.sqrt(2 * freedom)


def test_two_vocabularies_and_a_penalty_are_refused(model, layout):
    with pytest.raises(
        ValueError, match="must have the vocabulary of its target: 300 tokens, not 260"
    ):
        both(model, layout, config.Decode(), vocab_size=300)
    with pytest.raises(ValueError, match=r"repetition_penalty=1.5 makes the distribution"):
        both(model, layout, config.Decode(repetition_penalty=1.5))
