"""Documentation runs: every command of README.md and docs/, shortened, and every path that the documents name."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs import tiny
from llama_jax import config
from tests.experiments import helpers

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SHORT = ["--config.train.steps=3", "--config.optim.warmup_steps=1", "--config.eval.rows=8"]
Words = tuple[str, ...]


def commands(text: str) -> list[Words]:
    """`python ...` lines of shell blocks, continuations joined; what stands twice, once."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if "python -" in line:
                words = shlex.split(line.split("#")[0].strip().removesuffix("&"))
                found.append(tuple(words[words.index("python") + 1 :]))
    return list(dict.fromkeys(found))


def of(page: str, *modules: str) -> list[Words]:
    """A page's commands of some modules, those that differ in more than where they write."""
    found = [c for c in commands(PAGES[page]) if c[1].removeprefix("experiments.") in modules]
    return list(
        {tuple(w for w in words if "--workdir" not in w): words for words in found}.values()
    )


TRAINED = of("training", "train") + of("data", "train", "train_tokenizer")


def test_all_commands_are_tested_below():
    """A command of a new page or module needs a test that runs it."""
    groups = {
        "training": {"train"},
        "data": {"train", "train_tokenizer"},
        "weights": {"convert", "generate"},
        "generation": {"generate"},
        "quantisation": {"quantise", "generate"},
        "planning": {"plan"},
        "launching": {"launch"},
        "ablations": {"ablate", "scaling"},
    }
    for page, text in PAGES.items():
        modules = {c[1].removeprefix("experiments.") for c in commands(text) if c[0] == "-m"}
        assert modules == groups.get(page, set()), page
    assert [c[1] for c in commands(README)] == ["experiments.generate", "experiments.convert"]
    assert len(TRAINED) >= 3


