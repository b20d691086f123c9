"""Every page freezes, says what it is, and has the paper's hyper-parameters."""

import importlib
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from benchmarks import scale
from configs import sizes
from llama_jax import config, sharding
from llama_jax.analysis import hardware
from llama_jax.model import transformer
from llama_jax.train import optim

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"__init__", "base", "hardware", "mixtures", "sizes"}
PAGES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in SHARED)


def load(path):
    spec = importlib.util.spec_from_file_location("page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frozen(stem) -> config.Run:
    return config.freeze(load(ROOT / "configs" / f"{stem}.py").get_config())


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_freezes_builds_and_names_its_command(path):
    page = load(path)
    run = config.freeze(page.get_config())
    assert hash(run) == hash(config.from_dict(config.to_dict(run)))
    assert f"--config=configs/{path.name}" in page.__doc__
    layout = sharding.make(config.Mesh(), jax.devices())
    module = transformer.build(run.model, layout)
    optim.build(run.optim, run.train.steps, transformer.letters(module))
    layout.check_rows(run.train.batch_size // run.train.microbatches)


def test_every_size_has_a_page():
    models = {frozen(page.stem).model for page in PAGES}
    for name in vars(sizes):
        if name.isupper() and not name.startswith("_"):
            assert getattr(sizes, name) in models, name


# arXiv:2302.13971 table 2: peak learning rate and training tokens; batches of 4M.
@pytest.mark.parametrize(
    ("stem", "rate", "tokens"),
    [("7b", 3e-4, 1.0e12), ("13b", 3e-4, 1.0e12), ("33b", 1.5e-4, 1.4e12), ("65b", 1.5e-4, 1.4e12)],
)
def test_llama_1_is_table_2(stem, rate, tokens):
    run = frozen(stem)
    assert run.tokens_per_step == 4 * 2**20
    assert 0 <= run.train.steps * run.tokens_per_step - tokens < run.tokens_per_step
    assert (run.data.seq_len, run.optim.learning_rate, run.optim.warmup_steps) == (2048, rate, 2000)
    optimiser = (run.optim.beta1, run.optim.beta2, run.optim.weight_decay, run.optim.clip_norm)
    assert optimiser == (0.9, 0.95, 0.1, 1.0)
    assert (run.optim.schedule, run.optim.final_fraction) == ("cosine", 0.1)
    shares = {s.name: s.weight for s in run.data.sources}
    assert sum(shares.values()) == 100
    assert shares["commoncrawl"] == 67


@pytest.mark.parametrize(
    ("stem", "length", "tokens", "rate"),
    [
        ("llama2_7b", 4096, 2e12, 3e-4),
        ("llama2_13b", 4096, 2e12, 3e-4),
        ("llama2_70b", 4096, 2e12, 1.5e-4),
        ("llama3_8b", 8192, 15e12, 3e-4),
        ("llama3_70b", 8192, 15e12, 1.5e-4),
        ("llama31_405b", 131_072, 800e9, 8e-5),
    ],
)
def test_later_papers_context_tokens_and_rate(stem, length, tokens, rate):
    run = frozen(stem)
    assert run.data.seq_len == length
    assert run.train.steps * run.tokens_per_step == pytest.approx(tokens, rel=1e-4)
    assert run.optim.learning_rate == rate


def test_eps_and_rope_follow_the_checkpoints():
    assert sizes.LLAMA_7B.norm_eps == sizes.LLAMA_33B.norm_eps == 1e-6
    assert sizes.LLAMA_65B.norm_eps == sizes.LLAMA2_7B.norm_eps == 1e-5
    assert (sizes.LLAMA2_70B.rope.theta, sizes.LLAMA3_8B.rope.theta) == (10_000, 500_000)
    assert (sizes.LLAMA3_8B.rope.factor, sizes.LLAMA31_8B.rope.factor) == (1, 8)
    assert sizes.LLAMA32_1B.rope.factor == sizes.LLAMA32_3B.rope.factor == 32
    assert {sizes.LLAMA32_1B.output, sizes.LLAMA31_8B.output} == {"tied", "untied"}


def test_sizes_agree_with_the_published_config_files(shared):

    for name, file in {
        "LLAMA2_7B": "Llama-2-7b-hf",
        "LLAMA2_70B": "Llama-2-70b-hf",
        "LLAMA3_8B": "Meta-Llama-3-8B",
        "LLAMA31_8B": "Llama-3.1-8B-Instruct",
        "LLAMA32_1B": "Llama-3.2-1B-Instruct",
    }.items():
        theirs = json.loads(shared(f"configs/hf/{file}.config.json").read_text())
        model = getattr(sizes, name)
        scaling = theirs.get("rope_scaling") or {}
        assert (model.dim, model.layers, model.heads, model.kv_heads, model.ffn_dim) == tuple(
            theirs[key]
            for key in (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size",
            )
        )  # fmt: skip
        assert model.norm_eps == theirs["rms_norm_eps"]
        assert model.vocab_size == theirs["vocab_size"]
        assert model.rope.theta == theirs.get("rope_theta", 10_000)
        assert model.rope.factor == scaling.get("factor", 1)
        assert (model.output == "tied") == theirs["tie_word_embeddings"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_page_fits_a_slice_and_is_sharded_on_it(path):
    name = "v4_8" if path.stem.startswith(("research", "tiny")) else "v5p_1024"
    run = config.freeze(load(path).get_config(name))
    layout = sharding.abstract(run.mesh, hardware.SLICES[name].devices)
    transformer.build(run.model, layout)
    layout.check_rows(run.train.batch_size // run.train.microbatches)


def test_old_slices_hold_the_sizes_that_fit():
    assert config.freeze(load(ROOT / "configs/research_1b.py").get_config("v2_8")).mesh.hardware
    assert config.freeze(load(ROOT / "configs/llama32_1b.py").get_config("v3_8")).mesh.hardware
    assert config.freeze(load(ROOT / "configs/7b.py").get_config("v3_32")).mesh.hardware


def test_headers_have_the_compilers_figures():
    """Of the configs that `make compile-all` has compiled; after compiling anew, mend the headers."""
    kept, found = scale.read(), 0
    for stem, name in (*scale.SMALL, *scale.CONFIGS):
        run = scale.best(stem, name)
        if not (entry := kept.get(scale.key_of(run))) or "does_not_fit" in entry["compiled"]:
            continue
        plan, page = scale.plan_of(run, entry), importlib.import_module(f"configs.{stem}")
        (line,) = (
            line for line in page.__doc__.splitlines() if line.strip().startswith(f":{name} ")
        )
        assert f" {plan.hbm_gib_per_chip:.1f} GiB of " in line
        assert f"MFU {100 * plan.mfu_low:.0f} to " in line
        found += 1
    if not found:
        pytest.skip("make compile-all has compiled none of them with this libtpu yet")
