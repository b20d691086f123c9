"""Continue a text: `python -m experiments.generate --checkpoint=DIR --prompt="Once upon a time"`.

DIR is a folder that experiments.convert wrote, or the workdir of a training run.
"""

import dataclasses
from pathlib import Path

import jax
from absl import flags

from experiments import cli
from llama_jax import config, sharding
from llama_jax.convert import formats, native
from llama_jax.decode import generate
from llama_jax.model import transformer

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.", required=True)
CONFIG = cli.define_parts(decode=config.Decode())


def main() -> int:
    cli.tune_for_cpu()
    decode = config.from_dict(CONFIG.value.decode.to_dict(), config.Decode, "decode")
    folder = Path(CHECKPOINT.value).expanduser().absolute()
    model, context, tokenizer_file = native.settings(folder)
    if tokenizer_file is None:
        raise ValueError(f"{folder} has no tokenizer: convert it again with --tokenizer=FILE")
    if model.remat != "none":
        model = dataclasses.replace(model, remat="none")
    tokenizer = formats.loaded(tokenizer_file)
    formats.check_ids(tokenizer, model)
    prompt = [tokenizer.bos, *tokenizer.encode(PROMPT.value)]
    total = len(prompt) + decode.max_new_tokens
    if total > context:
        raise ValueError(
            f"--prompt has {len(prompt)} tokens and decode.max_new_tokens={decode.max_new_tokens} more "
            f"make {total}, beyond the {context} that the model was trained for; "
            f"try --config.decode.max_new_tokens={max(context - len(prompt), 1)}"
        )
    module = transformer.build(model, sharding.make(config.Mesh(), jax.devices()))
    params = native.load(folder, module)
    tokens = generate.continue_text(
        module, params, prompt, decode.max_new_tokens, decode.temperature, decode.seed
    )
    print(tokenizer.decode(until_end(tokens[1:], tokenizer)))
    return 0


def until_end(tokens: list[int], tokenizer) -> list[int]:
    """Up to the token that ends a text, or begins another."""
    ends = [i for i, token in enumerate(tokens) if token in (tokenizer.bos, tokenizer.eos)]
    return tokens[: ends[0]] if ends else tokens


if __name__ == "__main__":
    cli.run(main)
