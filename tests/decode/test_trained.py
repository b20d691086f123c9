"""The real small network says its recorded text through every way of decoding, in float32."""

import dataclasses
import json

import jax
import pytest

from llama_jax import config
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.decode.speculative import Speculative
from llama_jax.model import transformer
from tests.convert import small

FOLDER = "checkpoints/stories260K/"


@pytest.fixture(scope="module")
def loaded(shared, layout, tmp_path_factory):
    to = tmp_path_factory.mktemp("stories") / "native"
    source, module, params = small.stories(shared, layout, to)
    return module, params, source.tokenizer.load()


@pytest.fixture(scope="module")
def expected(shared):
    """The text that llama2.c's own test expects, of 200 steps from the begin token."""
    said = json.loads(shared(FOLDER + "expected.json").read_text())
    return next(text for name, text in said.items() if name.startswith("test_all.py greedy"))


def decoder(loaded, rows, decode=None):
    module, _, tokenizer = loaded
    return Decoder(Engine(module, decode or config.Decode()), tokenizer, (), rows, 201)


def params(loaded):
    return transformer.unstack(*loaded[:2])


def ask(loaded, text, new):
    tokenizer = loaded[2]
    return Request([tokenizer.bos, *tokenizer.encode(text)], new)


def test_alone_and_streamed(loaded, expected):
    parts = []
    asked, listen = [ask(loaded, "", 200)], lambda _, text: parts.append(text)
    ((_, result),) = decoder(loaded, 1).run(params(loaded), asked, listen)
    assert result.text == "".join(parts) == expected
    assert len(parts) > 150


OTHERS = ("Lily was", "The big red ball", "", "One day, a dog and his friend went", "Mom said")


def test_in_a_batch_and_in_a_row_that_others_had_before(loaded, expected):
    """Five beside it; and two rows for six texts."""
    asked = [ask(loaded, text, 60) for text in OTHERS]
    asked.append(ask(loaded, "", 200))
    for rows in (6, 2):
        made = dict(decoder(loaded, rows).run(params(loaded), asked))
        assert made[5].text == expected
        assert expected.startswith(made[2].text)


@pytest.mark.parametrize("proposals", [1, 4])
def test_with_a_draft(loaded, expected, proposals):
    """Its own weights with the upper layers left out: a poor draft, and the same text."""
    module, whole, tokenizer = loaded
    shallow = transformer.build(dataclasses.replace(module.config, layers=2), module.layout)
    few = {**whole, "groups": jax.tree.map(lambda leaf: leaf[:2], whole["groups"])}
    engines = (Engine(one, config.Decode()) for one in (module, shallow))
    decoder = Decoder(Speculative(*engines, proposals), tokenizer, (), 2, 201)
    both = params(loaded), transformer.unstack(shallow, few)
    made = dict(decoder.run(both, [ask(loaded, "", 200)] * 2))
    assert made[0].text == made[1].text == expected


def test_with_a_beginning_that_was_kept(loaded, expected):
    """Prompts that share the first half of the text; and one that goes on with what the row has."""
    tokenizer = loaded[2]
    tokens = [tokenizer.bos, *tokenizer.encode(expected)]
    half = tokens[:100]
    asked = [Request(half + tokenizer.encode(" dog"), 20), Request(half, 101)]
    made = dict(decoder(loaded, 2).run(params(loaded), asked))
    assert tokenizer.decode([*half, *made[1].tokens]) == expected
    one, weights = decoder(loaded, 1), params(loaded)
    ((_, first),) = one.run(weights, [Request(tokens[:1], 99)])
    assert first.tokens == tokens[1:100]
    ((_, second),) = one.run(weights, [Request(half, 101)])
    assert tokenizer.decode([*half, *second.tokens]) == expected


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_smaller_caches_begin_the_same_text(loaded, expected, cache):
    one = decoder(loaded, 1, config.Decode(cache=cache))
    ((_, result),) = one.run(params(loaded), [ask(loaded, "", 60)])
    assert expected.startswith(result.text[:40])
