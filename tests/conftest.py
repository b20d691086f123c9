"""Eight simulated devices, few threads, no network; fixtures that many tests share."""

import os
import platform
from importlib import metadata
from pathlib import Path

# Compiling is most of the time of small tests: leave the optimiser of LLVM out, and XLA's fusion emitters (27 s of
# processor time for tests/model/test_transformer.py, 14 s without). JAX after 0.10 has no such flag.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
    * metadata.version("jaxlib").startswith("0.10.")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# And compile once what several tests, or the suite's next run on this machine, ask for.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).resolve().parents[1] / ".pytest_cache" / f"xla-{platform.node()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import signal

import jax
import pytest

from tests import letters

letters.install()  # before anything of llama_jax is imported

from llama_jax import config, sharding  # noqa: E402

# Programs of eight simulated devices that are under way at the same time can wait for each other's threads; XLA
# ends the process after 40 s. Commands have the same setting (experiments/cli.py).
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A suite started in the background of a shell inherits an ignored SIGINT, and so would the commands it
# starts; with a handler in their parent they begin with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that others wrote: those that the repository may carry, and those beside it (tests/data/PROVENANCE.md).
TESTS = Path(__file__).resolve().parent
SHARED = (TESTS / "data", TESTS.parents[1] / "shared" / "data")

# All sizes different, so that a swapped axis fails.
MODEL = config.Model(
    vocab_size=41,
    dim=24,
    layers=2,
    heads=6,
    kv_heads=3,
    head_dim=4,
    ffn_dim=20,
    compute_dtype="float32",
)


@pytest.fixture
def model():
    return MODEL


@pytest.fixture(scope="session")
def layout():
    """One device."""
    return sharding.make(config.Mesh(), jax.devices()[:1])


@pytest.fixture(scope="session")
def shared():
    """A file that others wrote, by its path; the test is skipped where it is absent."""

    def find(path: str) -> Path:
        for folder in SHARED:
            if (folder / path).exists():
                return folder / path
        pytest.skip(
            f"shared/data/{path} is not on this machine, and its licence forbids to carry it"
        )

    return find