@pytest.mark.parametrize("page", ["training", "data", "generation"])
def test_settings_that_sentences_name_can_be_set(page):
    """On tiny's config, and on that of generating."""
    settings = re.findall(r"`--config\.([\w.]+)=([^` $']+)`", PAGES[page])
    assert settings
    for place, value in settings:
        edited = tiny.get_config()
        if place.startswith("decode."):
            edited = config.edit(config.Decode())
            place = place.removeprefix("decode.")
        number = value.lstrip("-").replace(".", "").isdigit()
        typed = (float if "." in value else int)(value) if number else value
        edited.update_from_flattened_dict({place: typed})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache, so that the standard library is tokenised once."""
    return tmp_path_factory.mktemp("cache")


# Those that train a tokenizer of their own are slow.
TRAINED = [
    pytest.param(
        words, id=" ".join(words), marks=pytest.mark.slow if "books/" in " ".join(words) else []
    )
    for words in TRAINED
]


@pytest.mark.parametrize("words", TRAINED)
def test_a_documented_run_trains(words, tmp_path, cache):
    _, module, *flags = words
    flags = [re.sub(r"=/tmp/", f"={tmp_path}/", flag) for flag in flags]
    if any("books/" in flag for flag in flags):
        (tmp_path / "books").mkdir()
        for package in ("model", "data", "train", "tokenizer"):  # text enough for 1024 pieces
            files = sorted((ROOT / "llama_jax" / package).glob("*.py"))
            text = "".join(path.read_text() for path in files)
            (tmp_path / "books" / f"{package}.txt").write_text(text)
        flags = [flag.replace("books/", f"{tmp_path}/books/") for flag in flags]
    flags += [f"--config.data.cache={cache}"]
    flags += SHORT if module == "experiments.train" else []
    done = helpers.run(module.removeprefix("experiments."), *flags)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout or "wrote" in done.stdout


# tests/house/test_tutorial.py runs the study of the tutorial, whose config the tutorial itself writes.
STUDIES = [words for words in of("ablations", "ablate") if "kerple" not in " ".join(words)]


@pytest.mark.parametrize("words", STUDIES, ids=" ".join)
def test_a_documented_study_can_start(words):
    """Every run planned and checked; tests/experiments/test_ablate.py runs them, smaller."""
    done = helpers.run("ablate", *dict.fromkeys([*words[2:], "--list"]))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) in (8, 12)


@pytest.mark.parametrize("words", of("ablations", "scaling"), ids=" ".join)
def test_a_documented_law_is_fitted(words, tmp_path):
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
    writes = any("output" in flag for flag in flags)
    assert not writes or (tmp_path / "scaling/scaling.png").exists()


@pytest.mark.parametrize("words", of("launching", "launch"), ids=" ".join)
def test_a_documented_launch_prints_what_it_would_do(words):
    done = helpers.run("launch", *words[2:])
    assert done.returncode == 0, done.stderr
    assert "-m experiments.train --config=configs/" in done.stdout


def decodes(words: Words) -> bool:
    return any("--decode" in word for word in words)


# Those of decoding call TPU's compiler.
PLANNED = [
    pytest.param(words, id=" ".join(words), marks=pytest.mark.slow if decodes(words) else [])
    for words in of("planning", "plan")
]


@pytest.mark.parametrize("words", PLANNED)
def test_a_documented_plan_fits(words):
    """By formula; tests/plan calls the compiler. Plans of decoding are made for two layers."""
    decode = decodes(words)
    more = ["--config.model.layers=2"] if decode else ["--analytic"]
    done = helpers.run("plan", *dict.fromkeys([*words[2:], *more]))
    assert done.returncode == 0, done.stderr
    assert ("tokens/s of each text" if decode else "v4_") in done.stdout


def test_documented_weights_come_in_write_and_leave(tmp_path):
    """The commands of the page, in their order: both sides print the same text."""
    pytest.importorskip("transformers")
    first, generate, export, theirs, *_ = commands(PAGES["weights"])
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
    page = PAGES["weights"]
    quoted = re.search(r"print `(Once upon .*?) \.\.\.`", page.replace("\n", " "))[1]
    assert said[1].startswith(quoted)
    found = re.search(r"```\n(.*?)```", page.split("what it found:")[1], re.S)[1]
    for line in found.splitlines():
        if "written" not in line:
            printed = said[0].replace(" output, ", " output,\n")
            assert line.strip().split("stories260K.bin")[-1] in printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a few steps, for the networks that the documents name."""
    folder = tmp_path_factory.mktemp("trained")
    done = helpers.run("train", *helpers.arguments(folder, "--config.train.steps=3"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def on_it(words: Words, trained: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """A command with that network for the one it names, writing into tmp_path, shortened."""
    places = {
        "=runs/tiny": f"={trained}",
        "=/tmp/stories": f"={trained}",
        "=/tmp/": f"={tmp_path}/",
    }
    places["=prompts"] = f"={tmp_path}/prompts"
    flags = [re.sub("|".join(places), lambda found: places[found[0]], w) for w in words[2:]]
    if words[1].endswith("generate"):
        flags += ["--config.decode.max_new_tokens=8"]
    done = helpers.run(words[1].removeprefix("experiments."), *flags, stdin="hi\n/reset\nyes\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done


@pytest.mark.slow
def test_what_was_trained_leaves_and_shrinks_as_documented(trained, tmp_path):
    for words in dict.fromkeys(commands(README) + commands(PAGES["weights"])[-2:]):
        on_it(words, trained, tmp_path)
    *_, last = [on_it(words, trained, tmp_path) for words in commands(PAGES["quantisation"])]
    assert last.stdout.startswith("import os")


@pytest.mark.slow
def test_generating_is_as_documented(trained, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2 w3"}\n')
    ways = commands(PAGES["generation"])
    assert len(ways) == 4
    for words in ways:
        on_it(words, trained, tmp_path)
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_lines_for_python_run(trained, tmp_path):
    """With prompts of the words that this network knows."""
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.S)
    lines = lines.replace("runs/tiny", str(trained)).replace(
        "max_new_tokens=40", "max_new_tokens=4"
    )
    check = "assert logits_BTV.shape == (1, len(tokens), module.config.vocab_size) and loss > 0 and text"
    done = subprocess.run(
        [sys.executable, "-c", lines + check],
        cwd=ROOT,
        env=helpers.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


DOCUMENTS = ["README.md", "LOG.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in PAGES)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_configs_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
    written = re.findall(r"# (configs/[\w/]+\.py)\n", text)  # by the tutorial itself
    for path in set(re.findall(r"configs/[a-z0-9_/]+\.py", text)) - set(written):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_table_of_configs_is_complete():
    others = {"__init__", "base", "hardware", "mixtures", "sizes"}
    stems = {p.stem for p in (ROOT / "configs").glob("*.py")} - others
    table = PAGES["training"].split("| config |")[1].split("\n\n")[0]
    listed = set(re.findall(r"`(\w+)`", table))
    listed |= {"research" + name for name in listed if name.startswith("_")}
    assert stems <= listed


def test_the_architecture_lists_every_package():
    text = PAGES["architecture"]
    for path in (ROOT / "llama_jax").rglob("*.py"):
        if not path.stem.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", text), path
