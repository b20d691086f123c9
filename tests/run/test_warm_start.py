"""Runs that begin with the weights of another."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax import config, sharding, tree
from llama_jax.convert import compare, formats, native
from llama_jax.convert.source import TokenizerFile
from llama_jax.model import transformer
from llama_jax.run import warm_start
from llama_jax.run.loading import form_of, load
from llama_jax.tokenizer import base as tokenizers
from llama_jax.tokenizer import messages
from llama_jax.tokenizer.added import Additions
from llama_jax.tokenizer.special import AddedToken
from tests.convert import small
from tests.experiments import helpers

STEPS = "--config.train.steps=4"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a run with checkpoints of steps 2 and 4, and the arguments of runs on its text."""
    folder = tmp_path_factory.mktemp("base")
    done = helpers.run("train", *helpers.arguments(folder, STEPS, "--config.checkpoint.every=2"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def part(base):
    """A run that trains attention and norms, from step 4 of a copy of the base; the flags that made it."""
    shutil.copytree(base / "run", base / "old/base")
    flags = ["--config.optim.train=('*/attention/*', 'D')"]
    flags += [f"--config.train.init_from={base}/old/base", "--config.checkpoint.every=2"]
    done = train(base, "old/part", *flags)
    assert done.returncode == 0, done.stderr
    return base / "old/part", flags, done.stdout


def train(base, name, *flags):
    return helpers.run("train", *helpers.arguments(base, STEPS, *flags, workdir=name))


def params(folder):
    model, _, _ = native.settings(folder)
    module = transformer.build(model, sharding.make(config.Mesh(), jax.devices()[:1]))
    return {
        path: np.asarray(leaf) for path, leaf in tree.paths(native.load(folder, module)).items()
    }


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.init_from=/nowhere"], "train.init_from=/nowhere: /nowhere"),
        (
            ["--config.optim.train=('embd',)", "--config.train.init_from={base}/run"],
            "nearest: 'embed'",
        ),
        (
            ["--config.train.init_from={base}/run", "--config.train.init_checksum=0123"],
            "have the checksum",
        ),
        (
            ["--config.train.init_from={base}/run", "--config.model.ffn_dim=48"],
            "does not hold the parameters",
        ),
        (
            ["--config.train.init_from={base}/run", "--config.train.init_step=3"],
            "/run has no checkpoint of step 3; those there are of 2, 4",
        ),
        (["--config.train.init_from={base}"], "holds no checkpoint that is known"),
    ],
)
def test_what_cannot_begin_is_said(base, flags, message):
    done = train(base, "bad", *(flag.replace("{base}", str(base)) for flag in flags))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_part_is_trained_and_the_folder_is_the_whole_network(base, part):
    """Its checkpoints hold that part; what reads the folder finds the rest in the base."""
    folder, flags, printed = part
    assert "of them trained" in printed
    assert f"the frozen parameters stay in checkpoint 4 of {base}/old/base" in printed
    before, after = params(base / "run"), params(folder)
    assert before.keys() == after.keys()
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {path for path in before if "/attention/" in path or path.endswith("scale")}
    recorded = json.loads((folder / "run.json").read_text())["train"]
    assert recorded["init_checksum"] == native.identity(base / "run")
    assert recorded["init_step"] == 4
    losses = [row["loss"] for row in rows(folder)]
    assert losses[0] < rows(base / "run")[-1]["loss"] + 0.3, "it begins where the base has ended"
    shutil.rmtree(folder / "checkpoints/4")
    more = train(base, "old/part", *flags)
    assert "resuming at step 2" in more.stdout, more.stderr
    assert [row["loss"] for row in rows(folder)] == losses
    asked = [f"--checkpoint={folder}", "--prompt=w1", "--config.decode.max_new_tokens=4"]
    said = helpers.run("generate", *asked)
    assert said.returncode == 0, said.stderr
    (base / "old/base").rename(base / "old/gone")
    said = helpers.run("generate", *asked)
    assert f"its frozen parameters lie in train.init_from={base}/old/base" in said.stderr
    assert "does not exist. Bring those weights back" in said.stderr
    again = train(base, "old/part", *flags)
    assert again.returncode == 1
    assert f"train.init_from={base}/old/base: {base}/old/base does not exist" in again.stderr
    (base / "old/gone").rename(base / "old/base")


