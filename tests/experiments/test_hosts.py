"""Training and generating on two hosts: two processes on this machine, four devices each, that meet over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments import cloud, hosts
from tests.experiments import helpers

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


def start(args, where, process, processes=2, command="train"):
    flags = (f"--coordinator={where}", f"--processes={processes}", f"--process={process}")
    return subprocess.Popen(
        helpers.command(command, *args, *flags), cwd=helpers.ROOT, env=helpers.environment(4),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def both(args, command="train"):
    where = meeting()
    return [start(args, where, process, command=command) for process in range(2)]


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
    where = meeting()
    processes = [
        start(helpers.arguments(tmp_path, *MORE, workdir=f"run{process}"), where, process)
        for process in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "is not the same folder on all 2 hosts" in error


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
    processes, partial = both(spread, "generate"), tmp_path / "two.jsonl.partial"
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
    monkeypatch.setattr(hosts, "TIMEOUT", type("Flag", (), {"value": 0}))
    for name, value in (("COORDINATOR", ""), ("PROCESSES", 0), ("PROCESS", -1)):
        monkeypatch.setattr(hosts, name, type("Flag", (), {"value": value}))
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
