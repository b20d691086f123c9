"""Figures of a study from what its folders hold: results made by hand, of which every number is known."""

import dataclasses
import math
import re

import numpy as np
import pytest

from configs.ablations import position
from llama_jax.eval.score import WindowScores
from llama_jax.study import grid, record, report, schema, table
from llama_jax.study.record import Finished, Results

BLOCK = 8


@pytest.fixture(scope="module")
def study():
    return schema.freeze(position.get_config())


@pytest.fixture(scope="module")
def cells(study):
    return grid.cells(study)


def finished(cell, seed, loss, curve, hardware="cpu", lengths=(1,)):
    """curve: (tokens, seconds, validation loss) of steps of 10 tokens; rows are `loss` and its neighbours, 32.

    Seeds see batches of slightly different numbers of tokens, as where documents end elsewhere.
    """
    rows = [
        dict(step=n // 10, tokens=n + seed - 1, seconds=s, validation_loss=v) for n, s, v in curve
    ]
    spread = np.linspace(-0.5, 0.5, 32)
    card = {
        "tokens_per_second": 1000.0 + seed, "tokens": curve[-1][0], "device_hours": 0.5,
        "hardware": {"device": hardware, "devices": 1}, "results": {"memory_gib": 0.25},
        "provenance": {"code": "abc", "data": "text"}, "command": f"run {cell.name} {seed}",
    }  # fmt: skip
    scores = {n: WindowScores(loss + n - 1 + spread, np.full(4, loss)) for n in lengths}
    return Finished(seed, card, rows, scores)


LONG = [(100, 10.0, 5.0), (200, 20.0, 4.0), (300, 30.0, 3.0)]
SHORT = [(100, 5.0, 4.5), (200, 15.0, 3.5)]


def two(cells, **changed):
    base, other = cells[:2]
    return [
        Results(base, [finished(base, seed, 3.0 + seed / 10, LONG) for seed in range(3)], {}),
        Results(
            other,
            [finished(other, seed, 2.8 + seed / 10, SHORT, **changed) for seed in range(3)],
            {},
        ),
    ]


def test_differences_are_paired(cells):
    base, other = table.rows(two(cells), (1,), BLOCK)
    assert base.loss.mean == pytest.approx(3.1)
    assert other.loss.mean == pytest.approx(2.9)
    # Seeds move both alike: the difference is 0.2 in each pair, exactly.
    assert other.difference.mean == pytest.approx(-0.2)
    assert other.difference.high - other.difference.low < 1e-6 < base.loss.high - base.loss.low
    assert other.verdict == "better"
    assert base.difference.mean == 0


def test_at_equal_budgets_losses_are_read_off_the_curves(cells):
    base, other = table.rows(two(cells), (1,), BLOCK)
    assert (base.at_tokens, other.at_tokens) == (4.0, 3.5)
    assert (base.at_flops, other.at_flops) == (4.0, 3.5)
    assert (base.at_seconds, other.at_seconds) == (4.5, 3.5)
    assert other.tokens_per_second == 1001


def test_time_is_not_compared_across_machines(cells):
    base, other = table.rows(two(cells, hardware="gpu"), (1,), BLOCK)
    assert math.isnan(base.at_seconds)
    assert math.isnan(other.at_seconds)
    assert base.at_flops == 4.0


def test_a_missing_evaluation_does_not_move_the_curve(cells):
    _, other = two(cells)
    del other.runs[1].rows[0]["validation_loss"]
    places, losses = other.curve("tokens")
    np.testing.assert_array_equal(places, [200])
    np.testing.assert_array_equal(losses, [[3.5]] * 3)
    assert math.isnan(record.at(other, "tokens", 100))


def test_neighbouring_rows_count_as_one(cells):
    """Rows that repeat eight times each are a quarter of the evidence that so many would be."""
    base, other = two(cells)
    noise = np.repeat(np.random.default_rng(0).normal(size=4), 8)
    for run in other.runs:
        run.scores[1].row_R[:] += noise
    _, apart = table.rows([base, other], (1,), 1)
    _, together = table.rows([base, other], (1,), 8)
    wide, narrow = (one.difference.high - one.difference.low for one in (together, apart))
    assert wide > 2.5 * narrow


def test_what_a_failed_seed_leaves_is_no_verdict(study, cells):
    base, other = two(cells)
    failed = Results(other.cell, other.runs[:2], {2: "step 3: the loss is nan"})
    _, row = table.rows([base, failed], (1,), BLOCK)
    assert row.verdict == "not known: 1 failed"
    made = report.Report(
        "t", study, [base, failed], table.rows([base, failed], study.lengths, BLOCK), ["c"]
    )
    text = report.markdown(made)
    assert "| alibi | 2 of 3 |" in text
    assert "alibi, seed 2: step 3: the loss is nan" in text
    _, row = table.rows([failed, base], (1,), BLOCK)
    assert row.verdict == "not known: 1 failed", "of the base, too"


def test_windows_are_undefined_or_not_yet_run(study, cells):
    base, other = two(cells, lengths=(1,))
    base = Results(
        base.cell,
        [finished(base.cell, s, 3.0, LONG, lengths=(1, 2, 4, 8)) for s in range(3)],
        {},
    )
    waiting = Results(cells[2], [], {})
    found = [base, other, waiting]
    made = report.Report("t", study, found, table.rows(found, study.lengths, BLOCK), ["c"])
    _, rows = report.lengths(made)
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["alibi"][1:] == ["undefined"] * 3
    assert by_name["learned"] == [""] * 4
    assert by_name["rope"][3].startswith("10.0000")


def test_the_report_says_what_was_run(study, cells):
    found = two(cells)
    made = report.Report("t", study, found, table.rows(found, study.lengths, BLOCK), ["all", "one"])
    text = report.markdown(made)
    page = report.page(made, {})
    for part in ("code: abc", "hardware: 1 x cpu", "3.00 device-hours", "all\none", "blocks of 8",
                 "at equal FLOPs", "1,001"):  # fmt: skip
        assert part in text, part
        assert part in page, part


def test_a_quick_study_names_no_winner(study, cells, tmp_path):
    """Of results that a full one would call better, with the lowest loss first."""
    base, other = two(cells)
    worse = Results(cells[2], [finished(cells[2], s, 2.9 + s / 10, LONG) for s in range(3)], {})
    found = [base, worse, other]
    full = report.write("t", study, found, ["c"], tmp_path)
    assert [row.name for row in full.rows] == ["rope", "alibi", "learned"]
    assert "better |" in (tmp_path / "report.md").read_text()
    quick = dataclasses.replace(study, preset="quick")
    made = report.write("t", quick, found, ["c"], tmp_path)
    assert [row.name for row in made.rows] == ["rope", "learned", "alibi"], "in their own order"
    for name in ("report.md", "report.tex", "report.html"):
        text = (tmp_path / name).read_text()
        assert "too short and too few to conclude anything" in text
        text = text.replace("no cell is called better or worse", "").replace(report.STYLE, "")
        assert not re.search("better|worse|verdict|significant|Holm|p value", text), name
    assert "-0.2000 [" in (tmp_path / "report.md").read_text()
    header, rows = report.results(made)
    assert header == ["cell", "seeds", "loss", "less the base"]
    assert {len(row) for row in rows} == {4}
    assert "{llll}" in report.latex(made)
