import json

import jax
import numpy as np
import pytest

from llama_jax import config
from llama_jax.run import loading
from llama_jax.tokenizer import byte
from tests.convert import small


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "huggingface").mkdir()
    return tmp_path


def test_ends_are_the_tokenizers_and_those_that_the_checkpoint_names(folder):
    tokenizer = byte.Byte()
    assert loading.end_tokens(folder, tokenizer, ()) == {tokenizer.bos, tokenizer.eos}
    assert loading.end_tokens(folder, tokenizer, ("<pad>",)) == {256, 257, 258}
    (folder / "huggingface/config.json").write_text('{"eos_token_id": 4}')
    generation = {"eos_token_id": [5, 99_999]}
    (folder / "huggingface/generation_config.json").write_text(json.dumps(generation))
    assert loading.end_tokens(folder, tokenizer, ()) == {4, 5, 99_999, tokenizer.eos}
    with pytest.raises(ValueError, match=r"decode\.stop_tokens='<end>' is not one of"):
        loading.end_tokens(folder, tokenizer, ("<end>",))


@pytest.mark.parametrize(
    ("prompt", "new", "way"),
    [
        (90, 20, "110, beyond the 100 that .*; try --config.decode.max_new_tokens=10"),
        (100, 20, "; shorten it to at most 80 tokens"),
        (5000, 200, "; shorten it, and lower decode.max_new_tokens"),
    ],
)
def test_what_does_not_fit_is_told_what_would(prompt, new, way):
    with pytest.raises(ValueError, match=way):
        loading.fit(prompt, new, 100, "--prompt")
    loading.fit(90, 10, 100, "--prompt")


@pytest.mark.parametrize("chosen", ["stored", "float32", "bfloat16"])
def test_the_dtype_computed_in_can_be_chosen(tmp_path, chosen):
    """A network stored in float16 is computed in bfloat16, which keeps 7 of its 10 bits."""
    came = small.hf(tmp_path / "hf", small.state(dtype=np.float16))
    (came / "tokenizer.model").write_bytes(small.sentencepiece(40))
    small.convert(came, tmp_path / "native", "native")
    decode = config.Decode(compute_dtype=chosen)
    loaded = loading.load(tmp_path / "native", decode, config.Mesh())
    dtype = "bfloat16" if chosen == "stored" else chosen
    assert loaded.engine.module.config.compute_dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {dtype}


def test_a_folder_that_is_no_model_is_told_what_to_give(tmp_path):
    """A converted one of another format, a folder of checkpoints, a run that has not trained yet."""
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (run / "checkpoints/50/state", other):
        step.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(config.to_dict(config.Run())))
    (other / "model.safetensors").touch()
    of_run = f"is a part of a training run; give the folder of the run: {run}$"
    for folder, message in (
        (
            other,
            f"of the hf format; convert them first: .*experiments.convert --from={other} --to=NEW",
        ),
        (run / "checkpoints", of_run),
        (run / "checkpoints/50", of_run),
        (run, f"{run} has not been trained yet: it holds no finished checkpoint"),
        (tmp_path / "none", "none does not exist"),
        (tmp_path, "holds no checkpoint that is known .*; it holds other, run"),
    ):
        with pytest.raises(ValueError, match=message):
            loading.settings(folder)
