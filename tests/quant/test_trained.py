"""The real small network in smaller weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.convert import formats
from llama_jax.quant.network import quantise
from tests.convert import small
from tests.model.test_cache import whole

FOLDER = "checkpoints/stories260K/"


@pytest.fixture(scope="module")
def loaded(shared, layout, tmp_path_factory):
    to = tmp_path_factory.mktemp("stories") / "native"
    source, module, params = small.stories(shared, layout, to)
    tokenizer = formats.loaded(source.tokenizer)
    texts = json.loads(shared(FOLDER + "expected.json").read_text()).values()
    rows = [
        [tokenizer.bos, *tokenizer.encode(text)][:128] for text in texts if isinstance(text, str)
    ]
    return module, params, np.array([row for row in rows if len(row) == 128])


@pytest.mark.parametrize(
    ("quant", "most"),
    [
        (config.Quant(), 0.001),
        (config.Quant(activations="int16"), 0.001),
        (config.Quant(bits=4, method="nearest"), 0.15),
    ],
)
def test_it_believes_nearly_the_same(loaded, quant, most):
    """Nats that the smaller one needs more on the larger one's own text: the divergence of the two."""
    module, params, rows = loaded
    of = lambda params: jax.nn.log_softmax(whole(module, params, rows))
    p, q = of(params), of(quantise(module, params, quant))
    assert 0 < float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) < most


def test_calibration_brings_it_nearer(loaded):
    module, params, rows = loaded
    of = lambda params: jax.nn.log_softmax(whole(module, params, rows))
    p = of(params)
    far = []
    for quant in (config.Quant(bits=4, method="nearest"), config.Quant(bits=4)):
        q = of(quantise(module, params, quant, [rows] if quant.reads_text else []))
        far.append(float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))))
    assert far[1] < 0.8 * far[0]
