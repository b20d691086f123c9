import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.decode import engine as engines
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.model import transformer
from llama_jax.tokenizer import byte
from tests import parameters

PROMPTS = [b"The quick", b"jumps over the lazy dog and on", b"x", b"The quicker", b"abc" * 8]
DRAWN = config.Decode(temperature=0.8, seed=3, rows=3)


def network(model, layout):
    module = transformer.build(model, layout)
    return module, parameters.drawn(module, lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf)


class Bound(Decoder):
    """With the parameters of `network`."""

    def run(self, *args, **named):
        return super().run(self.params, *args, **named)


def decoder(model, layout, decode=DRAWN, rows=3, length=128, ends=()):
    module, params = network(model, layout)
    made = Bound(Engine(module, decode), byte.Byte(), ends, rows, length)
    made.params = transformer.unstack(module, params)
    return made


def requests(prompts=PROMPTS, new=20, seed=3):
    return [Request(list(text), new, seed, (i, 0)) for i, text in enumerate(prompts)]


def test_greedy_takes_the_likeliest_token_of_the_text_so_far(model, layout):
    ours = dict(decoder(model, layout, config.Decode(), rows=1).run(requests(new=4)))
    module, params = network(model, layout)
    places = jnp.arange(48)[None]
    whole = jax.jit(lambda tokens: module.apply({"params": params}, tokens, places))
    for number, prompt in enumerate(PROMPTS):
        text, logprobs = list(prompt), []
        for _ in range(4):
            filled = jnp.asarray([text + [0] * (48 - len(text))])  # what comes after is not seen
            log_p = jax.nn.log_softmax(transformer.logits(whole(filled))[0, len(text) - 1])
            text.append(int(log_p.argmax()))
            logprobs.append(float(log_p.max()))
        assert ours[number].tokens == text[len(prompt) :]
        np.testing.assert_allclose(ours[number].logprobs, logprobs, rtol=1e-4)
        assert ours[number].end == "length"


def test_a_text_does_not_depend_on_rows_neighbours_or_order(model, layout):
    """Every bit of it: tokens and their log probabilities."""
    every = dict(decoder(model, layout).run(requests()))
    assert len({tuple(result.tokens) for result in every.values()}) == 5
    for rows in (1, 2, 5):
        other = dict(decoder(model, layout, rows=rows).run(requests()))
        for number, result in every.items():
            assert other[number].tokens == result.tokens
    asked = requests()
    turned = dict(decoder(model, layout).run(asked[::-1]))
    for number, result in every.items():
        assert turned[4 - number] == result, "the same bits in another row beside others"


def test_seeds_and_samples_differ(model, layout):
    asked = [Request(list(b"abc"), 20, 3, (0, i)) for i in range(4)]
    asked.append(Request(list(b"abc"), 20, 4, (0, 0)))
    made = dict(decoder(model, layout).run(asked))
    assert len({tuple(result.tokens) for result in made.values()}) == 5


def test_what_prompts_share_goes_through_the_network_once(model, layout, monkeypatch):
    """And the texts are those of prompts by themselves."""
    shared = b"a long beginning that all of the prompts have, "
    prompts = [shared + text for text in (b"one", b"two and more", b"three", b"four")]
    alone = {
        i: dict(decoder(model, layout).run([one]))[0] for i, one in enumerate(requests(prompts))
    }
    lengths = []
    begin = engines.begin
    monkeypatch.setattr(engines, "begin", lambda *args: lengths.append(args[6]) or begin(*args))
    made = dict(decoder(model, layout).run(requests(prompts)))
    assert lengths == [len(shared), *(len(p) - len(shared) for p in prompts)]
    for number, result in made.items():
        assert result.tokens == alone[number].tokens
        np.testing.assert_allclose(result.logprobs, alone[number].logprobs, rtol=1e-4, atol=1e-5)


def test_a_conversation_goes_on_where_it_was(model, layout, monkeypatch):
    lengths = []
    begin = engines.begin
    monkeypatch.setattr(engines, "begin", lambda *args: lengths.append(args[6]) or begin(*args))
    one = decoder(model, layout, rows=1)
    ((_, first),) = one.run([Request(list(b"hello world"), 12)])
    second = [*b"hello world", *first.tokens, *b" and"]
    ((_, again),) = one.run([Request(second, 12)])
    assert lengths == [11, 1 + 4], "the last token had not gone through"
    ((_, fresh),) = decoder(model, layout, rows=1).run([Request(second, 12)])
    assert again.tokens == fresh.tokens


def test_parts_of_texts_are_heard_as_they_come(model, layout):
    heard = {}
    made = dict(
        decoder(model, layout).run(
            requests(), lambda number, text: heard.setdefault(number, []).append(text)
        )
    )
    for number, result in made.items():
        assert "".join(heard[number]) == result.text
        assert len(heard[number]) > 3


def test_end_tokens_end_and_rows_are_taken_over(model, layout):
    plain = dict(decoder(model, layout).run(requests()))
    ends = {result.tokens[7] for result in plain.values()}
    made = dict(decoder(model, layout, ends=ends, rows=2).run(requests()))
    for number, result in made.items():
        whole = plain[number].tokens
        first = next(i for i, token in enumerate(whole) if token in ends)
        assert result.tokens == whole[:first]
        assert (result.end, result.last) == ("stop", [whole[first]])


