"""What every command shares: how GPUs are taken, and what a mistyped command line is told."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jaxlib import xla_client

from experiments import cli
from tests.experiments import helpers


def test_jax_takes_the_share_of_a_gpu_that_layouts_count_on(monkeypatch):
    """Before it starts; what the user has set, under either name, stays."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.setenv(name, "restored after the test")
        monkeypatch.delenv(name)
    cli._guarded(lambda: 0, ())
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.93
    for name in names:
        for other in names:
            os.environ.pop(other, None)
        monkeypatch.setenv(name, "0.5")
        cli._guarded(lambda: 0, ())
        assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5


def test_every_flag_that_is_a_path_refuses_the_address_of_a_bucket():
    """But those of launch, whose paths are on the hosts."""
    paths = {"workdir", "from", "to", "tokenizer", "checkpoint", "draft", "input", "output", "text"}
    paths |= {"runs", "out"}
    found = set()
    for file in sorted(Path(cli.__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            function = getattr(getattr(call, "func", None), "attr", "")
            if not function.startswith(("DEFINE", "define_path")) or file.name == "launch.py":
                continue
            name = getattr(call.args[0], "value", "")
            if name in paths:
                assert function == "define_path", f"{file.name}: --{name}"
                found.add(name)
    assert found == paths
    with pytest.raises(ValueError, match=r"mount the bucket with .* and give ~/bucket/x/y"):
        cli._Path().parse("gs://b/x/y")
    assert cli._Path().parse("~/a/b:c") == "~/a/b:c"


TINY = ("--config=tiny", "--workdir=/nowhere/x")
MISTYPED = {
    "nothing": ("train", [], "--config and --workdir must be given, as in\n  python -m experiments.train --config="),
    "no config": ("plan", ["--analytic"], "--config must be given, as in\n  python -m experiments.plan --config="),
    "no checkpoint": ("generate", ["--prompt=a"], "--checkpoint must be given, as in\n  python -m experiments.gen"),
    "config": (
        "train", ["--config=configs/tin.py", TINY[1]],
        r"--config=configs/tin.py is not there; nearest: --config=configs/tiny.py; .*, 7b, .*ablations/position, ",
    ),
    "study": ("ablate", ["--config=posi"], r"nearest: --config=configs/ablations/position.py;"),
    "config alone": ("train", ["configs/7b.py", *TINY], r"argument 'configs/7b.py'; try --config=configs/7b.py"),
    "setting as a flag": ("train", [*TINY, "--steps=60"], "flag --steps; nearest: --config.train.steps$"),
    "two of them": (
        "train", [*TINY, "--seed=1"], "flag --seed; nearest: --config.data.seed or --config.train.seed$",
    ),
    "decoding": ("generate", ["--temperature=0.8"], "--temperature; nearest: --config.decode.temperature$"),
    "flag": ("train", ["--confg=configs/tiny.py"], "unknown flag --confg; nearest: --config$"),
    "flag of another": ("scaling", ["--rums=x"], "unknown flag --rums; nearest: --runs$"),
    "initials": ("train", [*TINY, "--config.optim.lr=1"], "nearest: --config.optim.learning_rate$"),
    "words": ("train", [*TINY, "--config.model.n_layers=1"], "nearest: --config.model.layers$"),
    "other part": ("train", [*TINY, "--config.train.warmup_steps=1"], "nearest: --config.optim.warmup_steps$"),
    "tokens": (
        "train", [*TINY, "--config.train.tokens=20e9"],
        r"unknown setting --config.train.tokens; .* train.steps x train.batch_size x data.seq_len: set",
    ),
    "no number": ("train", [*TINY, "--config.train.steps=abc"], "--config.train.steps='abc' must be a number$"),
    "half": ("train", [*TINY, "--config.train.steps=1.5"], "train.steps='1.5' must be a whole number$"),
    "no rate": ("generate", ["--config.decode.top_p=x"], "--config.decode.top_p='x' must be a number$"),
    "study's": ("ablate", ["--config=ablations/ffn", "--config.seeds=x"], "--config.seeds='x' must be a number$"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_command_line_is_told_the_nearest(name):
    command, args, message = MISTYPED[name]
    done = helpers.run(command, *args)
    assert done.returncode == 2
    assert re.match(
        f"error: .*{message}" if "nearest" in message else f"error: .*?{message}",
        done.stderr.strip(),
        re.S,
    ), done.stderr
    assert "Traceback" not in done.stderr


def test_numbers_and_choices_may_be_written_otherwise():
    argv = [
        "train",
        "--config.train.steps=1e3",
        "--config.log.wandb=True",
        "--config.log.audit=false",
    ]
    argv += [
        "--config.model.layers=2",
        "--config.optim.learning_rate=1e-3",
        "--config.train.seed=1_0",
    ]
    settings = {
        "train.steps": 5,
        "train.seed": 0,
        "log.wandb": "off",
        "log.audit": "on",
        "model.layers": 4,
    }
    cli._check_settings(argv, {**settings, "optim.learning_rate": 0.1})
    values = [word.partition("=")[2] for word in argv[1:]]
    assert values == ["1000", "on", "off", "2", "1e-3", "1_0"]


def test_a_config_may_be_called_by_its_name_from_anywhere(monkeypatch, tmp_path):
    assert cli.find_config("tiny") == cli.find_config("configs/tiny") == "configs/tiny.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    assert cli.find_config("mine.py") == "mine.py"
    assert cli.find_config("ablations/norm") == str(helpers.ROOT / "configs/ablations/norm.py")


def test_the_package_lists_its_commands():
    done = subprocess.run(
        [sys.executable, "-m", "experiments"], cwd=helpers.ROOT, capture_output=True, text=True
    )
    listed = set(re.findall(r"^python -m experiments\.(\w+) +\w", done.stdout, re.M))
    files = {path.stem for path in (helpers.ROOT / "experiments").glob("*.py")}
    assert listed == files - {"__init__", "__main__", "cli"}, "what is no command is in llama_jax"
    assert "train" in listed
    library = subprocess.run(
        [sys.executable, "-m", "llama_jax"], cwd=helpers.ROOT, capture_output=True, text=True
    )
    assert "python -m experiments lists the commands" in library.stderr


def test_help_names_config_where_its_settings_are_and_the_flags_of_hosts():
    done = helpers.run("train", "--help")
    assert "--config: The config file, as configs/7b.py" in done.stdout
    assert "llama_jax/config lists them" in " ".join(done.stdout.split())
    assert "--coordinator: " in done.stdout


def test_importing_a_command_neither_reads_the_command_line_nor_ends_the_process():
    code = "from experiments import generate; print(generate.CONFIG.value)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config.decode.nothing=1"], cwd=helpers.ROOT,
        env=helpers.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "unknown setting" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("KeyError: 'config'"), "it is not parsed yet"
