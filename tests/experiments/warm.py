"""Run commands without the two seconds that importing JAX takes.

A process imports the library once and forks for each command. The child is a process of its own, with the
command's arguments, environment, input and exit code; only its imports are there already.
"""

import atexit
import functools
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(
    words: list[str], env: dict[str, str], timeout: float, stdin: str = ""
) -> subprocess.CompletedProcess:
    """`python -m words` in the repository, as `subprocess.run` with captured text."""
    read_at_import = {name: value for name, value in env.items() if name.startswith("JAX_")}
    server = _server(tuple(sorted(read_at_import.items())))
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_text(stdin)
        server.stdin.write(json.dumps({"words": words, "env": env, "files": files}) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
            server.stdout.readline()
            raise subprocess.TimeoutExpired(words, timeout)
        code = int(server.stdout.readline())
        output, errors = (Path(file).read_text() for file in files[1:])
    return subprocess.CompletedProcess(words, code, output, errors)


@functools.cache
def _server(settings: tuple) -> subprocess.Popen:
    """A process whose JAX was imported with these settings of the environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.warm"], cwd=ROOT, text=True,
        env={**env, **dict(settings)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _serve() -> list[str]:
    """In the server: fork for each request. Returns in the child, with the words of its command."""
    import llama_jax

    for module in pkgutil.walk_packages(llama_jax.__path__, "llama_jax."):
        importlib.import_module(module.name)
    # JAX warns of threads that a child would lack; they start with the first array, in the child.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.environ.clear()
        os.environ.update(request["env"])
        for number, (file, mode) in enumerate(zip(request["files"], "rww", strict=True)):
            with open(file, mode) as opened:
                os.dup2(opened.fileno(), number)
        sys.stdin = open(0)  # noqa: SIM115 for the rest of the process
        return request["words"]
    sys.exit()


if __name__ == "__main__":
    module, *rest = _serve()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
