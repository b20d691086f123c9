"""Two hosts: two processes on this machine, that meet over gloo. Their devices are in an order in which the rows
of each lie apart."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llama_jax import config
from llama_jax.run import cloud, hosts
from llama_jax.study import record
from tests.experiments import helpers, test_ablate, warm

STEPS = 12
MORE = (f"--config.train.steps={STEPS}", "--config.mesh.fsdp=4", "--config.mesh.context=2")


def meeting() -> str:
    return f"127.0.0.1:{free_port()}"


def free_port(port: int = 0) -> int:
    """The first from `port` on, or any."""
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    except OSError:
        return free_port(port + 1)


def start(args, where, process, module="experiments.train", devices=4, cwd=helpers.ROOT):
    words = [module, *args, f"--coordinator={where}", "--processes=2", f"--process={process}"]
    if module.startswith("experiments."):
        words = ["tests.run.apart", "0,1,4,5,2,3,6,7", *words]
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**helpers.environment(devices), "PYTHONPATH": str(helpers.ROOT)}, text=True,
    )  # fmt: skip


def both(args, *more, **others):
    """Two processes; `more`: the second's own arguments."""
    where = meeting()
    return [start([*args, *(more * process)], where, process, **others) for process in range(2)]


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def until(workdir, step, processes):
    """Wait for the row of a step."""
    limit = time.monotonic() + 240
    while time.monotonic() < limit and all(process.poll() is None for process in processes):
        if (workdir / "metrics.jsonl").exists() and step in losses(workdir):
            return
        time.sleep(0.05)
    for process in processes:
        process.kill()
    pytest.fail("\n".join(process.communicate()[1] for process in processes))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    done = helpers.run("train", *helpers.arguments(folder, f"--config.train.steps={STEPS}"))
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