def test_a_partial_run_keeps_the_step_of_a_base_that_trains_on(base, part, tmp_path):
    """Newer checkpoints of the base change nothing; once the recorded one is removed, an error names it."""
    other = tmp_path / "growing"
    shutil.copytree(base / "old/base", other)
    shutil.copytree(part[0], base / "moved")
    flags = [*part[1], f"--config.train.init_from={other}"]
    before = params(part[0])
    shutil.copytree(other / "checkpoints/2", other / "checkpoints/6")
    assert "already trained" in train(base, "moved", *flags).stdout
    shutil.rmtree(base / "moved/checkpoints/4")
    assert "resuming at step 2" in train(base, "moved", *flags).stdout
    recorded = json.loads((base / "moved/run.json").read_text())["train"]
    assert (recorded["init_from"], recorded["init_step"]) == (str(other), 4)
    after = params(base / "moved")
    assert all((after[path] == before[path]).all() for path in before)
    shutil.rmtree(other / "checkpoints/4")
    with pytest.raises(
        ValueError, match=r"no checkpoint of step 4; those there are of 2, 6\. Bring"
    ):
        params(base / "moved")
    again = train(base, "moved", *flags)
    assert again.returncode == 1
    assert "no checkpoint of step 4; those there are of 2, 6" in again.stderr


def test_a_partial_run_that_moves_together_with_its_base_is_readable(base, part, tmp_path):
    before = params(part[0])
    shutil.copytree(base / "old", tmp_path / "elsewhere/old")
    (base / "old").rename(base / "away")
    after = params(tmp_path / "elsewhere/old/part")
    assert all((after[path] == before[path]).all() for path in before)
    shutil.rmtree(tmp_path / "elsewhere/old/base/checkpoints/4/state/d")
    with pytest.raises(ValueError, match=r"init_from of .*/elsewhere/old/part/run\.json"):
        params(tmp_path / "elsewhere/old/part")
    (base / "away").rename(base / "old")


def test_a_partial_run_may_begin_from_a_partial_run(base, part):
    """Each array is read where it was trained last."""
    flags = ["--config.optim.train=('embed', 'output')", f"--config.train.init_from={part[0]}"]
    done = train(base, "second", *flags)
    assert done.returncode == 0, done.stderr
    whole, first, second = (params(folder) for folder in (base / "run", part[0], base / "second"))
    for path, leaf in second.items():
        trained = path in ("embed", "output")
        assert (leaf == first[path]).all() == (not trained), path
        assert (first[path] == whole[path]).all() == (
            "/attention/" not in path and not path.endswith("scale")
        )


def test_a_run_of_every_parameter_resumes_without_its_base(base):
    """The base may have trained on, or be gone. Patterns that pick every parameter make no partial run."""
    shutil.copytree(base / "run", base / "first")
    begins = [f"--config.train.init_from={base}/first", "--config.train.init_step=2"]
    begins += ["--config.optim.train=('**',)"]
    done = train(base, "whole", *begins)
    assert done.returncode == 0, done.stderr
    assert "of them trained" not in done.stdout
    recorded = json.loads((base / "whole/run.json").read_text())["train"]
    assert recorded["init_checksum"] == native.identity(base / "run", 2)
    shutil.rmtree(base / "first")
    assert params(base / "whole").keys() == params(base / "run").keys()
    again = train(base, "whole", *begins)
    assert "already trained" in again.stdout, again.stderr
    other = train(base, "whole", *begins, "--config.train.init_checksum=0123")
    assert other.returncode == 1
    assert "first" in other.stderr


