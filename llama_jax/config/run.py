"""A training run: everything that determines it."""

import dataclasses

from llama_jax.config.aspects import how, where
from llama_jax.config.data import Data
from llama_jax.config.model import Model
from llama_jax.config.rules import (
    check_seed,
    choose,
    divides,
    local,
    not_negative,
    positive,
    refuse_idle,
)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW of LLaMA (arXiv:2302.13971 section 2.3) unless said otherwise."""

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 2000
    final_fraction: float = 0.1  # learning rate of the last step, as a share of the peak
    decay_fraction: float = (
        0.1  # of the steps after warm-up, at the end, in which schedule "wsd" falls
    )
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0
    # Parameters that are trained, by globs of their paths or by letters: ("groups/*/attention/*", "D").
    train: tuple[str, ...] = ("*",)

    def __post_init__(self):
        if not self.train:
            raise ValueError("optim.train=() trains nothing; ('*',) trains every parameter")
        positive(self, "optim", "learning_rate", "eps", "clip_norm")
        for name in ("beta1", "beta2", "final_fraction", "decay_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name.startswith("beta") and value == 1):
                raise ValueError(f"optim.{name}={value} must lie between 0 and 1")
        idle = {"lion": ("eps",), "adafactor": ("beta1", "beta2", "eps")}.get(self.name, ())
        refuse_idle(self, "optim", idle, f"optim.name={self.name!r}")
        idle = [] if self.schedule == "wsd" else ["decay_fraction"]
        idle += ["final_fraction"] if self.schedule == "inverse_sqrt" else []
        refuse_idle(self, "optim", idle, f"optim.schedule={self.schedule!r}")
        not_negative(self, "optim", "warmup_steps", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 238_419  # 1.0T tokens in batches of 4M, LLaMA 7B
    batch_size: int = 2048  # rows an optimiser step, over all devices
    microbatches: int = how(
        1
    )  # gradient accumulation: the batch in so many parts, one after another
    loss_chunks: int = how(1)  # logits of 1/chunks of the positions exist at a time
    z_loss: float = 0.0  # times the squared log of the partition function (PaLM used 1e-4)
    seed: int = 0  # of the initial parameters
    on_anomaly: str = how("stop")  # "skip": leave the update out, report it, go on
    spike_nats: float = (
        0.0  # loss this far above its running mean is an anomaly; 0: only NaN and inf
    )
    max_skips: int = how(10)  # anomalies in a row that stop even "skip"
    # Begin with the weights of this folder: a converted model, or a run's workdir.
    init_from: str = where("")
    init_step: int = where(0)  # the checkpoint of that run; 0: its newest, when this run begins
    init_checksum: str = ""  # of those weights; found when the run begins, and then expected

    def __post_init__(self):
        positive(self, "train", "steps", "batch_size", "microbatches", "loss_chunks", "max_skips")
        not_negative(self, "train", "z_loss", "spike_nats", "init_step")
        check_seed(self.seed, "train.seed")
        divides("train.microbatches", self.microbatches, "train.batch_size", self.batch_size)
        choose(("stop", "skip"), self.on_anomaly, "train.on_anomaly")
        local(self, "train", "init_from")
        if not self.init_from:
            refuse_idle(self, "train", ("init_step", "init_checksum"), "train.init_from=''")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1, allowed once, takes those that are left.

    data repeats the parameters and splits the rows, fsdp splits both, context splits the positions of a
    row, tensor the heads and hidden widths. slices: TPU slices, joined by the data centre's network.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    hardware: str = "any"  # the slice that the page was laid out for, as in 7b.py:v4_32

    def __post_init__(self):
        sizes = {name: n for name, n in dataclasses.asdict(self).items() if name != "hardware"}
        if any(size == 0 or size < -1 for size in sizes.values()):
            raise ValueError(f"mesh={sizes} must be positive, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes} may leave one axis to be filled, not several")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 1000  # steps
    keep: int = 3

    def __post_init__(self):
        positive(self, "checkpoint", "every", "keep")


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = 1000  # steps
    rows: int = 2048  # held-out rows, at most; an equal share of each source

    def __post_init__(self):
        positive(self, "eval", "every", "rows")


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 10  # steps
    tensorboard: str = "on"
    wandb: str = "off"
    audit: str = "off"  # "on": audit.jsonl lists the rows that each step consumed
    peak_tflops: float = 0.0  # a device, for MFU; 0: look it up by the device's name
    watts_per_chip: float = 0.0  # for energy and CO2; 0: look it up

    def __post_init__(self):
        positive(self, "log", "every")
        not_negative(self, "log", "peak_tflops", "watts_per_chip")
        for name in ("tensorboard", "wandb", "audit"):
            choose(("on", "off"), getattr(self, name), f"log.{name}")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run."""

    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    mesh: Mesh = how(Mesh())
    checkpoint: Checkpoint = how(Checkpoint())
    eval: Eval = how(Eval())
    log: Log = how(Log())

    def __post_init__(self):
        if self.optim.train != ("*",) and not self.train.init_from:
            raise ValueError(
                f"optim.train={self.optim.train} freezes the other parameters, and those need weights: give "
                "train.init_from, a converted model or a run's workdir"
            )
        divides("train.loss_chunks", self.train.loss_chunks, "data.seq_len", self.data.seq_len)
        if self.model.init == "mup" and self.optim.name in ("adafactor", "muon"):
            raise ValueError(
                f"model.init='mup' does not know how optim.name={self.optim.name!r} should slow down as a "
                "network grows; set optim.name to 'adamw' or 'lion'"
            )
        if self.model.max_positions and self.model.max_positions < self.data.seq_len:
            raise ValueError(
                f"model.max_positions={self.model.max_positions} must be at least "
                f"data.seq_len={self.data.seq_len}: no position may be without its row"
            )
        if self.eval.rows < len(self.data.sources):
            raise ValueError(
                f"eval.rows={self.eval.rows} must be at least {len(self.data.sources)}, one of each source"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below "
                f"train.steps={self.train.steps}; try {max(self.train.steps // 10, 0)}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len