@pytest.mark.slow
def test_two_processes_are_killed_and_one_goes_on_with_the_same_losses(tmp_path, alone):
    args = helpers.arguments(tmp_path, *MORE)
    processes = both(args)
    until(tmp_path / "run", 8, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    texts = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    assert "step 8/12" in texts[0][0]
    assert "step" not in texts[1][0], "the second host is silent"
    done = helpers.run("train", *args, devices=8)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 5" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_signal_at_one_host_stops_both_after_the_same_step_with_a_checkpoint(tmp_path, alone):
    args = helpers.arguments(tmp_path, *MORE, "--config.train.steps=100000")
    processes = both(args)
    until(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    (last,) = (line for line in texts[0][0].splitlines() if line.startswith("SIGTERM: "))
    assert f"saved step {max(losses(tmp_path / 'run'))} of 100000" in last
    first = losses(tmp_path / "run")
    assert {step: first[step] for step in (1, 2, 3)} == pytest.approx(
        {step: alone[step] for step in (1, 2, 3)}, rel=1e-5
    )


@pytest.mark.slow
def test_two_hosts_finish_a_run_and_one_of_them_writes_the_results(tmp_path, alone):
    processes = both(helpers.arguments(tmp_path, *MORE))
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "run" / "runcard.md").exists()
    assert (tmp_path / "run" / "loss.png").exists()
    assert "a sample at temperature" in texts[0][0]


@pytest.mark.slow
def test_a_workdir_of_each_host_alone_is_refused_by_both(tmp_path):
    processes = both(helpers.arguments(tmp_path, *MORE), f"--workdir={tmp_path}/other")
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1, error
        assert "is not the same folder on all 2 hosts" in error


def test_other_settings_on_one_host_are_named_by_both(tmp_path):
    processes = both(helpers.arguments(tmp_path, *MORE), "--config.optim.learning_rate=0.5")
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1, error
        assert error.splitlines()[-2:] == [
            "error: the hosts do not run the same; from host 0 to host 1:",
            "  optim.learning_rate: 0.003 -> 0.5",
        ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_text_on_one_host_is_named_by_both(tmp_path):
    """Below one path, relative to where each was started."""
    args = helpers.arguments(tmp_path, *MORE, "--config.data.sources.corpus.path=corpus.txt")
    args[0] = f"--config={helpers.ROOT}/configs/research_300k.py"
    where, processes = meeting(), []
    for process, words in enumerate((20_000, 20_001)):
        (tmp_path / f"{process}").mkdir()
        helpers.text(tmp_path / f"{process}" / "corpus.txt", words)
        processes.append(start(args, where, process, cwd=tmp_path / f"{process}"))
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1, error
        assert "error: the hosts do not run the same; from host 0 to host 1:" in error
        assert "\n  text of data.sources.corpus: " in error


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The workdirs of two_hosts.py on one host and on two; what each of the two saw; how they ended."""
    folder = tmp_path_factory.mktemp("two")
    text = helpers.text(folder / "corpus.txt")
    args = [
        "--config=configs/ablations/norm.py", *test_ablate.TINY, "--config.base.checkpoint.every=2",
        "--config.base.data.sources.corpus.kind=files",
        f"--config.base.data.sources.corpus.path={text}", f"--config.base.data.cache={folder}/cache",
    ]  # fmt: skip
    module = "tests.run.two_hosts"
    one = warm.run([module, *args, f"--workdir={folder}/one"], helpers.environment(), 300)
    assert one.returncode == 0, one.stderr
    args += [f"--workdir={folder}/two", "--config.base.mesh.fsdp=4"]
    ends = []
    for process in both(args, module=module, devices=2):
        _, error = process.communicate(timeout=300)
        ends.append((process.returncode, error, time.monotonic()))
    seen = [folder / f"two/seen-{process}.json" for process in range(2)]
    assert all(file.exists() for file in seen), ends
    return folder / "one", folder / "two", [json.loads(file.read_text()) for file in seen], ends


def test_two_hosts_compute_what_one_does(played):
    """Also when they were interrupted, by signals at one of them."""
    one, two, *_ = (folder / "runs/rms+pre-seed0" for folder in played[:2])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    cards = [json.loads((folder / "runcard.json").read_text()) for folder in (one, two)]
    loss = [card["results"]["validation_loss"] for card in cards]
    assert loss[1] == pytest.approx(loss[0], rel=1e-5)
    scores = [record.read_scores(folder)[1].row_R for folder in (one, two)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
    texts = [(folder / "texts.jsonl").read_text().splitlines() for folder in played[:2]]
    tokens = [[json.loads(line)["tokens"] for line in lines] for lines in texts]
    assert len(tokens[0]) == 4
    assert tokens[1] == tokens[0]


@pytest.mark.parametrize("name", ["whole", "part"])
def test_two_hosts_begin_with_trained_weights_as_one_does(played, name):
    """The first host says with which checkpoint; the second sees another one last."""
    one, two = (folder / name for folder in played[:2])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one)[1] < losses(played[0] / "runs/rms+pre-seed0")[3], "trained weights"
    steps = [json.loads((f / "run.json").read_text())["train"]["init_step"] for f in (one, two)]
    assert steps == [6, 6]


def test_weights_to_begin_with_that_one_host_lacks_are_refused_by_both(played):
    (first, second), base = played[2], played[1] / "runs/rms+pre-seed0"
    reason = f"train.init_from={base}: {base} is no model of ours"
    assert second["lacks"] == reason
    assert first["lacks"] == f"host 1 could not go on: {reason}"
    assert first["differs"] == second["differs"]
    assert first["differs"].startswith("the hosts do not run the same; from host 0 to host 1:\n")
    assert first["differs"].endswith(" -> 0123")
    assert first["differs"].count("\n") == 1
    assert "train.init_checksum: " in first["differs"]


def test_a_signal_at_one_host_stops_both_wherever_it_comes(played):
    for seen in played[2]:
        assert seen["restoring"] == ["1"], "before the second step"
        assert seen["between"] == ["rms+pre-seed0"], "the next run of the study is not begun"
        assert seen["decoding"] == ["texts.jsonl.partial"]


def test_what_differs_and_what_failed_at_one_host_is_known_to_both(played):
    first, second = played[2]
    assert first["compare"] == second["compare"]
    assert first["compare"].splitlines() == [
        "the hosts do not run the same; from host 0 to host 1:",
        "  optim.learning_rate: 0.3 -> 1.3",
    ]
    assert first["together"] == "host 1 could not go on: its disk is gone"
    assert second["together"] == "its disk is gone"
    assert first["outcome"] == "host 1 could not go on: mine"
    assert second["outcome"] == "mine"


def test_an_error_within_a_step_of_one_host_ends_both(played):
    (code, error, ended), (other_code, other_error, other_ended) = played[3]
    assert (code, other_code) == (1, 1)
    assert error.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert other_error.splitlines()[-1] == "error: host 0 ended: [Errno 28] No space left on device"
    failed = float((played[1] / "failed").read_text())
    assert max(ended, other_ended) - failed < 60


@pytest.mark.slow
def test_two_hosts_answer_a_file_and_go_on_as_one(tmp_path):
    """A signal at the second stops both; one process with one device finishes, with the texts that one gives."""
    done = helpers.run("train", *helpers.arguments(tmp_path, "--config.train.steps=4"))
    assert done.returncode == 0, done.stderr
    lines = [json.dumps({"prompt": "w1 w2 w3"[:n]}) + "\n" for n in (2, 5, 8) for _ in range(200)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    args = [
        *(f"--checkpoint={tmp_path}/run", f"--input={tmp_path}/prompts.jsonl"),
        *("--config.decode.max_new_tokens=12", "--config.decode.rows=4"),
    ]
    spread = [
        *args,
        "--config.mesh.fsdp=4",
        "--config.mesh.data=2",
        f"--output={tmp_path}/two.jsonl",
    ]
    processes, partial = both(spread, module="experiments.generate"), tmp_path / "two.jsonl.partial"
    limit = time.monotonic() + 240
    while time.monotonic() < limit and all(process.poll() is None for process in processes):
        if partial.exists() and partial.read_text().count("\n") > 8:
            break
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "SIGTERM: " in texts[0][0]
    assert 8 < partial.read_text().count("\n") < 600
    for flags in (
        [*args, f"--output={tmp_path}/two.jsonl"],
        [*args, f"--output={tmp_path}/one.jsonl"],
    ):
        done = helpers.run("generate", *flags)
        assert done.returncode == 0, done.stderr
    two, one = ((tmp_path / f"{name}.jsonl").read_text() for name in ("two", "one"))
    said = [[json.loads(line)["tokens"] for line in text.splitlines()] for text in (two, one)]
    assert said[0] == said[1]


@pytest.mark.parametrize("process", [0, 1])
def test_one_host_alone_gives_up_with_the_reason(tmp_path, process):
    where = meeting()
    lonely = start([*helpers.arguments(tmp_path), "--host_timeout=1"], where, process)
    _, error = lonely.communicate(timeout=60)
    assert lonely.returncode == 1
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert f"process {process} waited 1 s, but not all 2 hosts at {where} have started" in line
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize(
    "flags", [["--coordinator=a:1"], ["--coordinator=a:1", "--processes=2", "--process=2"]]
)
def test_half_of_the_flags_is_refused(tmp_path, flags):
    done = helpers.run("train", *helpers.arguments(tmp_path), *flags)
    assert done.returncode == 1
    assert "give all three, --process from 0 to --processes - 1" in done.stderr


# A step of two tasks on this machine, each with the variables of SLURM's manual page of srun.
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST="localhost" SLURM_PROCID=$task \\
        SLURM_LOCALID=0 "$@" > task-$task.log 2>&1 &
done
wait -n && wait -n
"""


@pytest.mark.slow
def test_a_job_of_two_nodes_meets_trains_and_leaves_the_queue(tmp_path):
    """The script that launch submits, with stand-ins for srun and scontrol."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" > requeued\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    port = free_port(hosts.FIRST_PORT + os.getpid() % 2000)
    args = helpers.arguments(tmp_path, "--config.train.steps=3", "--config.mesh.fsdp=2")
    args[0] = f"--config={helpers.ROOT}/configs/research_300k.py"
    workdir = f"{tmp_path}/run"
    script = cloud.sbatch("x", 2, args, workdir, time="1:00", partition="", account="")
    environment = {
        **helpers.environment(),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(helpers.ROOT),
        "SLURM_JOB_ID": str(port - hosts.FIRST_PORT),
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    logs = [(tmp_path / f"task-{task}.log").read_text() for task in range(2)]
    assert done.returncode == 0, logs
    assert "on 2 x cpu" in logs[0]
    assert "parameters" not in logs[1], "the second host is silent"
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    assert not (tmp_path / "requeued").exists()


SLURM = {"SLURM_JOB_ID": "70001", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,login1", "gpu7"),
        ("node[001-004,007],x", "node001"),
        ("rack[1-2]n[03,05]", "rack1n03"),
        ("a-[7,9-11].b", "a-7.b"),
    ],
)
def test_tasks_of_slurm_meet_at_the_first_node(monkeypatch, nodes, first):
    for name, value in {**SLURM, "SLURM_STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(name, value)
    # 70001 is 369 beyond a multiple of 4096.
    assert hosts.of_slurm() == (f"{first}:{61440 + 369}", 2, 1)


def test_a_task_of_slurm_has_all_gpus_of_its_node(monkeypatch):
    """JAX's own detection would leave it one, that of its SLURM_LOCALID."""
    for name, value in {**SLURM, "SLURM_STEP_NODELIST": "gpu[7-8]"}.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **more: asked.append((a, more)))
    hosts.join("h100_16")
    ((where, more),) = asked
    assert where == ("gpu7:61809", 2, 1)
    assert more["cluster_detection_method"] == "deactivate"
    assert "local_device_ids" not in more
    with pytest.raises(
        ValueError, match=r"h100_32 has 4 nodes, but SLURM started 2 tasks: srun --nodes=4"
    ):
        hosts.join("h100_32")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    with pytest.raises(ValueError, match=r"16 tasks on 2 nodes; a run has one process a node"):
        hosts.join("any")


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked by `hosts.join` without peers, on a machine where it finds no other process."""
    calls = []

    def initialize(*args, **more):
        calls.append((args, more))
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    yield calls
    jax.config.update("jax_enable_preemption_service", True)
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(
    ("listed", "slices", "there"),
    [("", "", 1), ("localhost", "", 1), ("a,b,c,d", "", 4), ("a,b", "2", 4)],
)
def test_a_tpu_slice_without_a_name_is_met_where_its_hosts_are_listed(
    monkeypatch, asked, listed, slices, there
):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", listed)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", slices)
    hosts.join("any")
    assert asked == [], "on the CPU of a host there are no others"
    jax.config.update("jax_platforms", None)
    assert hosts.tpu_hosts() == there
    hosts.join("any")
    assert len(asked) == (there > 1)


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v4", "v4_32"), ("TPU v5 lite", "v5e_16"), ("TPU v5p", "v5p_32")]
)
def test_hosts_that_have_not_met_are_told_the_name_of_their_slice(monkeypatch, kind, name):
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": kind})])
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=f"on 4 hosts, .* --config=configs/7b.py:{name} or "):
        hosts.check(config.Mesh())
