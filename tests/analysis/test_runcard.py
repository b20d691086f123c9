import json

import pytest

from llama_jax import config
from llama_jax.analysis import plots, runcard


def card(**changes):
    settings = dict(
        command="python -m experiments.train", provenance={"code": "abc"}, device_kind="TPU v4",
        devices=16, watts=170, parameters=1000, steps=100, tokens=3200,
        flops_per_token=6000,
        peak_flops=16 * 275e12, seconds=7200.0, epochs={"books": 1.25}, results={"validation_loss": 2.5},
    )  # fmt: skip
    run = config.Run(train=config.Train(batch_size=4), data=config.Data(seq_len=8))
    return runcard.make(run, **{**settings, **changes})


def test_the_card_is_the_formula():
    made = card()
    assert made["tokens"] == 3200
    assert made["model_flops"] == 3200 * 6000
    assert made["device_hours"] == 32
    assert made["kwh"] == 32 * 170 * 1.1 / 1000
    assert made["kg_co2eq"] == 32 * 170 * 1.1 / 1000 * 0.385
    assert made["mfu"] == 3200 * 6000 / 7200 / (16 * 275e12)


def test_unknown_is_said_not_guessed():
    made = card(watts=0, peak_flops=0)
    assert (made["kwh"], made["kg_co2eq"], made["mfu"]) == (None, None, None)
    text = runcard.markdown(made)
    assert "16 x TPU v4, power unknown" in text
    assert "| MFU | unknown |" in text


def test_files_are_written(tmp_path):
    runcard.write(card(), tmp_path)
    text = (tmp_path / "runcard.md").read_text()
    assert "| device-hours | 32 |" in text
    assert "| epochs | books 1.25 |" in text
    assert '"vocab_size": 32000' in text


def test_a_card_is_there_whole_and_last_or_not_at_all(tmp_path, monkeypatch):
    assert runcard.read(tmp_path) is None
    runcard.write(card(), tmp_path)
    assert runcard.read(tmp_path) == json.loads(json.dumps(card()))
    (tmp_path / "runcard.json").write_text((tmp_path / "runcard.json").read_text()[:100])
    assert runcard.read(tmp_path) is None, "of a version that wrote it in place"
    (tmp_path / "runcard.json").unlink()

    def markdown(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runcard, "markdown", markdown)
    with pytest.raises(OSError, match="No space"):
        runcard.write(card(), tmp_path)
    assert runcard.read(tmp_path) is None, "the file that says so is written last"


def test_a_retired_card_keeps_its_steps(tmp_path):
    runcard.retire(tmp_path)
    runcard.write(card(), tmp_path)
    runcard.retire(tmp_path)
    assert runcard.read(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "runcard-100.json",
        "runcard-100.md",
    ]
    (tmp_path / "runcard.json").write_text("{")
    runcard.retire(tmp_path)
    assert (tmp_path / "runcard-torn.json").exists()


def test_the_plot_is_a_picture_of_the_rows(tmp_path):
    rows = [{"tokens": 10 * n, "loss": 5 / n} for n in range(1, 9)]
    rows[3]["validation_loss"] = 1.4
    plots.loss(rows, {"unigram": 5.0, "bigram": 3.0}, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
