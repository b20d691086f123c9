"""The planning command: what it prints, and what it refuses. The compiler itself is in tests/plan."""

import json

import pytest

from tests.experiments import helpers

KEYS = [
    "fits",
    "hbm_gib_per_chip",
    "hbm_limit_gib",
    "parts",
    "mcycles",
    "flops_model",
    "flops_executed",
    "collectives",
    "step_seconds_low",
    "step_seconds_high",
    "mfu_low",
    "mfu_high",
    "tokens_per_second_per_chip",
    "chip_hours_low",
    "chip_hours",
    "days_low",
    "days",
    "checkpoint_gib",
    "kwh",
    "tco2eq",
]


def test_analytic_json_is_one_object_with_every_figure():
    done = helpers.run("plan", "--config=configs/7b.py:v4_32", "--analytic", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(KEYS) <= set(plan)
    assert plan["fits"]
    assert plan["hbm_gib_per_chip"] < plan["hbm_limit_gib"] == 30.75
    assert plan["checkpoint_gib"] == pytest.approx(12 * 6_738_415_616 / 2**30, rel=1e-6)
    # MaxText's figure for 4 rows of 2048 tokens a chip; a step here is 128 rows a chip.
    assert plan["flops_model"] == 337_945_206_718_464 * 128 / 4


def test_the_report_says_what_is_kept_where():
    done = helpers.run("plan", "--config=configs/65b.py:v5p-512", "--analytic")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v5p_512: 256 x TPU v5 on 64 hosts, mesh ")
    assert "by the formula: fits" in done.stdout
    assert "a checkpoint takes 729.6 GiB" in done.stdout
    assert "chip-hours take the compiler: the same command without --analytic" in done.stdout


@pytest.mark.parametrize(
    ("set_by_hand", "first"),
    [
        ([], "the first is the config's own layout: nothing to set"),
        (["--config.model.remat=none"], "the first as settings:\n  --config."),
    ],
)
def test_suggestions_are_a_table_and_settings_to_type(set_by_hand, first):
    done = helpers.run(
        "plan", "--config=configs/7b.py:v6e_64", "--analytic", "--suggest", *set_by_hand
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| slice | mesh | remat |")
    assert lines[2].startswith("| v6e_64 | ")
    assert first in done.stdout


def test_what_is_set_by_hand_and_does_not_fit_says_what_would():
    done = helpers.run(
        "plan", "--config=configs/7b.py:v4_16", "--analytic",
        "--config.train.microbatches=2", "--config.model.remat=none",
    )  # fmt: skip
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    assert "--suggest searches" in done.stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/7b.py", "a slice is needed, as in --config=configs/7b.py:v4_32"),
        ("configs/7b.py:v4_33", "nearest: 'v4_32'"),
        (
            "configs/tiny.py:v4_512",
            "has 256 devices, over which train.batch_size=8 rows cannot spread",
        ),
        ("configs/65b.py:v2_8", "v2_8, is too small for this run; these hold it: "),
    ],
)
def test_plan_refuses_in_one_line(config, message):
    done = helpers.run("plan", f"--config={config}", "--analytic")
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_training_on_other_devices_than_the_pages_slice_is_refused(tmp_path):
    done = helpers.run("train", "--config=configs/research_150m.py:v4_8", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert "laid out for v4_8: 4 x TPU v4 on 1 host" in done.stderr
    assert "here is 1 x cpu" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decode=8", "--analytic"], "--analytic has no effect with --decode"),
        (["--bits=8", "--analytic"], "--bits has no effect without --decode"),
        (["--decode=-1"], "-1 is not a non-negative integer"),
        (
            ["--decode=8", "--bits=4", "--config.mesh.tensor=16", "--config.mesh.fsdp=1"],
            "blocks, one scale each, do not spread evenly over the mesh tensor=16",
        ),
    ],
)
def test_a_plan_of_generating_refuses_in_one_line(flags, message):
    done = helpers.run("plan", "--config=configs/7b.py", "--config.mesh.hardware=v5e-16", *flags)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
