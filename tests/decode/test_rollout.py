"""Decoding that a training loop calls: it borrows parameters, which change each iteration."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.decode import engine as engines
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.decode.speculative import Speculative
from llama_jax.model import logprobs, transformer
from llama_jax.tokenizer import byte
from tests.decode.test_generate import network

TEMPERATURE, LENGTH = 0.7, 56
ENDS = frozenset(range(0, 260, 20))  # 13 tokens of 260: about half of the sequences meet one
PROMPTS = [list(b"a shared beginning of prompts: one"), list(b"a shared beginning of prompts, two")]


def asked(seed):
    """Three samples of each prompt."""
    return [Request(p, 13, seed, (i, j)) for i, p in enumerate(PROMPTS) for j in range(3)]


def full_pass(module):
    """Of sequences of at most LENGTH tokens: log-probabilities of all but the first, by one forward pass."""

    @jax.jit
    def of(params, tokens_BU):
        inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
        positions_BT = jnp.broadcast_to(jnp.arange(LENGTH - 1), inputs_BT.shape)
        hidden = module.apply({"params": params}, inputs_BT, positions_BT)
        return [
            logprobs.token_logprobs(hidden, targets_BT, module.layout, at)
            for at in (1, TEMPERATURE)
        ]

    return of


def check(of, params, requests, made) -> int:
    """The number of end tokens among them."""
    sequences = [
        [*requests[i].tokens, *made[i].tokens, *made[i].last] for i in range(len(requests))
    ]
    filled = np.array([[*one, *[0] * (LENGTH - len(one))] for one in sequences])
    own_BT, tempered_BT = (np.asarray(x) for x in of(params, filled))
    for i, (request, whole) in enumerate(zip(requests, sequences, strict=True)):
        new = slice(len(request.tokens) - 1, len(whole) - 1)
        np.testing.assert_allclose(made[i].logprobs, own_BT[i, new], atol=1e-5)
        np.testing.assert_allclose(made[i].tempered, tempered_BT[i, new], atol=1e-5)
        assert (made[i].end == "stop") == (whole[-1] in ENDS)
    return sum(len(made[i].last) for i in made)


def test_new_parameters_and_seeds_compile_nothing_and_agree_with_a_full_pass(model, layout, caplog):
    module, params = network(model, layout)
    of = full_pass(module)
    engine = Engine(module, config.Decode(temperature=TEMPERATURE))
    decoder = Decoder(engine, byte.Byte(), ENDS, 4, LENGTH)
    ended, compiled = 0, []
    for iteration in range(4):
        requests, caplog.handler.records[:] = asked(iteration), []
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            made = dict(decoder.run(transformer.unstack(module, params), requests))
        compiled.append(sum(one.getMessage().startswith("Compiling") for one in caplog.records))
        ended += check(of, params, requests, made)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
        params = jax.tree.map(lambda w: w * 1.1, params)  # as an optimiser would: other arrays
    assert compiled[1:] == [0, 0, 0]
    assert compiled[0] > 3
    assert 4 < ended < 20, "both kinds of ends"


def test_a_draft_borrows_and_agrees_too(model, layout):
    module, params = network(model, layout)
    decode = config.Decode(temperature=TEMPERATURE)
    engine = Speculative(Engine(module, decode), Engine(module, decode), 2)
    decoder = Decoder(engine, byte.Byte(), ENDS, 4, LENGTH)
    loose = transformer.unstack(module, params)
    draft = jax.tree.map(lambda w: w * 0.9, loose)
    requests = asked(0)
    check(full_pass(module), params, requests, dict(decoder.run((loose, draft), requests)))


def test_greedy_tokens_are_certain_at_their_temperature(model, layout):
    module, params = network(model, layout)
    decoder = Decoder(Engine(module, config.Decode()), byte.Byte(), (), 2, LENGTH)
    ((_, result),) = decoder.run(transformer.unstack(module, params), asked(0)[:1])
    assert result.tempered == [0.0] * 13
    assert max(result.logprobs) < -0.1


def test_settings_that_sampling_does_not_read_compile_nothing(model, layout):
    module, params = network(model, layout)
    loose = transformer.unstack(module, params)
    engines.advance.clear_cache()
    for more in (
        dict(seed=1),
        dict(seed=2),
        dict(stop=("x",)),
        dict(max_new_tokens=5),
        dict(samples=3),
    ):
        decode = config.Decode(temperature=TEMPERATURE, **more)
        list(Decoder(Engine(module, decode), byte.Byte(), (), 4, LENGTH).run(loose, asked(0)[:1]))
    assert engines.advance._cache_size() == 1


def test_samples_of_a_prompt_share_it_and_prompts_their_beginning(model, layout, monkeypatch):
    """Of 6 x 49 tokens 29 + 2 x 19 + 6 go through the network; and each result is what it is alone."""
    module, params = network(model, layout)
    loose = transformer.unstack(module, params)
    make = lambda: Decoder(
        Engine(module, config.Decode(temperature=1.0)), byte.Byte(), (), 6, LENGTH
    )
    prompts = [[*p, *b" and a question"] for p in PROMPTS]
    requests = [Request(p, 1, 3, (i, j)) for i, p in enumerate(prompts) for j in range(3)]
    alone = [dict(make().run(loose, [one]))[0] for one in requests]
    lengths, begin = [], engines.begin
    monkeypatch.setattr(engines, "begin", lambda *args: lengths.append(args[6]) or begin(*args))
    made = dict(make().run(loose, requests))
    shared, size = 29, len(prompts[0])
    assert lengths == [shared, size - 1 - shared, 1, 1, 1, size - 1 - shared, 1, 1, 1]
    for i, result in made.items():
        assert result.tokens == alone[i].tokens
        np.testing.assert_allclose(result.logprobs, alone[i].logprobs, atol=1e-5)


def test_bits_do_not_depend_on_the_order_of_requests(model, layout):
    """Nested shared prefixes, a prompt twice, and half as many rows as requests."""
    module, params = network(model, layout)
    loose = transformer.unstack(module, params)
    few = list(b"question and answer, three shots of it. ")
    prompts = [few[:20], few, [*few, 7, 8], [*few, *few], [*few, *few, 9], [*few, *few, 9]]
    requests = [Request(p, 5 + i, 3, (i, 0)) for i, p in enumerate(prompts)]
    make = lambda: Decoder(Engine(module, config.Decode(temperature=1.0)), byte.Byte(), (), 3, 128)
    first = dict(make().run(loose, requests))
    order = np.random.default_rng(0).permutation(len(requests))
    again = dict(make().run(loose, [requests[i] for i in order]))
    assert [again[list(order).index(i)] for i in range(len(requests))] == [
        first[i] for i in range(len(requests))
    ]


def test_a_prompt_beyond_the_cache_is_refused_by_the_engine(model, layout):
    module, params = network(model, layout)
    engine, loose = Engine(module, config.Decode()), transformer.unstack(module, params)
    message = (
        r"row 1: a prompt of 129 tokens needs as many cache slots, but there are 128; make rows"
    )
    with pytest.raises(ValueError, match=message):
        engine.begin(loose, engine.rows(2, LENGTH), 1, [5] * 129, jax.random.key(0))
