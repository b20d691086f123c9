"""Train a part of a network's parameters. The others are frozen, in the compute dtype."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax

from llama_jax import config, dims, tree
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.train.objective import Objective


def chosen(letters: Any, patterns: Sequence[str]) -> frozenset[str]:
    """Paths of the parameters that one of `optim.train`'s patterns picks.

    letters: of each parameter. A pattern is a glob of paths, "groups/*/attention/*", or the letters of one
    layer's array, "DF". ValueError if it picks none.
    """
    labels = {path: dims.unstacked(of) for path, of in tree.flat(letters).items()}
    picked: set[str] = set()
    for pattern in patterns:
        found = {
            path
            for path, of in labels.items()
            if pattern == of or fnmatch.fnmatchcase(path, pattern)
        }
        if not found:
            near = config.nearest(pattern, [*labels, *labels.values()])
            raise ValueError(
                f"optim.train={pattern!r} picks no parameter; it is a glob of their paths or the letters of "
                f"one layer's array; nearest: {near!r}"
            )
        picked |= found
    return frozenset(picked)


def partial(objective: Objective, module: Transformer, patterns: Sequence[str]) -> Objective:
    """`objective`, of all parameters of `module`, with those that `patterns` pick trained.

    Its frozen tree holds the others. ValueError if a pattern picks none.
    """
    picked = chosen(objective.letters, patterns)
    if picked == tree.flat(objective.letters).keys():
        return objective
    trained, others = tree.split(objective.letters, picked.__contains__)
    dtype, layout = module.config.compute_dtype, module.layout

    def described(shape: jax.ShapeDtypeStruct, letters: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=layout.param(letters))

    _, shapes = tree.split(transformer.abstract(module), picked.__contains__)
    return objective._replace(
        sums=lambda params, frozen, batch: objective.sums(tree.join(params, frozen), {}, batch),
        init=lambda key: tree.split(objective.init(key), picked.__contains__)[0],
        letters=trained,
        frozen=jax.tree.map(described, shapes, others),
        params=tree.join,
    )
