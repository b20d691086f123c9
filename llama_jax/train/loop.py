"""The loop: the only place of the library with time, signals and output.

The device never waits for the host: step n + 1 is dispatched before the metrics of step n are fetched.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from llama_jax import config
from llama_jax.interrupt import Interrupt
from llama_jax.train.metrics import Console, Row, Writer


class Anomaly(Exception):
    """NaN, infinity or a spike that training must not pass over."""


@dataclasses.dataclass(frozen=True)
class FlopRates:
    """What turns tokens and seconds into the figures of a row."""

    flops_per_token: float
    peak_flops: float  # of all devices together; 0: unknown

    def mfu(self, tokens_per_second: float) -> float | None:
        return (
            tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None
        )


class Mean(NamedTuple):
    """A weighted mean of steps, as it grows. Of one step it is that step's value exactly.

    Where weights add up to 0 it is the weighted sum, as if divided by 1; later steps may change that.
    """

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> "Mean":
        """The mean with one more step, whose weight may have any sign."""
        total = self.weight + weight
        if not (self.weight and total):
            summed = self.value * (self.weight or 1.0) + value * weight
            return Mean(summed / (total or 1.0), total)
        return Mean(self.value + (value - self.value) * (weight / total), total)


class Progress(NamedTuple):
    """Totals of a run up to a step, over all of its sessions. A checkpoint's record keeps them."""

    seconds: float = 0.0  # seconds of training, without evaluation and saving
    tokens: float = 0.0  # tokens trained on
    means: Mapping[str, Mean] = {}  # means over the steps since the last row, by name


class Recorder:
    """Fetches the metrics of a step while the next one runs, and writes a row when one is due.

    The loss of a row is the weighted mean (in pretraining: over tokens) of the steps since the last row,
    without those whose update was left out: one step's is several times as noisy. So is every aux value of
    the objective, by its own weights. `means` holds these means so far, by name; a checkpoint between two
    rows keeps them, so that the row after a resumption is that of a run left alone.
    """

    def __init__(
        self,
        run: config.Run,
        rates: FlopRates,
        writers: list[Writer],
        console: Console,
        before: Progress,
    ):
        self._run, self._rates, self._writers, self._console = run, rates, writers, console
        self.seconds, self.tokens = before.seconds, before.tokens
        self.means = dict(before.means)
        self._mark = time.perf_counter()
        self._begin_row()
        self._pending: tuple[int, Any] | None = None

    @property
    def progress(self) -> Progress:
        """The totals up to the last step that was fetched."""
        return Progress(self.seconds, self.tokens, self.means)

    def _begin_row(self) -> None:
        self._row_seconds, self._row_tokens = self.seconds, self.tokens
        self._row_steps, self._waited = 0, 0.0

    def wait_for(self, batch: Callable[[], Any]) -> Any:
        """What `batch()` returns; its time is the row's stall."""
        start = time.perf_counter()
        loaded = batch()
        self._waited += time.perf_counter() - start
        return loaded

    def hold(self, step: int, metrics: Any) -> None:
        self._pending = (step, metrics)

    def fetch(self, evaluate: Callable[[], Row] | None = None) -> None:
        """Wait for the step that is held; write its row if `log.every` or an evaluation asks for it.

        Anomaly when its update was left out and the run must not go on.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)._asdict()
        aux = {name: tuple(map(float, pair)) for name, pair in values.pop("aux").items()}
        values = {name: float(value) for name, value in values.items()}
        aux["loss"] = values["loss"], values["weight"]
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self.tokens += values["tokens"]
        self._row_steps += 1
        if values["skipped"]:
            self._console.say(f"WARNING: {check_anomaly(self._run.train, step, values)}")
        else:
            for name, (value, weight) in aux.items():
                if weight:
                    self.means[name] = self.means.get(name, Mean()).add(value, weight)
        if evaluate or step % self._run.log.every == 0:
            row = self._row(step, values, {name: value for name, (value, _) in aux.items()})
            if evaluate:
                row |= evaluate()
                self.pause()
            for write in (*self._writers, self._console.write):
                write(row)

    def pause(self) -> None:
        """Leave out the time since the last fetch."""
        self._mark = time.perf_counter()

    def _row(self, step: int, values: dict[str, float], last: dict[str, float]) -> Row:
        """`last` are the step's own values of what is averaged, used where no step counts."""
        elapsed = max(self.seconds - self._row_seconds, 1e-9)
        rate = (self.tokens - self._row_tokens) / elapsed
        means = last | {name: mean.value for name, mean in self.means.items() if mean.weight}
        row = {
            "step": step,
            "loss": means.pop("loss"),
            "tokens": round(self.tokens),
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "mfu": self._rates.mfu(rate),
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "stall": min(self._waited / elapsed, 1.0),
            "eta_seconds": (self._run.train.steps - step) * elapsed / self._row_steps,
        }
        self._begin_row()
        self.means = {}
        assert not means.keys() & row.keys(), (
            f"aux of an objective has a name of the row: {[*means]}"
        )
        return row | means


def run(
    run: config.Run,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    next_batch: Callable[[int, Any], Any],
    *,
    evaluate: Callable[[Any], Row],
    save: Callable[[int, Any], None],
    recorder: Recorder,
    interrupt: Interrupt,
    audit: Writer | None = None,
) -> tuple[Any, int]:
    """Train from `state.step` to `run.train.steps`; the state and the number of finished steps.

    `next_batch(finished, state)` returns what `data.iterator` yields: the batch of the step that follows
    `finished` steps and starts from `state`. It must not keep the state, which the step donates.
    `evaluate(params)` returns values for a row. `save(step, state)` writes a checkpoint. An
    interrupt ends the loop early, after a save.
    """
    finished = saved = int(state.step)
    for done in range(finished + 1, run.train.steps + 1):
        if interrupt.due():
            break
        loaded = recorder.wait_for(functools.partial(next_batch, finished, state))
        if audit:
            audit({"step": done, "source": loaded.sources.tolist(), "row": loaded.rows.tolist()})
        state, metrics = step(state, loaded.batch)
        recorder.fetch()
        recorder.hold(done, metrics)
        finished, last = done, done == run.train.steps
        if last or done % run.eval.every == 0:
            recorder.fetch(functools.partial(evaluate, state.params))
        if last or done % run.checkpoint.every == 0:
            recorder.fetch()
            save(done, state)
            recorder.pause()
            saved = done
    recorder.fetch()
    if finished > saved:
        save(finished, state)
    return state, finished


def check_anomaly(train: config.Train, step: int, values: dict[str, float]) -> str:
    """What was wrong with a step whose update was left out. Anomaly if training must stop."""
    finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    kind = f"loss spike above train.spike_nats={train.spike_nats}" if finite else "not finite"
    text = (
        f"step {step}: {kind} (loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}), "
        f"the update was left out"
    )
    if train.on_anomaly == "stop":
        raise Anomaly(
            f"{text} and training stops; train with a lower optim.learning_rate in a new --workdir, or set "
            f"train.on_anomaly='skip' to leave such updates out and go on"
        )
    if values["skips_in_a_row"] >= train.max_skips:
        raise Anomaly(f"{text}; that is train.max_skips={train.max_skips} in a row, training stops")
    return text
