"""The real small network says its recorded text through every way of decoding, in float32."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from llama_jax import config
from llama_jax.convert import formats
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
    return module, params, formats.loaded(source.tokenizer)


@pytest.fixture(scope="module")
def expected(shared):
    """The text that llama2.c's own test expects, of 200 steps from the begin token."""
    said = json.loads(shared(FOLDER + "expected.json").read_text())
    return next(text for name, text in said.items() if name.startswith("test_all.py greedy"))


def engine(loaded, decode=None):
    module, params, _ = loaded
    return Engine(module, jax.tree.map(jnp.copy, params), decode or config.Decode())


def ask(loaded, text, new):
    tokenizer = loaded[2]
    return Request([tokenizer.bos, *tokenizer.encode(text)], new)


def test_alone_and_streamed(loaded, expected):
    parts = []
    decoder = Decoder(engine(loaded), loaded[2], (), 1, 201)
    ((_, result),) = decoder.run([ask(loaded, "", 200)], lambda _, text: parts.append(text))
    assert result.text == "".join(parts) == expected
    assert len(parts) > 150


OTHERS = ("Lily was", "The big red ball", "", "One day, a dog and his friend went", "Mom said")


def test_in_a_batch_and_in_a_row_that_others_had_before(loaded, expected):
    """Five beside it; and two rows for six texts."""
    asked = [ask(loaded, text, 60) for text in OTHERS]
    asked.append(ask(loaded, "", 200))
    for rows in (6, 2):
        made = dict(Decoder(engine(loaded), loaded[2], (), rows, 201).run(asked))
        assert made[5].text == expected
        assert expected.startswith(made[2].text)


@pytest.mark.parametrize("proposals", [1, 4])
def test_with_a_draft(loaded, expected, proposals):
    """Its own weights with the upper layers left out: a poor draft, and the same text."""
    module, params, tokenizer = loaded
    shallow = transformer.build(dataclasses.replace(module.config, layers=2), module.layout)
    few = jax.tree.map(jnp.copy, params)
    few["groups"] = jax.tree.map(lambda leaf: leaf[:2], few["groups"])
    both = Speculative(engine(loaded), Engine(shallow, few, config.Decode()), proposals)
    made = dict(Decoder(both, tokenizer, (), 2, 201).run([ask(loaded, "", 200)] * 2))
    assert made[0].text == made[1].text == expected


def test_with_a_beginning_that_was_kept(loaded, expected):
    """Prompts that share the first half of the text; and one that goes on with what the row has."""
    tokenizer = loaded[2]
    tokens = [tokenizer.bos, *tokenizer.encode(expected)]
    half = tokens[:100]
    decoder = Decoder(engine(loaded), tokenizer, (), 2, 201)
    asked = [Request(half + tokenizer.encode(" dog"), 20), Request(half, 101)]
    made = dict(decoder.run(asked))
    assert tokenizer.decode([*half, *made[1].tokens]) == expected
    decoder = Decoder(engine(loaded), tokenizer, (), 1, 201)
    ((_, first),) = decoder.run([Request(tokens[:1], 99)])
    assert first.tokens == tokens[1:100]
    ((_, second),) = decoder.run([Request(half, 101)])
    assert tokenizer.decode([*half, *second.tokens]) == expected


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_smaller_caches_begin_the_same_text(loaded, expected, cache):
    decoder = Decoder(engine(loaded, config.Decode(cache=cache)), loaded[2], (), 1, 201)
    ((_, result),) = decoder.run([ask(loaded, "", 60)])
    assert expected.startswith(result.text[:40])
