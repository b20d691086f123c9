"""A run in its workdir, with everything that computes replaced."""

import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from llama_jax import config, files
from llama_jax.data import iterator
from llama_jax.interrupt import Interrupt
from llama_jax.run import hosts, session
from llama_jax.run import lease as lease_module
from llama_jax.tokenizer.added import NONE
from llama_jax.train import checkpoint, loop, metrics
from llama_jax.train.objective import Sums

RUN = config.Run(
    data=config.Data(seq_len=8),
    optim=config.Optim(warmup_steps=0),
    train=config.Train(steps=10, batch_size=4),
    eval=config.Eval(every=5),
    log=config.Log(tensorboard="off"),
)


BEFORE = loop.Progress(2.0, 70.0, {"loss": loop.Mean(4.5, 96.0), "accuracy": loop.Mean(0.5, 8.0)})


class Checkpoints:
    """Saves that are on disk once somebody waits for them."""

    def __init__(self, broken=False):
        self.started, self.written, self.broken = [], [], broken
        self.record = {}

    def save(self, step, state, record):
        self.started.append(step)
        self.record = record

    def clean(self):
        return []

    def wait(self):
        if self.broken:
            raise checkpoint.SaveError("the disk is full")
        self.written = list(self.started)


def play(monkeypatch, tmp_path, run_loop, checkpoints, first=0, run=RUN):
    """session.train around `run_loop`, from the step `first`."""
    for module, name, value in (
        (session.checkpoint, "Checkpoints", lambda *_: checkpoints),
        (session, "start", lambda *_: (SimpleNamespace(step=first, params={}), BEFORE)),
        (session, "figures", lambda *_: loop.FlopRates(1.0, 0.0)),
        (session.provenance, "describe", lambda _: {}),
        (session.iterator, "train", lambda *_: iter(())),
        (session.iterator, "bytes_per_token", lambda *_: {}),
        (session.mixture, "fingerprint", lambda *_: "order"),
        (session.loop, "run", run_loop),
        (lease_module, "SETTLE_SECONDS", 0.0),
    ):
        monkeypatch.setattr(module, name, value)
    machine = SimpleNamespace(
        advance=None,
        evaluate=None,
        program=SimpleNamespace(
            module=SimpleNamespace(layout=None),
            objective=SimpleNamespace(params=lambda trained, frozen: trained),
            frozen={},
        ),
    )
    console = SimpleNamespace(close=lambda: None, write=lambda _: None)
    prepared = SimpleNamespace(tokenizer_config=config.TokenizerConfig("byte"), additions=NONE)
    with Interrupt() as interrupt, session.holding(tmp_path, run) as lease:
        return session.train(
            run, tmp_path, lease, machine, prepared, interrupt, lambda first, steps: console
        )


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_being_written_is_waited_for_when_training_fails(
    monkeypatch, tmp_path, broken
):
    def run_loop(run, state, *_, save, **__):
        save(5, state)
        raise loop.Anomaly("step 6: not finite")

    checkpoints = Checkpoints(broken)
    with pytest.raises(loop.Anomaly, match="step 6"):
        play(monkeypatch, tmp_path, run_loop, checkpoints)
    assert checkpoints.written == ([] if broken else [5])


def test_a_workdir_that_another_process_took_over_gets_no_more_rows_and_checkpoints(
    monkeypatch, tmp_path
):
    checkpoints = Checkpoints()

    def run_loop(run, state, *_, save, recorder, **__):
        (tmp_path / lease_module.FILE).write_text('{"id": "x", "host": "far", "pid": 7}')
        monkeypatch.setattr(lease_module.time, "time", lambda: 4e9)  # it was stopped for long
        for write in (lambda: save(5, state), lambda: recorder._writers[0]({"step": 5})):
            with pytest.raises(lease_module.Held, match="process 7 on far"):
                write()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(monkeypatch, tmp_path, run_loop, checkpoints)
    assert checkpoints.started == []
    assert json.loads((tmp_path / lease_module.FILE).read_text())["host"] == "far"


