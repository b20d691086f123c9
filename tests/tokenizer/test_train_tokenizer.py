"""The command `python -m experiments.train_tokenizer`."""

import json
import subprocess
import sys

from llama_jax.tokenizer import sp

PAGE = """
from llama_jax import config

def get_config():
    source = config.Source(name="own", kind="files", path="{folder}/*.txt")
    data = config.Data(sources=(source,), seq_len=8, cache="{folder}/cache")
    return config.edit(config.Run(data=data))
"""


def command(root, *args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.train_tokenizer", *args],
        cwd=root,
        capture_output=True,
        text=True,
    )


def test_writes_a_tokenizer_and_says_how_well_it_does(tmp_path, request):
    text = "".join(f"{i} rope gate {i * i % 97} norm\n" for i in range(900))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "page.py").write_text(PAGE.format(folder=tmp_path))
    args = [f"--config={tmp_path}/page.py", f"--out={tmp_path}/t.model"]
    done = command(request.config.rootpath, *args, "--vocab_size=290")
    assert done.returncode == 0, done.stderr
    tokenizer = sp.load(str(tmp_path / "t.model"))
    assert tokenizer.vocab_size == 290
    held_out = text[int(len(text) * 0.95) :]
    held_out = text[len(text[: -len(held_out)].rpartition("\n")[0]) + 1 :]
    ratio = len(held_out) / len(tokenizer.encode(held_out))
    assert f"held-out text: {ratio:.3f} bytes/token ({len(held_out)} bytes)" in done.stdout

    failed = command(request.config.rootpath, *args, "--vocab_size=9000")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: a vocabulary of 9000 pieces is too large")
    assert len(failed.stderr.splitlines()) == 1


def test_text_of_which_nothing_is_held_out_is_said(tmp_path, request):
    """One record, which the split gives to training."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "rope gate norm\n" * 90}))
    (tmp_path / "page.py").write_text(PAGE.format(folder=tmp_path).replace("*.txt", "*.jsonl"))
    args = [f"--config={tmp_path}/page.py", f"--out={tmp_path}/t.model", "--vocab_size=275"]
    done = command(request.config.rootpath, *args)
    assert done.returncode == 0, done.stderr
    assert "held-out text: none" in done.stdout
