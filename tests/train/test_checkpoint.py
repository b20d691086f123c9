import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama_jax import config, files, sharding, tree
from llama_jax.convert import native
from llama_jax.train import checkpoint, program

# The threads and the event loop of a failed Orbax call die one by one, each with a traceback.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)


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


def unfinished(kept, step):
    """What a kill in the middle of a save leaves: the folder in place, without Orbax's commit file."""
    shutil.copytree(kept.folder / str(kept.steps()[-1]), kept.folder / str(step))
    (kept.folder / str(step) / files.COMMIT).unlink()


def test_an_unfinished_save_is_no_checkpoint(tmp_path, layout):
    kept = saved(tmp_path, layout, 3)
    unfinished(kept, 5)
    again = checkpoints(tmp_path)
    assert again.steps() == files.committed(again.folder) == [3]
    assert again.latest(target(state(layout))).record["next_step"] == 3
    assert native._place(tmp_path)[0] == kept.folder / "3" / "state", (
        "what generate and convert read"
    )
    again.save(5, state(layout, 5), {"next_step": 5})
    again.wait()
    assert checkpoints(tmp_path).latest(target(state(layout))).record["next_step"] == 5


def test_a_finished_save_was_never_renamed(tmp_path, layout, monkeypatch):
    """Mounted buckets rename a folder file by file."""
    renamed = []
    for module, name in ((os, "rename"), (os, "replace")):
        monkeypatch.setattr(module, name, lambda *paths, **_: renamed.append(paths))
    saved(tmp_path, layout, 3)
    assert not renamed


def test_what_interrupted_saves_left_is_removed(tmp_path, layout):
    kept = saved(tmp_path, layout, 3)
    unfinished(kept, 5)
    (kept.folder / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (kept.folder / "notes").mkdir()
    assert checkpoints(tmp_path).clean() == ["5", "7.orbax-checkpoint-tmp"]
    assert sorted(path.name for path in kept.folder.iterdir()) == ["3", "notes"]
    assert checkpoints(tmp_path).clean() == []


def test_a_step_that_is_damaged_again_is_set_aside_again(tmp_path, layout):
    """And the folders of earlier damage do not pile up."""
    saved(tmp_path, layout, 3)
    for _ in range(2):
        kept = saved(tmp_path, layout, 5)
        flip_a_bit(largest_file(kept.folder / "5" / "state"))
        restored = checkpoints(tmp_path).latest(target(state(layout)), lambda _: None)
        assert restored.record["next_step"] == 3
        assert sorted(path.name for path in kept.folder.iterdir()) == ["3", "5.unreadable"]


def test_a_name_that_is_taken_is_passed_over(tmp_path):
    assert checkpoint._free(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert checkpoint._free(tmp_path / "a") == tmp_path / "a-3"


def failing(monkeypatch, error, times):
    """Reading arrays raises `error` so often."""
    left, restore = [error] * times, ocp.StandardCheckpointHandler.restore

    def maybe(self, *args, **kwargs):
        if left:
            raise left.pop()
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", maybe)


def test_a_hiccup_of_the_file_system_is_not_taken_for_damage(tmp_path, layout, monkeypatch):
    kept = saved(tmp_path, layout, 3, 5)
    failing(monkeypatch, OSError(5, "Input/output error"), 1)
    restored = checkpoints(tmp_path).latest(target(state(layout)), pytest.fail)
    assert restored.record["next_step"] == 5
    assert kept.steps() == [3, 5]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")]
)
def test_too_little_memory_says_nothing_against_a_checkpoint(tmp_path, layout, monkeypatch, error):
    kept = saved(tmp_path, layout, 3, 5)
    failing(monkeypatch, error, 9)
    with pytest.raises(RuntimeError, match=r"checkpoint 5 in .* does not fit into memory"):
        checkpoints(tmp_path).latest(target(state(layout)), pytest.fail)
    assert sorted(path.name for path in kept.folder.iterdir()) == ["3", "5"]


def test_what_another_host_cannot_read_is_not_taken_here(tmp_path, layout, monkeypatch):
    kept, said = saved(tmp_path, layout, 3, 5), []
    answers = [(checkpoint.UNREADABLE, "host 1: it is not there")] * 2
    monkeypatch.setattr(checkpoint, "_worst", lambda *own: answers.pop() if answers else own)
    restored = checkpoints(tmp_path).latest(target(state(layout)), said.append)
    assert restored.record["next_step"] == 3
    assert said[0] == "WARNING: checkpoint 5 is unreadable (host 1: it is not there)"
    assert (kept.folder / "5.unreadable").is_dir()


TWO_HOSTS = """
import sys, pathlib, jax
folder, where, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(where, 2, process)
import numpy as np, orbax.checkpoint as ocp
from llama_jax import config
from llama_jax.train import checkpoint
checkpoint.RETRY_SECONDS = 0.0
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
across = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
make = lambda n: {"a": jax.make_array_from_callback((8,), across, lambda i: np.full(8, n, np.float32)[i])}
kept = checkpoint.Checkpoints(folder, config.Checkpoint(keep=3))
for step in (3, 5):
    kept.save(step, make(step), {"next_step": step})
kept.wait()
restore = ocp.StandardCheckpointHandler.restore
def blind(self, path, *args, **kwargs):
    if process == 1 and path.parent.name == "5":
        raise OSError(5, "Input/output error")
    return restore(self, path, *args, **kwargs)
ocp.StandardCheckpointHandler.restore = blind
target = {"a": jax.ShapeDtypeStruct((8,), np.float32, sharding=across)}
kept = checkpoint.Checkpoints(folder, config.Checkpoint(keep=3))
restored = kept.latest(target)
assert all((shard.data == 3).all() for shard in restored.state["a"].addressable_shards)
kept.save(7, make(7), {"next_step": 7})
kept.wait()
print(restored.record["next_step"], kept.steps(), flush=True)
"""


@pytest.mark.slow
def test_two_hosts_set_aside_what_one_of_them_cannot_read(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, tmp_path, where, str(process)],
            cwd=Path(__file__).parents[2], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    for out, _ in texts:
        assert "checkpoint 5 is unreadable (host 1: [Errno 5] Input/output error)" in out
        assert out.endswith("3 [3, 7]\n")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "3",
        "5.unreadable",
        "7",
    ]