def test_hosts_whose_rows_come_in_another_order_are_refused(monkeypatch):
    """The second host's mixture draws another order from the same rows, as another NumPy could."""
    meta = SimpleNamespace(text="text")
    store = SimpleNamespace(meta=meta, train=range(50))
    corpus = SimpleNamespace(name="a", weight=1.0, store=store)
    prepared = SimpleNamespace(
        sources=(corpus,), tokenizer=SimpleNamespace(fingerprint="t"), fingerprint="rows"
    )
    told = []
    monkeypatch.setattr(session.jax, "process_count", lambda: 2)
    monkeypatch.setattr(session.prepare, "prepare", lambda *_: prepared)
    monkeypatch.setattr(session, "sees_the_firsts", lambda _: False)
    monkeypatch.setattr(hosts, "together", lambda work: work())
    monkeypatch.setattr(hosts.exchange, "broadcast", lambda make: (told.append(make()), told[0])[1])
    monkeypatch.setattr(hosts.exchange, "gather", lambda text, *_: ["", text])
    assert session.prepare_once(RUN.data, 9) is prepared
    monkeypatch.setattr(session.mixture, "_shuffled", lambda length, seed: lambda n: n % length)
    with pytest.raises(ValueError, match=r"to host 1:\n  order of the rows: \w{64} -> \w{64}$"):
        session.prepare_once(RUN.data, 9)


def test_a_checkpoint_of_another_order_of_rows_is_not_gone_on_with():
    prepared = SimpleNamespace(fingerprint="text")
    provenance = {"data": "text", "code": "llama_jax 1, abc", "packages": "grain 0.2"}
    record = {"provenance": provenance, "next_step": 5, "seconds": 2.0, "order": "order"}
    record["loss_since_row"] = [1.5, 8.0]

    def start(record):
        restored = SimpleNamespace(state="state", record=record)
        checkpoints = SimpleNamespace(latest=lambda _: restored, folder="folder")
        program = SimpleNamespace(state=None)
        return session.start(RUN, program, checkpoints, prepared, "order")

    means = {"loss": loop.Mean(1.5, 8.0)}
    # Before tokens were counted all batches were full.
    assert start(record) == ("state", (2.0, 5 * RUN.tokens_per_step, means))
    assert start({**record, "tokens": 77.0}) == ("state", (2.0, 77.0, means))
    older = {name: value for name, value in record.items() if name != "order"}
    for other in ({**record, "order": "another"}, older):
        message = (
            r"the order of the rows has changed since .* \(it was llama_jax 1, abc; grain 0.2\)"
        )
        with pytest.raises(ValueError, match=message):
            start(other)