def test_what_a_run_began_with_is_on_record_once_it_has_checkpoints(base, part, tmp_path):
    """In run.json, and in each checkpoint."""
    shutil.copytree(part[0], tmp_path / "run")
    run = config.Run(train=config.Train(init_from=str(base / "old/base")))

    def begins(workdir):
        return warm_start.pinned(run, lambda: warm_start.recorded(workdir)).train

    found = begins(tmp_path / "run")
    assert (found.init_step, found.init_checksum) == (4, native.identity(base / "run"))
    recorded = dataclasses.replace(run.train, init_step=2, init_checksum="0123")
    said = config.to_dict(dataclasses.replace(run, train=recorded))
    (tmp_path / "run/run.json").write_text(json.dumps(said))
    assert begins(tmp_path / "run") == recorded
    (tmp_path / "run/run.json").unlink()
    shutil.copytree(base / "run/checkpoints/2", base / "old/base/checkpoints/8")
    assert begins(tmp_path / "run") == found
    assert begins(tmp_path / "none").init_step == 8
    shutil.rmtree(base / "old/base/checkpoints/8")


def test_checkpoints_without_run_json_are_a_new_runs_own(base, tmp_path):
    """It goes on from them, with settings of its own: a workdir is compared by its run.json."""
    (base / "branch").mkdir()
    shutil.copytree(base / "run/checkpoints/2", base / "branch/checkpoints/2")
    done = train(base, "branch", "--config.optim.learning_rate=1e-3")
    assert "resuming at step 2" in done.stdout, done.stderr
    assert json.loads((base / "branch/run.json").read_text())["optim"]["learning_rate"] == 1e-3
    again = train(base, "branch")
    assert again.returncode == 1
    assert "optim.learning_rate: 0.001 -> 0.003" in again.stderr


PAGE = """
import json
from llama_jax import config
from llama_jax.study import schema

def get_config():
    run = config.edit(config.from_dict(json.loads({run!r})))
    run.train.init_from = {base!r}
    trained = {{"all": {{}}, "attention": {{"optim": {{"train": ("*/attention/*",)}}}}}}
    return schema.edit(run, {{"trained": trained}}, {{}}, seeds=1, rows=16)
"""


def test_the_runs_of_a_study_begin_with_one_checkpoint(base, tmp_path):
    """Those that are begun after the base has trained on, too."""
    growing, workdir = tmp_path / "growing", tmp_path / "study"
    shutil.copytree(base / "run", growing)
    page = PAGE.format(run=(base / "run/run.json").read_text(), base=str(growing))
    (tmp_path / "page.py").write_text(page)
    study = [f"--config={tmp_path}/page.py", f"--workdir={workdir}"]
    done = helpers.run("ablate", *study, "--only=attention-seed0")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(growing / "checkpoints/2", growing / "checkpoints/6")
    done = helpers.run("ablate", *study)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("all-seed0", "attention-seed0"):
        recorded = json.loads((workdir / f"runs/{name}/run.json").read_text())["train"]
        assert (recorded["init_from"], recorded["init_step"]) == (str(growing), 4)
        assert rows(workdir / "runs" / name)[0]["loss"] < rows(base / "run")[-1]["loss"] + 0.3
    shutil.rmtree(growing)
    assert helpers.run("ablate", *study, "--report-only").returncode == 0


