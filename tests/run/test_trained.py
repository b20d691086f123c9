from pathlib import Path

import numpy as np
import pytest

import llama_jax
from tests.convert import small

DATA = Path(__file__).resolve().parents[1] / "data"
STORY = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    to = tmp_path_factory.mktemp("stories") / "native"
    small.convert(DATA / "checkpoints/stories260K/stories260K.bin", to, "native")
    return llama_jax.load(to)


def test_a_story_continues_as_llama2c_continues_it(stories):
    text = "Once upon a time" + stories.generate("Once upon a time", max_new_tokens=20)
    assert text.startswith(STORY)
    assert stories.generate("Once upon a time", temperature=1.0, seed=1) != text


def test_nll_is_that_of_the_logits(stories):
    module, _, tokenizer, *_ = stories
    tokens = stories.tokens(STORY)
    assert tokens == [tokenizer.bos, *tokenizer.encode(STORY)]
    logits_TV = np.asarray(stories.logits([tokens]), np.float64)[0]
    assert logits_TV.shape == (len(tokens), module.config.vocab_size)
    log_z_T = np.log(np.exp(logits_TV).sum(-1))
    expected = log_z_T[:-1] - logits_TV[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(stories.nll(STORY), expected, rtol=1e-4, atol=1e-5)
    assert stories.nll(STORY).mean() < 1.5 < stories.nll("girl a was there time")[1:].mean()


def test_what_cannot_be_is_refused(stories):
    with pytest.raises(ValueError, match=r"the text has 1 tokens; it must have from 2 to 513"):
        stories.nll("")
    with pytest.raises(ValueError, match=r"the prompt has .* beyond the 512 that the model was"):
        stories.generate(STORY * 40)
    with pytest.raises(ValueError, match=r"decode\.temprature .*temperature"):
        stories.generate(STORY, temprature=1.0)
    with pytest.raises(ValueError, match=r"compute_dtype='float16' is not one of"):
        llama_jax.load("/nowhere", compute_dtype="float16")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        llama_jax.lode  # noqa: B018