@pytest.mark.parametrize("signal", ["", "SIGTERM"])
def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(monkeypatch, tmp_path, signal):
    """Before the first step, in the row of its own step; so a curve is that of a run left alone."""
    rows = [{"step": n, "loss": 0.1 * n} for n in (4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        session,
        "validation",
        lambda *args: {} if args[-2]() else {"validation_loss": 1.5},  # stopped()
    )
    seen = []

    def run_loop(run, state, *_, interrupt, recorder, evaluate, **__):
        seen.extend(metrics.read(tmp_path / "metrics.jsonl"))
        recorder._writers[1]({"step": 10, "loss": 1.0})
        interrupt.signal = signal  # as the last evaluation ends
        return state, 10

    result = play(monkeypatch, tmp_path, run_loop, Checkpoints(), first=5)
    assert seen == [rows[0], {**rows[1], "validation_loss": 1.5}]
    assert result.rows == [*seen, {"step": 10, "loss": 1.0, "validation_loss": 1.5}]
    assert result.results == {"validation_loss": 1.5}
    assert result.interrupted == ""


def test_what_was_evaluated_is_not_evaluated_again(monkeypatch, tmp_path):
    rows = [{"step": n, "loss": 0.1 * n, "validation_loss": 2.5} for n in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(session, "validation", lambda *_, **__: pytest.fail("evaluated"))
    result = play(monkeypatch, tmp_path, None, Checkpoints(), first=10)
    assert result.results == {"validation_loss": 2.5}


def test_means_since_the_last_row_are_kept_by_a_checkpoint(monkeypatch, tmp_path):
    def run_loop(run, state, *_, save, recorder, **__):
        assert recorder.means == BEFORE.means, "those of the checkpoint"
        recorder.means["loss"] = recorder.means["loss"].add(1.0, 32.0)
        save(8, state)
        return state, 8

    checkpoints = Checkpoints()
    play(monkeypatch, tmp_path, run_loop, checkpoints, first=7)
    kept = session._progress(RUN, json.loads(json.dumps(checkpoints.record))).means
    mean = (pytest.approx((4.5 * 96 + 32) / 128), 128.0)
    assert kept == {"loss": mean, "accuracy": (0.5, 8.0)}


def test_validation_is_the_mean_over_sources_and_bits_are_of_each_sources_own_text(monkeypatch):
    """Three quarters of the tokens are prose, at 4 bytes a token; digits have 1."""
    parts = [("prose", 90.0, 30.0), ("prose", 60.0, 30.0), ("digits", 20.0, 20.0)]
    held_out = [iterator.HeldOut(source, sums) for source, *sums in parts]
    monkeypatch.setattr(session.iterator, "validation", lambda *_: iter(held_out))

    def evaluate(params, batch):
        nll, weight = map(jnp.float32, batch)
        # An aux mean with a divisor of its own: once right in each batch, of 3, 1 and 8 answers.
        answers = {90.0: 3.0, 60.0: 1.0, 20.0: 8.0}[float(nll)]
        right = jnp.float32(1), jnp.float32(answers)
        return Sums(nll + 7.0, weight, {"loss": (nll, weight), "accuracy": right})

    bytes_per_token = {"prose": 4.0, "digits": 1.0}
    values = session.validation(evaluate, None, None, None, bytes_per_token, lambda: False, None)
    stops = iter([False, True])
    assert session.validation(evaluate, *3 * [None], bytes_per_token, lambda: next(stops), 0) == {}
    prose, digits = 2.5 / 4 / math.log(2), 1 / math.log(2)
    assert values == pytest.approx(
        {
            "validation_loss": 1.75,
            "validation_loss/prose": 2.5,
            "validation_loss/digits": 1.0,
            "validation_bits_per_byte": (prose + digits) / 2,
            "validation_bits_per_byte/prose": prose,
            "validation_bits_per_byte/digits": digits,
            "validation_accuracy": (2 / 4 + 1 / 8) / 2,
            "validation_accuracy/prose": 2 / 4,
            "validation_accuracy/digits": 1 / 8,
        }
    )
    alone = session.measured("unigram", {"prose": 2.5}, bytes_per_token)
    assert alone == pytest.approx({"unigram_loss": 2.5, "unigram_bits_per_byte": prose})


def run_of(steps, **optim):
    """A run of so many steps with a warm-up of 10."""
    optim = {"schedule": "wsd", "warmup_steps": 10, **optim}
    return config.Run(train=config.Train(steps=steps), optim=config.Optim(**optim))


def workdir_of(tmp_path, run, *steps):
    """A workdir with checkpoints of these steps."""
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / files.COMMIT).touch()
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict(run)))
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The decay of wsd begins at step 10 + 0.9 * 90 = 91.
        (run_of(100), run_of(500)),
        (run_of(100), run_of(500, decay_fraction=0.5)),
        (run_of(500), run_of(100)),
        (run_of(100, schedule="inverse_sqrt"), run_of(500, schedule="inverse_sqrt")),
        (run_of(100, schedule="cosine", final_fraction=1.0), run_of(500)),
    ],
)
def test_a_run_gets_more_steps_where_none_would_have_been_made_otherwise(tmp_path, old, new):
    session.check_same(workdir_of(tmp_path, old, 60, 90), new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (run_of(100, schedule="cosine"), run_of(500, schedule="cosine"),
         r"is at step 90, and with train.steps: 100 -> 500 step 12 would have had the learning rate 0.0003 "
         r"instead of 0.0002999: optim.schedule='cosine' looks ahead. A run can be given more steps with "
         r"'inverse_sqrt', and with 'wsd' before its decay begins; give a new --workdir, or .* is there$"),
        (run_of(80), run_of(500), r"or move the checkpoints after 60 out of .*/checkpoints, to go on from there$"),
        (run_of(100), run_of(89), r"is at step 90 already, beyond train.steps=89; give a new --workdir, or more"),
        (run_of(100), run_of(500, learning_rate=0.1), r"holds another run; it differs in\n  optim.learning_rate"),
    ],
)  # fmt: skip
def test_more_steps_are_refused_where_earlier_ones_would_have_been_others(
    tmp_path, old, new, message
):
    with pytest.raises(ValueError, match=message):
        session.check_same(workdir_of(tmp_path, old, 60, 90), new)


def test_during_the_warm_up_any_schedule_may_change(tmp_path):
    old, new = run_of(100, schedule="cosine"), run_of(500, schedule="linear")
    session.check_same(workdir_of(tmp_path, old, 5, 10), new)


def test_the_card_of_a_run_that_goes_on_is_not_taken_for_its_end(monkeypatch, tmp_path):
    (tmp_path / "runcard.json").write_text('{"steps": 7}')
    (tmp_path / "runcard.md").write_text("of 7 steps")

    def run_loop(run, state, *_, **__):
        return state, 8

    play(monkeypatch, tmp_path, run_loop, Checkpoints(), first=7)
    assert sorted(path.name for path in tmp_path.glob("runcard*")) == [
        "runcard-7.json",
        "runcard-7.md",
    ]
