import os
import signal
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.interrupt import Interrupt
from llama_jax.train import loop
from llama_jax.train.step import Metrics


class Loaded(NamedTuple):
    batch: int
    sources: np.ndarray
    rows: np.ndarray


class State(NamedTuple):
    step: int
    params: str = "params"


class Console:
    def __init__(self):
        self.rows, self.said = [], []

    def write(self, row):
        self.rows.append(row)

    def say(self, text):
        self.said.append(text)


def a_run(steps=10, log=1, evaluation=100, save=100, **train):
    return config.Run(
        model=config.Model(),
        data=config.Data(seq_len=8),
        optim=config.Optim(warmup_steps=0),
        train=config.Train(steps=steps, batch_size=4, **train),
        eval=config.Eval(every=evaluation),
        checkpoint=config.Checkpoint(every=save),
        log=config.Log(every=log),
    )


def play(run, first=0, step=None, interrupt=None, rates=None, means=None):
    """The loop with everything around it replaced by lists."""
    console, saves, evaluations, audit = Console(), [], [], []
    batches = (Loaded(n, np.array([0, 1]), np.array([n, n])) for n in range(first, 1000))

    def plain(state, batch):
        assert batch == state.step, "batch n belongs to step n"
        return State(state.step + 1), metrics(loss=10.0 - state.step)

    recorder = loop.Recorder(
        run, rates or loop.FlopRates(100.0, 0.0), [], console, loop.Progress(means=means or {})
    )
    result = loop.run(
        run, State(first), step or plain, lambda finished, state: next(batches),
        evaluate=lambda params: evaluations.append(params) or {"validation_loss": 1.5},
        save=lambda done, state: saves.append((done, state.step)),
        recorder=recorder, interrupt=interrupt or Interrupt(), audit=audit.append,
    )  # fmt: skip
    return result, console, saves, evaluations, audit


def metrics(loss=1.0, skipped=0.0, in_a_row=0.0, norm=2.0, aux=None, tokens=32):
    return Metrics(*map(jnp.float32, (loss, 32, tokens, norm, 0.1, skipped, in_a_row)), aux or {})


def test_each_step_is_recorded_once_in_order():
    (_, done), console, *_ = play(a_run())
    assert done == 10
    assert [row["step"] for row in console.rows] == list(range(1, 11))
    assert [row["loss"] for row in console.rows] == [10.0 - n for n in range(10)]
    assert [row["tokens"] for row in console.rows] == [32 * n for n in range(1, 11)]


def uneven(state):
    """Loss and tokens of a step."""
    return float(10 - state.step), 8.0 * (1 + state.step % 3)


def spoken(steps):
    """The mean over the tokens of these steps (the first is 1)."""
    values = [uneven(State(step - 1)) for step in steps]
    return sum(loss * tokens for loss, tokens in values) / sum(tokens for _, tokens in values)


def test_the_loss_of_a_row_is_the_mean_over_the_tokens_since_the_last_one():
    def step(state, batch):
        loss, tokens = uneven(state)
        return State(state.step + 1), metrics(loss)._replace(weight=jnp.float32(tokens))

    run = a_run(steps=10, log=4, evaluation=6)
    _, console, *_ = play(run, step=step)
    rows = {row["step"]: row["loss"] for row in console.rows}
    wanted = {4: (1, 2, 3, 4), 6: (5, 6), 8: (7, 8), 10: (9, 10)}
    assert rows == pytest.approx({last: spoken(steps) for last, steps in wanted.items()})
    # From a checkpoint between two rows, which keeps what was added up.
    halfway = loop.Mean()
    for n in (1, 2, 3):
        halfway = halfway.add(*uneven(State(n - 1)))
    _, console, *_ = play(run, first=3, step=step, means={"loss": halfway})
    assert {row["step"]: row["loss"] for row in console.rows} == rows, "bit for bit"


@pytest.mark.parametrize("weights", [(3, 1, 2, 5), (0.2, 0.1, 0.05, 0.3), (1, -1, 2, -0.5)])
def test_a_mean_of_steps_is_divided_by_the_sum_of_their_weights(weights):
    values, mean = (2.0, 7.0, -1.5, 4.0), loop.Mean()
    for n, pair in enumerate(zip(values, weights, strict=True), 1):
        mean = mean.add(*pair)
        total = sum(weights[:n])
        expected = np.dot(values[:n], weights[:n]) / (total or 1)
        assert mean == (pytest.approx(expected, rel=1e-12), pytest.approx(total, rel=1e-12))


def test_aux_of_a_step_that_was_left_out_or_without_weight_is_not_in_the_mean():
    steps = [(0.9, 5, 0), (0.1, 3, 1), (0.4, 7, 0), (0.3, 0, 0)]  # accuracy, its weight, left out

    def step(state, batch):
        accuracy, weight, skipped = steps[state.step]
        aux = {"accuracy": (jnp.float32(accuracy), jnp.float32(weight))}
        return State(state.step + 1), metrics(skipped=skipped, in_a_row=skipped, aux=aux)

    _, console, *_ = play(a_run(steps=4, log=3, on_anomaly="skip"), step=step)
    mean = (0.9 * 5 + 0.4 * 7) / 12
    assert [row["accuracy"] for row in console.rows] == pytest.approx([mean, 0.3])


def test_an_aux_with_the_name_of_a_column_is_refused():
    step = lambda *_: (State(1), metrics(aux={"mfu": (jnp.float32(1), jnp.float32(1))}))
    with pytest.raises(AssertionError, match="mfu"):
        play(a_run(steps=1), step=step)


