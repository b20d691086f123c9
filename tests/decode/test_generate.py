import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.decode import generate
from llama_jax.model import transformer

PROMPT = [3, 1, 4, 1, 5]


def network(model, layout):
    module = transformer.build(model, layout)
    params = jax.jit(transformer.init, static_argnums=0)(module, jax.random.key(0))
    return module, jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, params)


def test_greedy_takes_the_likeliest_token_of_the_text_so_far(model, layout):
    module, params = network(model, layout)
    ours = generate.continue_text(module, params, PROMPT, 3, temperature=0, seed=0)
    text = list(PROMPT)
    for _ in range(3):
        tokens = jnp.asarray([text])
        places = jnp.arange(len(text))[None]
        logits = transformer.logits(module.apply({"params": params}, tokens, places))
        text.append(int(logits[0, -1].argmax()))
    assert ours == text


def test_samples_follow_the_distribution_and_the_seed(model, layout):
    module, params = network(model, layout)
    draws = [generate.continue_text(module, params, PROMPT, 1, 1.0, seed)[-1] for seed in range(60)]
    assert draws[0] == generate.continue_text(module, params, PROMPT, 1, 1.0, seed=0)[-1]
    tokens, places = jnp.asarray([PROMPT]), jnp.arange(5)[None]
    logits = transformer.logits(module.apply({"params": params}, tokens, places))[0, -1]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    entropy, spread = -(np.exp(log_p) * log_p).sum(), np.sqrt((np.exp(log_p) * log_p**2).sum())
    mean = -log_p[draws].mean()
    assert abs(mean - entropy) < 4 * spread / np.sqrt(60), "surprise of the draws is the entropy"
    assert len(set(draws)) > 5


def test_many_devices_give_the_same_text(model):
    model = dataclasses.replace(model, vocab_size=42, kv_heads=6)
    one, eight = (
        sharding.make(mesh, devices)
        for mesh, devices in (
            (config.Mesh(), jax.devices()[:1]),
            (config.Mesh(data=4, fsdp=1, tensor=2), jax.devices()),
        )
    )
    texts = []
    for layout in (one, eight):
        module, params = network(model, layout)
        texts.append(generate.continue_text(module, params, PROMPT, 5, 0, seed=0))
    assert texts[0] == texts[1]


def test_a_text_longer_than_the_table_of_positions_is_refused(model, layout):
    model = dataclasses.replace(model, position="learned", max_positions=6)
    module = transformer.build(model, layout)
    params = transformer.init(module, jax.random.key(0))
    assert len(generate.continue_text(module, params, PROMPT, 6 - len(PROMPT), 0, seed=0)) == 6
    with pytest.raises(ValueError, match=r"do not fit into model\.max_positions=6"):
        generate.continue_text(module, params, PROMPT, 7 - len(PROMPT), 0, seed=0)