def test_stopped_it_gives_what_there_is(model, layout):
    looks = iter(range(100))
    made = dict(decoder(model, layout).run(requests(new=50), stopped=lambda: next(looks) > 2))
    assert 0 < len(made) <= 3
    for result in made.values():
        assert result.end == "interrupted"
        assert 0 < len(result.tokens) < 50


SHARED = [b"a beginning that all prompts share, " + text for text in (b"one", b"two", b"three")]


def same(ours, fresh):
    for number, result in fresh.items():
        assert ours[number].tokens == result.tokens
        np.testing.assert_allclose(ours[number].logprobs, result.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["stopped", "abandoned", "raised"])
def test_what_was_broken_off_leaves_no_trace(model, layout, how):
    """Rows that nobody ends go on, and come round to the beginning of what they hold."""
    one, fresh = decoder(model, layout, rows=2), decoder(model, layout, rows=2)
    looks = iter(range(10_000))
    asked = requests([*SHARED, *PROMPTS], new=20)
    if how == "stopped":  # with requests waiting for the rows of those that have ended
        list(one.run(asked, stopped=lambda: next(looks) > 11))
    elif how == "abandoned":
        next(one.run(asked))
    else:

        def listen(number, text):
            if next(looks) == 30:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(one.run(asked, listen))
    assert (np.asarray(one.rows.position_B) == -1).all()
    for _ in range(2):
        list(one.run(requests([b"another text"], new=100)))
    same(dict(one.run(requests(SHARED))), dict(fresh.run(requests(SHARED))))


def test_a_call_that_was_broken_off_is_made_good(model, layout, monkeypatch):
    """Its rows were given up to a program."""
    one = decoder(model, layout, rows=2)
    with monkeypatch.context() as patched:
        take = engines.advance

        def broken(*args):
            take(*args)
            raise KeyboardInterrupt

        patched.setattr(engines, "advance", broken)
        with pytest.raises(KeyboardInterrupt):
            list(one.run(requests(SHARED)))
    fresh = decoder(model, layout, rows=2)
    same(dict(one.run(requests(SHARED))), dict(fresh.run(requests(SHARED))))


def test_other_parameters_begin_with_empty_caches(model, layout):
    one = decoder(model, layout)
    list(one.run(requests(SHARED)))
    one.params = jax.tree.map(lambda leaf: leaf * 1.5, one.params)
    fresh = decoder(model, layout)
    fresh.params = one.params
    same(dict(one.run(requests(SHARED))), dict(fresh.run(requests(SHARED))))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request([1] * 100, 29),
            r"requests\[1\] has 100 tokens .* at most 128, .* try max_new_tokens=28",
        ),
        (Request([1] * 128, 29), r"requests\[1\] has 128 tokens .*; try a prompt of 99 tokens"),
        (
            Request([], 5),
            r"requests\[1\] has 0 tokens and max_new_tokens=5; both must be at least 1",
        ),
        (Request([1], 0), r"has 1 tokens and max_new_tokens=0; both must be at least 1"),
        (Request([1], 5, seed=2**32 + 5), r"requests\[1\].seed=4294967301 must be from 0 .* try 5"),
    ],
)
def test_a_request_without_room_is_refused(model, layout, request_, message):
    with pytest.raises(ValueError, match=message):
        next(decoder(model, layout).run([*requests()[:1], request_]))


def test_a_repetition_penalty_sees_prompt_and_text(model, layout):
    """So large that no token comes twice."""
    decode = config.Decode(repetition_penalty=1e6)
    shared = b"a beginning that they share, "
    asked = requests([shared + text for text in (b"one", b"two", b"three", b"four")], new=40)
    made = dict(decoder(model, layout, decode, rows=2).run(asked))
    for number, result in made.items():
        assert len({*result.tokens, *asked[number].tokens}) == 40 + len(set(asked[number].tokens))
    alone = dict(decoder(model, layout, decode, rows=1).run(asked[3:]))
    assert alone[0].tokens == made[3].tokens


def test_nothing_asked_is_nothing_said(model, layout):
    assert list(decoder(model, layout).run([])) == []


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_smaller_caches_say_nearly_the_same(model, layout, cache):
    exact = dict(decoder(model, layout, config.Decode()).run(requests(new=3)))
    near = dict(decoder(model, layout, config.Decode(cache=cache)).run(requests(new=3)))
    for number, result in exact.items():
        np.testing.assert_allclose(near[number].logprobs[0], result.logprobs[0], atol=0.1)
        assert near[number].logprobs != result.logprobs


@pytest.mark.parametrize("mesh", [config.Mesh(data=4, fsdp=1, tensor=2), config.Mesh(fsdp=8)])
def test_many_devices_give_the_same_texts(model, mesh, layout):
    model = dataclasses.replace(model, dim=32, ffn_dim=24)
    one = dict(decoder(model, layout).run(requests()))
    many = dict(decoder(model, sharding.make(mesh, jax.devices())).run(requests()))
    for number, result in one.items():
        assert many[number].tokens == result.tokens


def test_a_session_compiles_few_programs(model, layout):
    for program in (engines.begin, engines.advance):
        program.clear_cache()
    one = decoder(model, layout)
    list(one.run(requests([b"ab", b"abcd" * 4, b"c" * 50, b"d" * 70])))
    list(one.run(requests([b"e" * 9, b"f" * 60])))
    assert engines.begin._cache_size() == 3  # chunks of 16, 64 and 256
    assert engines.advance._cache_size() == 1
