"""Documentation runs: every command of README.md, shortened, and every path that the documents name."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs import tiny
from llama_jax import config, sharding
from llama_jax.model import transformer
from tests.experiments import helpers

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHORT = ["--config.train.steps=3", "--config.optim.warmup_steps=1", "--config.eval.rows=8"]


WEIGHTS, TEXTS, SMALLER, PLANS, STUDIES = (
    README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    for title in ("Weights", "Generating", "Smaller weights", "Before a slice starts", "Ablations")
)
OTHERS = README
for section in (WEIGHTS, TEXTS, SMALLER, PLANS, STUDIES):
    OTHERS = OTHERS.replace(section, "")


def commands(text: str = OTHERS) -> list[list[str]]:
    """`python -m experiments...` lines of shell blocks, continuations joined; what stands twice, once."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if "python -" in line:
                words = shlex.split(line.split("#")[0].strip().removesuffix("&"))
                found.append(tuple(words[words.index("python") + 1 :]))
    return list(dict.fromkeys(found))


def test_the_settings_that_the_readme_changes_can_be_changed():
    """Those that stand in its sentences, on the config of its first commands."""
    found = re.findall(
        r"`--config\.([\w.]+)=([^` ]+)`", README.split("\n## Train\n")[1].split("\n## ")[0]
    )
    assert ("model.layers", "2") in found
    for place, value in found:
        edited = tiny.get_config()
        edited.update_from_flattened_dict(
            {place: int(value) if value.lstrip("-").isdigit() else value}
        )
        transformer.build(config.freeze(edited).model, sharding.abstract(config.Mesh(), 1))


def different() -> list[tuple[str, ...]]:
    """Those that differ in more than where they write."""
    return list(
        {tuple(w for w in words if "--workdir" not in w): words for words in commands()}.values()
    )


