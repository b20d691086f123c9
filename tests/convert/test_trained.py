"""The real small network: its recorded text and the reference's perplexity, before and after every format."""

import json

import jax
import numpy as np
import pytest

from llama_jax import config
from llama_jax.convert import names, native
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.model import transformer
from tests import oracle
from tests.convert import small

FOLDER = "checkpoints/stories260K/"


@pytest.fixture(scope="module")
def imported(shared, layout, tmp_path_factory):
    """Folder, source, module and parameters of stories260K."""
    to = tmp_path_factory.mktemp("stories") / "native"
    return to, *small.stories(shared, layout, to)


@pytest.fixture(scope="module")
def expected(shared):
    """The text that llama2.c's own test expects, of 200 steps from the begin token."""
    said = json.loads(shared(FOLDER + "expected.json").read_text())
    return next(text for name, text in said.items() if name.startswith("test_all.py greedy"))


def test_the_recorded_greedy_text_comes_out_exactly(imported, expected):
    _, source, module, params = imported
    tokenizer = source.tokenizer.load()
    decoder = Decoder(Engine(module, config.Decode()), tokenizer, (), 1, 201)
    ((_, result),) = decoder.run(
        transformer.unstack(module, params), [Request([tokenizer.bos], 200)]
    )
    assert result.text == expected


def nats_per_token(module, params, tokens) -> float:
    row = np.asarray(tokens, np.int32)[None]
    positions = np.broadcast_to(np.arange(row.shape[1] - 1), (1, row.shape[1] - 1))
    hidden = module.apply({"params": params}, row[:, :-1], positions)
    logits = np.asarray(transformer.logits(hidden), np.float64)
    return float(oracle.cross_entropy(logits[0], row[0, 1:]).mean())


def test_perplexity_equals_that_of_the_reference(imported, expected, tmp_path):
    """The same text through transformers, from our export."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, source, module, params = imported
    tokenizer = source.tokenizer.load()
    tokens = [tokenizer.bos, *tokenizer.encode(expected)]
    small.convert(folder, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        reference = theirs(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
    ours, reference = np.exp(nats_per_token(module, params, tokens)), np.exp(float(reference))
    assert abs(ours - reference) < 1e-3
    assert 1.0 < ours < 2.0  # greedy text of the network itself


def test_transformers_generates_the_same_text_from_our_export(imported, expected, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, *_ = imported
    small.convert(folder, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[1]]
    tokens = theirs.generate(**prompt, max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == expected
    assert torch.equal(tokens[0, :1], torch.tensor([1]))


def test_int8_weights_keep_most_of_the_perplexity(imported, expected, shared, layout, tmp_path):
    _, source, module, params = imported
    rounded = small.convert(shared(FOLDER + "stories260K-q8.bin"), tmp_path / "q8", "native")
    tokenizer = source.tokenizer.load()
    tokens = [tokenizer.bos, *tokenizer.encode(expected)]
    exact = nats_per_token(module, params, tokens)
    q8 = nats_per_token(module, native.load(tmp_path / "q8", module), tokens)
    assert rounded.model == source.model
    assert 0 < abs(q8 - exact) < 0.05


def test_every_format_gives_back_the_trained_weights(imported, tmp_path):
    folder, source, _, params = imported
    start = small.tensors(source)
    came = folder
    for kind in ("hf", "meta", "native"):
        small.assert_same(small.tensors(small.convert(came, tmp_path / kind, kind)), start)
        came = tmp_path / kind
    state = names.state_dict(jax.device_get(params), source.model)
    small.assert_same(state, start)
