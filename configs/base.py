"""What a page starts from: the schema's defaults (LLaMA 7B's) with a model, data and parts changed."""

import dataclasses

import ml_collections

from llama_jax import config


def page(
    model: config.Model, data: config.Data, tokens: float = 0, **parts: dict
) -> ml_collections.ConfigDict:
    """The editing form of a run: `page(sizes.LLAMA_7B, mixtures.LLAMA1, optim=dict(eps=1e-5))`.

    tokens sets train.steps to the optimiser steps that consume so many, rounded up.
    """
    default = config.Run(data=data)
    train = dataclasses.replace(default.train, **parts.pop("train", {}))
    if tokens:
        steps = -int(-tokens // (train.batch_size * data.seq_len))
        train = dataclasses.replace(train, steps=steps)
    changed = {
        name: dataclasses.replace(getattr(default, name), **values)
        for name, values in parts.items()
    }
    return config.edit(config.Run(model=model, data=data, train=train, **changed))