def test_there_are_commands():
    assert len(different()) >= 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache, so that the standard library is tokenised once."""
    return tmp_path_factory.mktemp("cache")


# Those that train a tokenizer of their own are slow.
DIFFERENT = [
    pytest.param(
        words, id=" ".join(words), marks=pytest.mark.slow if "books/" in " ".join(words) else []
    )
    for words in different()
]


@pytest.mark.parametrize("words", DIFFERENT)
def test_a_command_of_the_readme_runs(words, tmp_path, cache):
    _, module, *flags = words
    flags = [re.sub(r"=/tmp/", f"={tmp_path}/", flag) for flag in flags]
    if any("books/" in flag for flag in flags):
        (tmp_path / "books").mkdir()
        for room in (
            "model",
            "data",
            "train",
            "tokenizer",
        ):  # our code: text enough for 1024 pieces
            parts = [path.read_text() for path in sorted((ROOT / "llama_jax" / room).glob("*.py"))]
            (tmp_path / "books" / f"{room}.txt").write_text("".join(parts))
        flags = [flag.replace("books/", f"{tmp_path}/books/") for flag in flags]
    flags += [f"--config.data.cache={cache}"]
    flags += SHORT if module == "experiments.train" else []
    done = helpers.run(module.removeprefix("experiments."), *flags)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout or "wrote" in done.stdout


def of(module: str, text: str = PLANS) -> list[tuple[str, ...]]:
    return [words for words in commands(text) if words[1] == f"experiments.{module}"]


@pytest.mark.parametrize("words", of("ablate", STUDIES), ids=" ".join)
def test_a_study_of_the_readme_can_start(words):
    """Every run planned and checked; tests/experiments/test_ablate.py runs them, smaller."""
    done = helpers.run("ablate", *dict.fromkeys([*words[2:], "--list"]))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) in (8, 12)


@pytest.mark.parametrize("words", of("scaling", STUDIES), ids=" ".join)
def test_a_law_of_the_readme_is_fitted(words, tmp_path):
    """Where it names runs: cards of twelve, of four sizes and three lengths."""
    for i, (n, d) in enumerate((n, d) for n in (1e6, 2e6, 4e6, 8e6) for d in (1e8, 4e8, 16e8)):
        (tmp_path / f"runs/{i}").mkdir(parents=True)
        results = {"validation_loss": 1.7 + 400 / n**0.34 + 410 / d**0.28}
        card = {"parameters": n, "tokens": d, "results": results, "provenance": {"data": "a"}}
        card["config"] = {"model": {"position": "rope", "dim": n}}
        (tmp_path / f"runs/{i}/runcard.json").write_text(json.dumps(card))
    places = {"=runs/": f"={tmp_path}/runs/", "=/tmp/": f"={tmp_path}/"}
    flags = [re.sub("=runs/|=/tmp/", lambda found: places[found[0]], flag) for flag in words[2:]]
    done = helpers.run("scaling", *flags, "--draws=20")
    assert done.returncode == 0, done.stderr
    assert "alpha" in done.stdout
    assert (
        not any("output" in flag for flag in flags) or (tmp_path / "scaling/scaling.png").exists()
    )


@pytest.mark.parametrize("words", of("launch"), ids=" ".join)
def test_a_launch_of_the_readme_prints_what_it_would_do(words):
    done = helpers.run("launch", *words[2:])
    assert done.returncode == 0, done.stderr
    assert "-m experiments.train --config=configs/" in done.stdout


def decodes(words: tuple[str, ...]) -> bool:
    return any("--decode" in word for word in words)


# Those of decoding call TPU's compiler.
PLANNED = [
    pytest.param(words, id=" ".join(words), marks=pytest.mark.slow if decodes(words) else [])
    for words in of("plan")
]


@pytest.mark.parametrize("words", PLANNED)
def test_a_plan_of_the_readme_fits(words):
    """By formula; tests/plan calls the compiler. Plans of decoding are made for two layers."""
    decode = decodes(words)
    more = ["--config.model.layers=2"] if decode else ["--analytic"]
    done = helpers.run("plan", *dict.fromkeys([*words[2:], *more]))
    assert done.returncode == 0, done.stderr
    assert ("tokens/s of each text" if decode else "v4_") in done.stdout


def test_the_weights_of_the_readme_come_in_write_and_leave(tmp_path):
    """The commands of the section, in their order: both sides print the same text."""
    pytest.importorskip("transformers")
    first, generate, export, theirs, *_ = commands(WEIGHTS)
    said = []
    for words in (first, generate, export, theirs):
        words = [word.replace("/tmp/", f"{tmp_path}/") for word in words]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=helpers.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[3] == f"<s> {said[1]}"
    quoted = re.search(r"print `(Once upon .*?) \.\.\.`", WEIGHTS.replace("\n", " "))[1]
    assert said[1].startswith(quoted)
    for line in re.search(r"```\n(.*?)```", WEIGHTS.split("what it found:")[1], re.S)[
        1
    ].splitlines():
        if "written" not in line:
            assert line.strip().split("stories260K.bin")[-1] in said[0].replace(
                " output, ", " output,\n"
            )


@pytest.mark.slow
def test_what_was_trained_leaves_as_the_readme_says(tmp_path):
    """The last block, with a run of a few steps for make train's."""
    trained = helpers.run("train", *helpers.arguments(tmp_path, "--config.train.steps=3"))
    assert trained.returncode == 0, trained.stderr
    for _, module, *flags in commands(WEIGHTS)[-2:]:
        flags = [flag.replace("runs/tiny", str(tmp_path / "run")) for flag in flags]
        flags = [flag.replace("/tmp/tiny", f"{tmp_path}/tiny") for flag in flags]
        flags += ["--config.decode.max_new_tokens=8"] if module.endswith("generate") else []
        done = helpers.run(module.removeprefix("experiments."), *flags)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_generating_is_as_the_readme_says(tmp_path):
    """Every way, with a run of a few steps for the networks that the README names."""
    trained = helpers.run("train", *helpers.arguments(tmp_path, "--config.train.steps=3"))
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2 w3"}\n')
    ways = commands(TEXTS)
    assert len(ways) == 4
    for words in ways:
        words = [re.sub("=(runs/tiny|/tmp/stories)", f"={tmp_path}/run", word) for word in words]
        words = [re.sub("=(prompts|/tmp/texts)", f"={tmp_path}/\\1", word) for word in words]
        words = [word.replace("/tmp/texts", "texts") for word in words]
        module, *flags = words[1:]
        flags += ["--config.decode.max_new_tokens=8"]
        done = helpers.run(module.removeprefix("experiments."), *flags, stdin="hi\n/reset\nyes\n")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_weights_become_smaller_as_the_readme_says(tmp_path):
    trained = helpers.run("train", *helpers.arguments(tmp_path, "--config.train.steps=3"))
    assert trained.returncode == 0, trained.stderr
    for _, module, *flags in commands(SMALLER):
        places = {"=runs/tiny": f"={tmp_path}/run", "=/tmp/": f"={tmp_path}/"}
        flags = [re.sub("=runs/tiny|=/tmp/", lambda found: places[found[0]], f) for f in flags]  # noqa: B023
        flags += ["--config.decode.max_new_tokens=8"] if module.endswith("generate") else []
        done = helpers.run(module.removeprefix("experiments."), *flags)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "LOG.md"])
def test_links_and_pages_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for page in re.findall(r"configs/[\w/]+\.py", text):
        assert (ROOT / page).exists(), page


def test_the_table_of_pages_is_complete():
    stems = {p.stem for p in (ROOT / "configs").glob("*.py")} - {
        "__init__",
        "base",
        "hardware",
        "mixtures",
        "sizes",
    }
    listed = set(re.findall(r"`(\w+)`", README.split("| page |")[1].split("\n\n")[0]))
    listed |= {"research" + name for name in listed if name.startswith("_")}
    assert stems <= listed


def test_the_architecture_lists_every_room():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "llama_jax").rglob("*.py"):
        if not path.stem.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", text), path
