import json
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama_jax import config, sharding, tree
from llama_jax.train import checkpoint

# The threads and the event loop of a failed Orbax call die one by one, each with a traceback.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def state(layout, seed=0):
    rng = np.random.default_rng(seed)
    put = lambda shape: jax.device_put(
        rng.normal(size=shape).astype(np.float32), layout.param("DF" if len(shape) == 2 else "D")
    )
    return {
        "matrix": put((40, 24)),
        "scale": put((40,)),
        "step": jax.device_put(np.int32(seed), layout.replicated),
    }


def target(of):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def checkpoints(folder, keep=3):
    return checkpoint.Checkpoints(str(folder), config.Checkpoint(keep=keep))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def saved(tmp_path, layout, *steps, keep=3):
    kept = checkpoints(tmp_path, keep)
    for step in steps:
        kept.save(step, state(layout, step), {"next_step": step})
    kept.wait()
    return kept


def test_the_newest_comes_back_bitwise_with_its_record(tmp_path, layout):
    saved(tmp_path, layout, 3, 5)
    restored = checkpoints(tmp_path).latest(target(state(layout)))
    assert restored.record["next_step"] == 5
    assert equal(restored.state, state(layout, 5))


def test_nothing_saved_is_none(tmp_path, layout):
    assert checkpoints(tmp_path).latest(target(state(layout))) is None


def test_old_ones_go(tmp_path, layout):
    assert saved(tmp_path, layout, 1, 2, 3, 4, keep=2).steps() == [3, 4]


def test_another_mesh_reads_the_same_values(tmp_path, layout):
    saved(tmp_path, layout, 7)
    eight = sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices())
    restored = checkpoints(tmp_path).latest(target(state(eight)))
    assert restored.state["matrix"].sharding.is_equivalent_to(eight.param("DF"), 2)
    assert equal(restored.state, state(layout, 7))


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit": flip_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_set_aside_loudly_for_the_one_before(damage, tmp_path, layout):
    kept = saved(tmp_path, layout, 3, 5)
    DAMAGE[damage](largest_file(kept.folder / "5" / "state"))
    said = []
    again = checkpoints(tmp_path)
    restored = again.latest(target(state(layout)), said.append)
    assert restored.record["next_step"] == 3
    assert equal(restored.state, state(layout, 3))
    assert "WARNING: checkpoint 5 is unreadable (" in said[0]
    assert said[1:] == ["WARNING: checkpoint 5 is set aside; going on from step 3"]
    assert (kept.folder / "5.unreadable").is_dir(), "nothing is thrown away"
    again.save(5, state(layout, 5), {"next_step": 5})
    again.wait()
    assert checkpoints(tmp_path).latest(target(state(layout))).record["next_step"] == 5


def test_a_damaged_record_is_set_aside_too(tmp_path, layout):
    kept = saved(tmp_path, layout, 3, 5)
    (kept.folder / "5" / "record" / "metadata").write_text("{")
    restored = checkpoints(tmp_path).latest(target(state(layout)), lambda _: None)
    assert restored.record["next_step"] == 3


def test_when_none_is_readable_training_does_not_start_afresh(tmp_path, layout):
    kept = saved(tmp_path, layout, 3)
    flip_a_bit(largest_file(kept.folder / "3" / "state"))
    with pytest.raises(RuntimeError, match=r"none of the checkpoints \[3\] .* is readable"):
        checkpoints(tmp_path).latest(target(state(layout)), lambda _: None)
    assert (kept.folder / "3").is_dir(), "left as it was"


def test_a_full_disk_is_an_error_and_the_one_before_stays(tmp_path, layout, capfd):
    kept = saved(tmp_path, layout, 3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(
            checkpoint.SaveError, match=r"step 5 could not be written.*step 3 is good"
        ):
            kept.save(5, state(layout, 5), {"next_step": 5})
            kept.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    again = checkpoints(tmp_path)
    assert again.steps() == [3]
    assert equal(again.latest(target(state(layout))).state, state(layout, 3))


def test_the_systems_reason_is_said_though_a_long_message_has_only_its_number(
    tmp_path, layout, monkeypatch
):
    def failing(*_, **__):
        raise ValueError(f"INTERNAL: writing [os_error_code='28'] {'x' * 300} the end")

    kept = saved(tmp_path, layout, 3)
    monkeypatch.setattr(kept._manager, "save", failing)
    with pytest.raises(
        checkpoint.SaveError, match=r"\(No space left on device: \.\.\. x+ the end\)"
    ):
        kept.save(5, state(layout, 5), {})


def test_an_unfinished_save_is_not_listed(tmp_path, layout):
    """What a kill in the middle of a save leaves: Orbax's temporary folder."""
    kept = saved(tmp_path, layout, 3)
    (kept.folder / "5.orbax-checkpoint-tmp").mkdir()
    (kept.folder / "5.orbax-checkpoint-tmp" / "state").write_text("half")
    assert checkpoints(tmp_path).steps() == [3]


def test_checksums_do_not_depend_on_the_mesh_and_see_any_bit(layout):
    one = state(layout)
    eight = state(sharding.make(config.Mesh(fsdp=8), jax.devices()))
    assert checkpoint.checksums(one) == checkpoint.checksums(eight)
    bits = np.asarray(one["matrix"]).view(np.uint32).copy()
    bits[3, 4] ^= 1 << 20
    changed = checkpoint.checksums({**one, "matrix": jnp.asarray(bits.view(np.float32))})
    assert {n for n, v in changed.items() if v != checkpoint.checksums(one)[n]} == {"matrix"}
    expected = int(np.asarray(one["matrix"]).view(np.uint32).sum(dtype=np.uint32))
    assert checkpoint.checksums(one)["matrix"] == expected
    assert set(checkpoint.checksums(one)) == set(tree.paths(one))


def test_the_record_is_plain_json_on_disk(tmp_path, layout):
    kept = saved(tmp_path, layout, 3)
    record = json.loads((kept.folder / "3" / "record" / "metadata").read_text())
    assert record["next_step"] == 3
    assert kept.record(3)["checksums"] == checkpoint.checksums(state(layout, 3))


def test_layers_are_stored_one_by_one(tmp_path):
    """So that an export, or a host of another mesh, reads a layer without its neighbours."""
    stack = jnp.arange(3 * 4 * 5.0).reshape(3, 4, 5)
    checkpoints = checkpoint.Checkpoints(tmp_path, config.Checkpoint())
    checkpoints.save(1, {"groups": {"w": stack}, "embed": stack[0]}, {})
    checkpoints.wait()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(tmp_path / "checkpoints/1/state").item_metadata.tree
    assert found["groups"]["w"].storage.chunk_shape == (1, 4, 5)
    assert found["embed"].storage.chunk_shape == (4, 5)
