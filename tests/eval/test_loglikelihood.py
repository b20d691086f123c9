import dataclasses

import jax
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.eval import loglikelihood as scoring
from llama_jax.eval.loglikelihood import Continuation, loglikelihood
from llama_jax.model import transformer
from llama_jax.quant.network import quantise
from tests import parameters

RNG = np.random.default_rng(0)


def network(model, layout):
    module = transformer.build(model, layout)
    return module, parameters.drawn(module, lambda leaf: leaf * 5 if leaf.ndim > 2 else leaf)


def tokens(count, of=41):
    return RNG.integers(0, of, count).tolist()


def questions(number=5, shots=40):
    """Each with choices of 1 to 6 tokens after the same examples, two of them equal in their first tokens."""
    prompt = tokens(shots)
    for i in range(number):
        context = [*prompt, *tokens(5 + 3 * i)]
        choice = tokens(3)
        for more in ([], [7], [*choice, 1], [*choice, 2, 3]):
            yield Continuation(context, [*more, 9 + i])


REQUESTS = [
    *questions(),
    *(Continuation([5], [n]) for n in (1, 2, 1)),  # twice the same, and one token of context
    Continuation(tokens(1), tokens(90)),  # all of a text but its first token
    Continuation(tokens(19), tokens(2)),
]


def expected(module, params, requests):
    """By a pass over each whole row."""
    size = 128
    apply = jax.jit(
        lambda row: transformer.logits(module.apply({"params": params}, row, np.arange(size)[None]))
    )
    for context, continuation in requests:
        row = np.zeros((1, size), np.int32)
        row[0, : len(context) + len(continuation) - 1] = [*context, *continuation[:-1]]
        logits = np.asarray(apply(row)[0], np.float64)[len(context) - 1 :][: len(continuation)]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = log_p[np.arange(len(continuation)), continuation]
        yield chosen, list(logits.argmax(-1)) == list(continuation)


def check(module, params, requests, **options):
    made = list(loglikelihood(module, transformer.unstack(module, params), requests, **options))
    assert sorted(number for number, _ in made) == list(range(len(requests)))
    made = dict(made)
    for number, (wanted, greedy) in enumerate(expected(module, params, requests)):
        np.testing.assert_allclose(made[number].logprobs, wanted, rtol=1e-5, atol=1e-5)
        assert made[number].total == pytest.approx(wanted.sum(), abs=1e-4)
        assert made[number].is_greedy == greedy
    return made


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_values_are_those_of_a_pass_over_each_row(model, layout, rows):
    check(*network(model, layout), REQUESTS, rows=rows)


def test_greedy_continuations_are_told(model, layout):
    """The likeliest token after each context, and a continuation whose second token is not."""
    module, params = network(model, layout)
    contexts = [tokens(20) for _ in range(3)]
    likeliest = []
    for context in contexts:
        row = np.array([context], np.int32)
        hidden = module.apply({"params": params}, row, np.arange(20)[None])
        likeliest.append(int(transformer.logits(hidden)[0, -1].argmax()))
    asked = [Continuation(c, [best]) for c, best in zip(contexts, likeliest, strict=True)]
    asked += [Continuation(c, [best, 0]) for c, best in zip(contexts, likeliest, strict=True)]
    made = check(module, params, asked)
    assert [made[i].is_greedy for i in range(3)] == [True] * 3


@pytest.mark.parametrize("change", [dict(window=6), dict(position="alibi"), dict(output="tied")])
def test_other_networks(model, layout, change):
    check(*network(dataclasses.replace(model, **change), layout), REQUESTS[:12], rows=3)


@pytest.mark.slow  # 10 s, of which quantising is the most
def test_integer_weights(model, layout):
    module, params = network(model, layout)
    check(module, quantise(module, params, config.Quant()), REQUESTS[:12], rows=3)


def test_a_mesh_has_the_numbers_of_one_device():
    model = config.Model(
        vocab_size=44, dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=20,
        compute_dtype="float32",
    )  # fmt: skip
    many = sharding.make(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    check(*network(model, many), REQUESTS[:9], rows=3)


def test_every_shared_token_is_read_once():
    """25 questions with 4 choices in one row: prompt, questions and choices, each once."""
    asked = list(questions(25))
    first, (row,) = scoring.plan(asked, 1)
    read = len(first.tokens) + sum(len(path.tokens) - path.start for path in row)
    inputs = [[*context, *choice[:-1]] for context, choice in asked]
    tree = {tuple(one[:n]) for one in inputs for n in range(1, len(one) + 1)}
    assert read == len(tree) < 1250
    assert sum(len(c) + len(t) - 1 for c, t in asked) > 8000
    _, rows = scoring.plan(asked, 4)
    sizes = [sum(len(path.tokens) - path.start for path in row) for row in rows]
    assert max(sizes) < sum(sizes) / 4 + 84, "no more than the mean and the longest question"
    queries = [query for row in rows for path in row for query in path.queries]
    assert len(queries) == sum(len(one.tokens) for one in asked)


def test_results_come_while_others_are_read(model, layout):
    module, params = network(model, layout)
    made = loglikelihood(module, transformer.unstack(module, params), list(questions(9)), rows=2)
    reads, read = [], scoring._read
    scoring._read = lambda *args: reads.append(1) or read(*args)
    try:
        next(made)
        early = len(reads)
        rest = list(made)
    finally:
        scoring._read = read
    assert len(rest) == 35
    assert early < len(reads) / 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continuation([], [1]), r"requests\[1\] has a context of 0 tokens .* bos"),
        (Continuation([1], []), r"requests\[1\] has a context of 1 tokens and a continuation of 0"),
        (Continuation([1] * 9, [1] * 5), r"the network has 12 positions: .* at most 8 tokens"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused_at_once(model, layout, request_, message):
    model = dataclasses.replace(model, position="learned", max_positions=12)
    module = transformer.build(model, layout)
    with pytest.raises(ValueError, match=message):
        loglikelihood(module, None, [Continuation([1] * 8, [1] * 5), request_])


def test_nothing_asked_is_nothing_done(model, layout):
    assert list(loglikelihood(transformer.build(model, layout), None, [])) == []
