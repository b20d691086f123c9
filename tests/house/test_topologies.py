"""Devices in other numbers, axes and orders: runs that continue on them, slices of several hosts."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.analysis import hardware
from llama_jax.plan import aot
from llama_jax.train import checkpoint, program, state
from tests.experiments import helpers
from tests.house import test_mesh_equality as meshes

# 8 -> 4 -> 2 -> 1 devices, other axes each time.
PLACES = [
    config.Mesh(fsdp=4, tensor=2),
    config.Mesh(data=2, fsdp=1, context=2),
    config.Mesh(fsdp=1, tensor=2),
    config.Mesh(),
]
STEPS = 2  # on each


def steps(mesh, devices, folder, first, last):
    """Losses of some steps on a mesh, from the checkpoint in `folder` if there is one, saved there after."""
    run = config.Run(
        model=meshes.MODEL,
        optim=config.Optim(warmup_steps=1, learning_rate=1e-2),
        data=config.Data(seq_len=8),
        train=config.Train(steps=100, batch_size=16, loss_chunks=2),
        mesh=mesh,
    )
    built = program.build(run, sharding.make(mesh, jax.devices()[:devices]))
    layout = built.module.layout
    kept = checkpoint.Checkpoints(str(folder), config.Checkpoint())
    restored = kept.latest(built.state)
    now = restored.state if restored else state.init(built.objective, built.tx, layout, seed=0)
    losses = []
    for step in range(first, last):
        now, metrics = built.step(now, {}, meshes.batch(layout, step))
        losses.append(float(metrics.loss))
    kept.save(last, now, {"next_step": last})
    kept.wait()
    return losses


@pytest.mark.slow  # half a minute
def test_a_run_that_moves_from_8_to_1_devices_keeps_its_losses(tmp_path):
    moved = []
    for n, mesh in enumerate(PLACES):
        moved += steps(mesh, 8 >> n, tmp_path / "moved", n * STEPS, (n + 1) * STEPS)
    alone = steps(config.Mesh(), 1, tmp_path / "alone", 0, len(PLACES) * STEPS)
    assert moved == pytest.approx(alone, rel=1e-5)
    assert np.ptp(alone) > 0.01, "it does learn in between"


def slice_rows(stems):
    """What slice_rows.py answers about configs, each on every TPU slice of several hosts that holds it."""
    path = [*aot.PLACES, *sys.path]
    if not any(importlib.machinery.PathFinder.find_spec("libtpu", [place]) for place in path):
        pytest.skip("libtpu is not installed; make test brings it")
    child = subprocess.run(
        [sys.executable, "-m", "tests.house.slice_rows"], input=json.dumps(stems), cwd=helpers.ROOT,
        env={**os.environ, **aot.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def check_rows(stems):
    answer = slice_rows(stems)
    assert answer["wrong"] == []
    names = sorted(name for name, of in hardware.SLICES.items() if of.hosts > 1 and of.topology)
    assert answer["slices"] == names, "every slice of several hosts has a layout of one of them"
    return answer


def test_each_host_of_a_tpu_slice_loads_what_its_own_devices_hold():
    answer = check_rows(["llama32_1b", "llama31_405b"])
    assert answer["apart"] > answer["hosts"] / 2, "most hosts hold rows that lie apart"


@pytest.mark.slow  # half a minute
def test_each_host_of_a_tpu_slice_loads_what_its_own_devices_hold_under_every_config():
    shared = ("__init__", "base", "hardware", "mixtures", "sizes")
    stems = [path.stem for path in (helpers.ROOT / "configs").glob("*.py")]
    check_rows(sorted(set(stems) - set(shared)))
