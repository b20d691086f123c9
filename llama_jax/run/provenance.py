"""What was run: code, packages, machine, text."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from llama_jax import __version__
from llama_jax.data.prepare import Prepared

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(prepared: Prepared) -> dict[str, Any]:
    return {
        "code": f"llama_jax {__version__}, {code()}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "data": prepared.fingerprint,
        "tokenizer": prepared.tokenizer.fingerprint,
    }


def installed() -> dict[str, str]:
    """What computes: versions, and a digest of each of our own files. Several hosts must have the same."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    root = Path(__file__).resolve().parents[2]
    ours = sorted(
        path for part in ("llama_jax", "experiments") for path in (root / part).rglob("*.py")
    )
    digests = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in ours
    }
    return {**versions, **digests}


def code() -> str:
    """The commit of this code, marked when files differ from it; "no git" outside a checkout.

    Where experiments.launch unpacked the code, LLAMA_JAX_CODE says what it was.
    """
    if given := os.environ.get("LLAMA_JAX_CODE"):
        return given
    call = [
        "git",
        "-C",
        os.path.dirname(__file__),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        found = subprocess.run(call, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "no git"
    return found.stdout.strip() or "no git"