def test_a_step_that_was_left_out_is_not_in_the_mean():
    _, console, *_ = play(a_run(log=3, on_anomaly="skip"), step=faulty("nan"))
    assert [row["loss"] for row in console.rows] == [1.0, 1.0, 1.0, 1.0]
    _, console, *_ = play(a_run(on_anomaly="skip"), step=faulty("spike"))
    assert [row["loss"] for row in console.rows][4:6] == [99.0, 99.0], "there is no other"


def test_metrics_of_a_step_are_fetched_after_the_next_is_dispatched():
    events = []

    class Watched:
        def __init__(self, n):
            self.n = n

        def __float__(self):
            events.append(("fetch", self.n))
            return 0.0

    def step(state, batch):
        events.append(("step", state.step + 1))
        values = dict.fromkeys(Metrics._fields, 0.0)
        return State(state.step + 1), Metrics(
            **{**values, "loss": Watched(state.step + 1), "aux": {}}
        )

    play(a_run(steps=3), step=step)
    assert events == [
        ("step", 1), ("step", 2), ("fetch", 1), ("step", 3), ("fetch", 2), ("fetch", 3),
    ]  # fmt: skip


def test_cadences_and_the_last_step():
    _, console, saves, evaluations, audit = play(a_run(steps=10, log=3, evaluation=4, save=5))
    assert [row["step"] for row in console.rows] == [3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in console.rows if "validation_loss" in row] == [4, 8, 10]
    assert saves == [(5, 5), (10, 10)]
    assert len(evaluations) == 3
    assert audit[3] == {"step": 4, "source": [0, 1], "row": [3, 3]}


def test_resuming_continues_the_count():
    (_, done), console, saves, _, audit = play(a_run(steps=10), first=7)
    assert [row["step"] for row in console.rows] == [8, 9, 10]
    assert (done, saves, audit[0]["step"]) == (10, [(10, 10)], 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_finished_step_and_ends(number):
    before = signal.getsignal(number)

    def step(state, batch):
        if state.step == 3:
            os.kill(os.getpid(), number)
        return State(state.step + 1), metrics()

    with Interrupt() as interrupt:
        (_, done), console, saves, *_ = play(a_run(), step=step, interrupt=interrupt)
    assert interrupt.signal == signal.Signals(number).name
    assert (done, saves) == (4, [(4, 4)])
    assert [row["step"] for row in console.rows] == [1, 2, 3, 4]
    assert signal.getsignal(number) is before


def faulty(kind):
    def step(state, batch):
        bad = state.step in (4, 5)
        values = {"nan": dict(loss=float("nan")), "spike": dict(loss=99.0)}[kind]
        result = metrics(skipped=1, in_a_row=state.step - 3, **values) if bad else metrics()
        return State(state.step + 1), result

    return step


def test_an_anomaly_stops_and_nothing_is_saved_after_it():
    with pytest.raises(loop.Anomaly, match=r"step 5: not finite \(loss nan.*on_anomaly='skip'"):
        play(a_run(), step=faulty("nan"))


def test_a_spike_is_called_one():
    run = a_run(spike_nats=2.0)
    with pytest.raises(
        loop.Anomaly, match=r"step 5: loss spike above train.spike_nats=2.0 \(loss 99"
    ):
        play(run, step=faulty("spike"))


def test_skipping_reports_every_time_and_goes_on():
    (_, done), console, *_ = play(a_run(on_anomaly="skip"), step=faulty("nan"))
    assert done == 10
    assert [text.split(":")[1].strip() for text in console.said] == ["step 5", "step 6"]


def test_too_many_skips_in_a_row_stop():
    with pytest.raises(loop.Anomaly, match=r"step 6.*train.max_skips=2 in a row"):
        play(a_run(on_anomaly="skip", max_skips=2), step=faulty("nan"))


def test_tokens_rates_and_stall_are_of_the_time_between_rows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def slow(finished, state):
        now[0] += 0.5
        return Loaded(0, np.zeros(2, int), np.zeros(2, int))

    def step(state, batch):
        now[0] += 1.5
        # Batches of 32, 33, 34 and 35 tokens: an objective's may differ in size.
        return State(state.step + 1), metrics(tokens=32 + state.step)

    run, console = a_run(steps=4, log=2), Console()
    recorder = loop.Recorder(
        run, loop.FlopRates(100.0, 3200.0), [], console, loop.Progress(10.0, 5.0)
    )
    loop.run(
        run, State(0), step, slow, evaluate=lambda _: {}, save=lambda *_: None,
        recorder=recorder, interrupt=Interrupt(),
    )  # fmt: skip
    last = console.rows[-1]
    assert last["seconds"] == pytest.approx(10 + 4 * 2)
    assert recorder.seconds == pytest.approx(18)
    # Step 2 is fetched when step 3 has been dispatched: 3 laps, then 1.
    assert console.rows[0]["tokens_per_second"] == pytest.approx(65 / 6)
    assert last["tokens_per_second"] == pytest.approx(69 / 2)
    assert [row["tokens"] for row in console.rows] == [5 + 65, 5 + 65 + 69]
    assert recorder.progress == (18.0, 139.0, {})
    assert [row["eta_seconds"] for row in console.rows] == [2 * 6 / 2, 0]
    assert last["mfu"] == pytest.approx(69 / 2 * 100 / 3200)
    assert console.rows[0]["stall"] == pytest.approx(1.5 / 6)
