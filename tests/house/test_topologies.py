"""A run that goes on with fewer devices and other axes, and its losses."""

import jax
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.train import checkpoint, program, state
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
    now = restored.state if restored else state.init(built.module, built.tx, layout, seed=0)
    losses = []
    for step in range(first, last):
        now, metrics = built.step(now, meshes.batch(layout, step))
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
