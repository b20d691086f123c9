"""What a page starts from: the schema's defaults (LLaMA 7B's) with a model, data and parts changed."""

import dataclasses

import ml_collections

from configs import hardware
from llama_jax import config


def page(
    slice: str, model: config.Model, data: config.Data, tokens: float = 0, **parts: dict
) -> ml_collections.ConfigDict:
    """The editing form of a run: `page("", sizes.LLAMA_7B, mixtures.LLAMA1, optim=dict(eps=1e-5))`.

    slice "" leaves the layout to the devices that are there; "v4_32" chooses one. tokens sets train.steps
    to the optimiser steps that consume so many, rounded up.
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
    run = config.Run(model=model, data=data, train=train, **changed)
    return config.edit(hardware.lay_out(run, slice) if slice else run)