def test_checksums_do_not_depend_on_the_mesh_and_see_any_bit(layout):
    one = state(layout)
    eight = state(sharding.make(config.Mesh(fsdp=8), jax.devices()))
    assert checkpoint.checksums(one) == checkpoint.checksums(eight)
    bits = np.asarray(one["matrix"]).view(np.uint32).copy()
    bits[3, 4] ^= 1 << 20
    changed = checkpoint.checksums({**one, "matrix": jnp.asarray(bits.view(np.float32))})
    assert {n for n, v in changed.items() if v != checkpoint.checksums(one)[n]} == {"matrix"}
    assert set(checkpoint.checksums(one)) == set(tree.paths(one))


def _murmur(x):
    """MurmurHash3's finaliser for 32 bits, in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def test_checksums_see_where_an_entry_stands():
    """Blocks that changed places: rows, halves far apart, halves whose bfloat16 values end in zeros."""
    a = np.random.default_rng(0).normal(size=(2**12, 2, 40)).astype(jnp.bfloat16).astype(np.float32)
    swapped = {
        "rows": a[[1, 0, *range(2, len(a))]],
        "halves": np.roll(a, 2**11, 0),
        "axes": a[:, ::-1],
    }
    sums = {name: checkpoint.checksums({"a": b})["a"] for name, b in {"same": a, **swapped}.items()}
    assert len(set(sums.values())) == 4
    assert len({checkpoint.sums_of_bits({"a": b})["a"] for b in (a, *swapped.values())}) == 1
    small = np.float32([[1.5, -2.0, 3.0], [0.1, 0.2, -0.0]])
    expected = sum(
        _murmur(
            int(small.view(np.uint32)[i, j]) ^ _murmur((i * 0x9E3779B9 + j * 0x6A09E667) % 2**32)
        )
        for i in range(2)
        for j in range(3)
    )
    assert checkpoint.checksums({"a": small})["a"] == expected % 2**32


def test_checksums_are_of_any_dtype():
    """Typed random keys, flags, integers of 4 bits: each entry counts."""
    key = lambda seed: jax.random.split(jax.random.key(seed), 3)
    four = jnp.arange(-8, 8).astype(jnp.int4)
    pairs = {
        "key": (key(0), key(1)),
        "bool": (np.array([True, False]), np.array([False, True])),
        "int4": (four, four.at[3].set(0)),
        "int8": (np.int8([1, -1]), np.int8([-1, 1])),
        "bfloat16": (jnp.bfloat16([1, 2]), jnp.bfloat16([2, 1])),
    }
    for name, (one, other) in pairs.items():
        assert checkpoint.checksums({name: one}) != checkpoint.checksums({name: other}), name


def test_a_checkpoint_of_2026_comes_back_bitwise(shared, tmp_path, layout):
    """A run of commit d2b14d9, whose checksums were sums of bits: those of its arrays, taken by NumPy."""
    shutil.copytree(shared("checkpoints/run_6_steps"), tmp_path / "run")
    run = config.from_dict(json.loads((tmp_path / "run/run.json").read_text()))
    kept = checkpoint.Checkpoints(tmp_path / "run", run.checkpoint)
    restored = kept.latest(program.build(run, layout).state)
    assert int(restored.state.step) == 3
    wanted = restored.record["checksums"]
    arrays = tree.paths(restored.state)
    assert set(arrays) == set(wanted)
    for name, leaf in arrays.items():
        assert int(np.asarray(leaf).view(np.uint32).sum(dtype=np.uint32)) == wanted[name], name


def test_the_record_is_plain_json_on_disk(tmp_path, layout):
    kept = saved(tmp_path, layout, 3)
    record = json.loads((kept.folder / "3" / "record" / "metadata").read_text())
    assert record["next_step"] == 3
    assert kept.record(3)["hashes"] == checkpoint.checksums(state(layout, 3))


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
