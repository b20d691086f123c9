"""A trained network in Python: its module and parameters, logits, the loss of a text, generation."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import config, sharding
from llama_jax.convert import native
from llama_jax.decode.engine import Engine
from llama_jax.decode.generate import Decoder, Request
from llama_jax.eval import score
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.run import loading
from llama_jax.tokenizer.base import Tokenizer


class TrainedModel(NamedTuple):
    """A network with its parameters and tokenizer. Parameters are in the module's compute dtype."""

    module: Transformer
    params: Any  # for module.apply({"params": params}, tokens_BT, positions_BT)
    tokenizer: Tokenizer
    context: int  # positions that it was trained for
    end_tokens: frozenset[int]  # end a generated sequence

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text from its beginning: with bos where the model's sequences begin with it."""
        return loading.prompt_tokens(self.tokenizer, text)

    def logits(self, tokens_BT: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
        """float32 [B, T, V]: at each position the logits of the token that follows."""
        return _logits(self.module, self.params, jnp.asarray(tokens_BT, jnp.int32))

    def nll(self, text: str) -> np.ndarray:
        """Nats of each token of a text but the first, float32 [T]; their mean is the loss.

        ValueError if the text has fewer than two tokens, or more than fit into the context.
        """
        tokens = self.tokens(text)
        if not 2 <= len(tokens) <= self.context + 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens; it must have from 2 to {self.context + 1}: the "
                "positions that the model was trained for, and the last token"
            )
        return np.asarray(score.token_nll(self.module, self.params, jnp.asarray([tokens])))[0]

    def generate(self, prompt: str, **settings: Any) -> str:
        """The continuation of a prompt. settings: fields of config.Decode, such as temperature=0.8.

        A copy of the parameters is in memory meanwhile. ValueError on a setting that cannot be, or if prompt
        and continuation do not fit into the context.
        """
        values = dataclasses.asdict(config.Decode()) | settings
        decode = config.from_dict(values, config.Decode, "decode")
        tokens, new = self.tokens(prompt), decode.max_new_tokens
        loading.fit(len(tokens), new, self.context, "the prompt")
        decoder = Decoder(
            Engine(self.module, decode), self.tokenizer, self.end_tokens, 1, len(tokens) + new
        )
        params = transformer.unstack(self.module, self.params)
        ((_, result),) = decoder.run(params, [Request(tokens, new, decode.seed)])
        return result.text


@functools.partial(jax.jit, static_argnames="module")
def _logits(module: Transformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden: Any = transformer.portable(module).apply({"params": params}, tokens_BT, positions_BT)
    return transformer.logits(hidden)


def load(
    folder: str | Path, mesh: config.Mesh | None = None, compute_dtype: str = "stored"
) -> TrainedModel:
    """The model of a folder that experiments.convert wrote, or of a training run's workdir.

    mesh: how it is spread over the devices that are here, by default as in training (FSDP over all of them).
    compute_dtype: "stored" (the checkpoint's), "float32" or "bfloat16". ValueError if the folder has no
    network or no tokenizer.
    """
    place = Path(folder).expanduser().absolute()
    config.choose(("stored", "float32", "bfloat16"), compute_dtype, "compute_dtype")
    model, context, tokenizer = loading.settings(place)
    if compute_dtype != "stored":
        model = dataclasses.replace(model, compute_dtype=compute_dtype)
    module = transformer.build(model, sharding.make(mesh or config.Mesh(), jax.devices()))
    params = native.load(place, module, model.compute_dtype, step=loading.newest(place))
    ends = loading.end_tokens(place, tokenizer, ())
    return TrainedModel(module, params, tokenizer, context, ends)