ADDED = {
    "added_tokens_decoder": {
        "270": {"content": "<|im_end|>", "special": True},
        "271": {"content": "<think>", "special": False, "normalized": False},
    },
    "eos_token": "<|im_end|>",
    "tokenizer_class": "LlamaTokenizer",
    "chat_template": "{% for m in messages %}<think>{{ m.content }}<|im_end|>{% endfor %}",
}
SHAPES = [
    "--config.model.heads=6", "--config.model.kv_heads=2", "--config.model.head_dim=4",
    "--config.model.ffn_dim=20", "--config.model.vocab_size=300", "--config.model.norm_eps=1e-5",
    "--config.optim.train=('*/attention/*', 'D')",
]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(base):
    """A model of 300 ids in bfloat16, whose tokenizer has 272, two of them added; a part of it is trained."""
    model = dataclasses.replace(small.MODEL, vocab_size=300)
    tensors = small.state(model, ml_dtypes.bfloat16)
    came = small.hf(base / "came", {k: v / 8 for k, v in tensors.items()}, vocab_size=300)
    (came / "tokenizer.model").write_bytes(small.sentencepiece(259))
    (came / "tokenizer_config.json").write_text(json.dumps(ADDED))
    (came / "generation_config.json").write_text(json.dumps({"eos_token_id": [270, 9]}))
    converted = base / "converted"
    small.convert(came, converted, "native")
    begins = [*SHAPES, f"--config.train.init_from={converted}"]
    begins += ["--config.data.tokenizer.kind=folder", f"--config.data.tokenizer.path={converted}"]
    done = train(base, "tuned", *begins)
    assert done.returncode == 0, done.stderr
    return came, base / "tuned"


def test_a_models_tokens_and_chat_files_go_along_into_a_run_and_out_of_it(tuned, tmp_path):
    came, run = tuned
    loaded = load(run, config.Decode(), config.Mesh(fsdp=1, data=-1))
    assert loaded.tokenizer.encode("<think><|im_end|>", special=True) == [271, 270]
    assert loaded.ends == {270, 9}
    said = messages.read([{"role": "user", "content": "w1"}])
    assert form_of(loaded, None).write(said, ())[-1] == 270
    small.convert(run, tmp_path / "out", "hf")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (came / name).read_bytes()


def test_arrays_leave_a_partial_run_in_the_dtypes_in_which_they_are_stored(tuned, tmp_path):
    """Trained ones in float32, the others as they came: nothing is lost. Hugging Face is told the wider."""
    came, run = tuned
    ours = formats.open_checkpoint(run, "", "")
    theirs = small.tensors(formats.open_checkpoint(came, "", ""))
    for kind in ("hf", "native", "meta"):
        made = small.convert(run, tmp_path / kind, kind)
        assert compare.sources(ours, made, lambda _: None) == len(theirs)
        for name, tensor in small.tensors(made).items():
            trained = "self_attn" in name or "norm" in name
            assert tensor.dtype.name == ("float32" if trained else "bfloat16"), name
            assert (tensor == theirs[name]).all() == (not trained), name
    said = json.loads((tmp_path / "hf/config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "float32"
    narrow = small.convert(run, tmp_path / "narrow", "hf", np.dtype(ml_dtypes.bfloat16))
    assert {dtype.name for dtype in narrow.dtypes.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "narrow/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("additions", "other"),
    [
        (Additions(eos=1), "other eos; set"),
        (Additions((AddedToken(7, "<|im_end|>"),)), r"other special \(<\|im_end\|>\); set"),
        (Additions((AddedToken(7, "a", special=False),)), "it gives texts other ids; set"),
        (Additions(adds_bos=False), "other prefix; set"),
    ],
)
def test_a_tokenizer_that_lacks_what_the_model_adds_is_refused(tmp_path, additions, other):
    """Special tokens, too, of which its fingerprint says nothing."""
    file = TokenizerFile("sp", small.sentencepiece(48))
    described = native.description(
        small.MODEL, 64, dataclasses.replace(file, additions=additions), {"format": "hf"}
    )
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer.model").write_bytes(file.content)
    run = config.Run(model=small.MODEL, train=config.Train(init_from=str(tmp_path)))
    program = SimpleNamespace(frozen={})
    message = f"has another tokenizer than data.tokenizer: {other} data.tokenizer.kind='folder'"
    with pytest.raises(ValueError, match=message):
        warm_start.check(run, program, SimpleNamespace(tokenizer=file.load()))
    own = tokenizers.load(config.TokenizerConfig("folder", str(tmp_path)))
    warm_start.check(run, program, SimpleNamespace(tokenizer=own))
