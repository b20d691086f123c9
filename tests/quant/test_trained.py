"""The real small network in smaller weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.model import transformer
from llama_jax.quant.network import quantise
from tests.convert import small
from tests.model.test_cache import whole

ROWS, LENGTH = 32, 128


@pytest.fixture(scope="module")
def loaded(shared, layout, tmp_path_factory):
    """The network, and its own texts: half to calibrate on, half to measure."""
    to = tmp_path_factory.mktemp("stories") / "native"
    source, module, params = small.stories(shared, layout, to)
    tokenizer = source.tokenizer.load()
    decoder = Decoder(Engine(module, config.Decode(temperature=1.0)), tokenizer, (), 16, LENGTH)
    requests = [Request([tokenizer.bos], LENGTH - 1, stream=(i, 0)) for i in range(2 * ROWS)]
    made = decoder.run(transformer.unstack(module, params), requests)
    rows = {number: [tokenizer.bos, *result.tokens] for number, result in made}
    rows = np.array([rows[number] for number in range(2 * ROWS)])
    return module, params, rows[:ROWS], rows[ROWS:]


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
    module, params, _, rows = loaded
    of = lambda params: jax.nn.log_softmax(whole(module, params, rows))
    p, q = of(params), of(quantise(module, params, quant))
    assert 0 < float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) < most


def test_calibration_brings_it_nearer(loaded):
    module, params, calibration, rows = loaded
    of = lambda params: jax.nn.log_softmax(whole(module, params, rows))
    p = of(params)
    far = []
    for quant in (config.Quant(bits=4, method="nearest"), config.Quant(bits=4)):
        q = of(quantise(module, params, quant, [calibration] if quant.reads_text else []))
        far.append(float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))))
    assert far[1] < 0.8 * far[0]
