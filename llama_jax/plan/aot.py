"""Compile a step for a TPU slice that is not there. It takes libtpu, the compiler, and no TPU.

libtpu looks for a TPU host around it, locks a file and writes to the terminal: it runs in a process of its
own, with an environment that keeps it quiet, and nothing of it reaches the process that asked.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from llama_jax import config, sharding
from llama_jax.analysis import flops, hardware
from llama_jax.plan import hlo, trace
from llama_jax.plan.hlo import Compiled
from llama_jax.plan.trace import Texts

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    # Else libtpu asks the cloud's metadata server, and says that it found none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    **dict.fromkeys(("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"), "3"),
    # Its lock guards a real TPU; compilers side by side do not disturb one another.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GiB = 2**30
# This package, and where `make test` puts libtpu: beside the other packages, since a JAX that finds it looks
# for a TPU at every start and complains that there is none.
PLACES = (str(Path(config.__file__).resolve().parents[2]), str(Path(sys.prefix) / "libtpu"))


class DoesNotFit(ValueError):
    """The compiler ran out of the slice's memory."""


def compile(run: config.Run, name: str, texts: Texts | None = None) -> Compiled:
    """Figures of `run` on the slice `name`. DoesNotFit, or ValueError on what cannot be compiled.

    Of the training step or, with `texts`, of a token of each.
    """
    path = [*PLACES, *sys.path]
    if PathFinder.find_spec("libtpu", path) is None:
        raise ValueError(
            "compiling for a TPU needs libtpu; install it with: pip install -e '.[tpu]'"
        )
    request = json.dumps({"run": config.to_dict(run), "slice": name, "texts": texts})
    child = subprocess.run(
        [sys.executable, "-c", "from llama_jax.plan import aot; aot.answer()"],
        input=request,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    last = (child.stdout.strip().splitlines() or [""])[-1]
    try:
        answer = json.loads(last)
    except ValueError:
        told = child.stderr.strip().splitlines() or ["it ended without a word"]
        raise ValueError(f"the TPU compiler failed on {name}: {told[-1][:500]}") from None
    if message := answer.get("does_not_fit"):
        raise DoesNotFit(message)
    if message := answer.get("error"):
        raise ValueError(message)
    return Compiled.from_dict(answer)


def answer() -> None:
    """The other process: one request on standard input, one line of JSON on standard output."""
    request = json.load(sys.stdin)
    try:
        run, texts = config.from_dict(request["run"]), request["texts"]
        said = _compile(run, request["slice"], Texts(*texts) if texts else None).to_dict()
    except ValueError as error:
        said = {"error": str(error)}
    except Exception as error:  # JAX raises the compiler's errors as RuntimeErrors of its own
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = {"does_not_fit": _short(str(error))}
    sys.stdout.write(json.dumps(said) + "\n")


def _compile(run: config.Run, name: str, texts: Texts | None) -> Compiled:
    start = time.monotonic()
    layout = sharding.make(run.mesh, devices(hardware.find_slice(name)))
    traced = trace.decoding(run.model, layout, texts) if texts else trace.training(run, layout)
    executed = flops.executed(traced.jaxpr.jaxpr)
    options = hardware.compiler_options(hardware.find_slice(name).device)
    with tempfile.TemporaryDirectory() as dump:
        # as_text() of the compiled program fails on some generations; what is dumped is the same.
        compiled = traced.lower().compile(
            {**options, "xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        )
        (file,) = Path(dump).glob(f"*jit_{traced.fun_name}*after_codegen.txt")
        scheduled = hlo.read(file.read_text())
    stats = compiled.memory_analysis()
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    added = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Compiled(
        hbm_gib=(arguments + temporary + added) / GiB,
        argument_gib=arguments / GiB,
        temporary_gib=temporary / GiB,
        cycles=hlo.cycles(scheduled),
        flops=executed.total / layout.mesh.size,
        kernel_flops=executed.kernels / layout.mesh.size,
        collectives=hlo.merged(hlo.collectives(scheduled)),
        seconds=time.monotonic() - start,
    )


def devices(slice_: hardware.Slice) -> list:
    """The devices of a slice, good for compiling only."""
    from jax.experimental import topologies

    settings: dict[str, Any] = {"num_slices": slice_.slices} if slice_.slices > 1 else {}
    if slice_.device == "TPU v4":
        settings["chip_config_name"] = "megacore"  # one device a chip
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=slice_.topology, **settings
    )
    return described.devices


def _short(message: str) -> str:
    """The sentence of the compiler's pages that says how much is missing."""
    for line in message.splitlines():
        if "exceed" in line.lower() or "Used" in line:
            return line.strip()[:300]
    return message.splitlines()[0][:300]
