"""How to lay a run out on a slice: every mesh, remat policy and microbatch, those that fit, fastest first.

By formula: memory as analysis/memory.py has it, time as products at a usual share of the peak rate plus the
collectives that they cannot cover. Good for ranking; the compiler has the last word on what fits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from llama_jax import config, sharding
from llama_jax.analysis import flops, hardware, memory
from llama_jax.model import kernels
from llama_jax.plan import roofline
from llama_jax.train import program as programs

# Gathers and reduce-scatters become all-reduces of whole parameters when a shard is not a multiple of a
# tile's rows (104 of width 6656 at FSDP 64) or has few of them (16 of width 4096 at FSDP 256).
TILE, SMALLEST_SHARD = 16, 64
SPARE = 0.92  # of the memory: the formula is within 10% of the compiler
LOGITS_GIB = 1.0  # of one chunk of the loss, at most
# From compiled steps (docs/scale.md), all that is not a product included: FLOPs a second over the peak rate;
# and what is stored for the backward pass, over the bandwidth of HBM, so often (written, read, brought into
# other layouts). On v4 the two give the estimated seconds of 7B under full, attention and linear within 1%.
PRODUCT_RATE = {
    **{"TPU v4": 0.70, "TPU v5": 0.75, "TPU v5 lite": 0.78},
    **{"TPU v6 lite": 0.61, "TPU7x": 0.7},
}
USUAL_RATE = 0.5  # of others
STORED_PASSES = 13.4
# Executed over model FLOPs; dots calls attention's kernel again, which has half the rate of products.
REMAT = {
    "none": 1.02,
    "linear": 1.04,
    "dots": 1.12,
    "offload": 1.06,
    "attention": 1.2,
    "full": 1.28,
}


class Fit(NamedTuple):
    run: config.Run
    need: memory.Need
    seconds: float  # of a step, estimated


def fits(run: config.Run, name: str) -> list[Fit]:
    """Layouts of `run` on the slice `name` that fit, fastest first; empty if none does."""
    slice_ = hardware.find_slice(name)
    limit = hardware.DEVICES[slice_.device].hbm_gib * SPARE
    whole = dataclasses.replace(run, mesh=config.Mesh())
    state, parameters, flops_per_token = _sizes(whole)
    found = []
    for candidate in _candidates(run, name, slice_):
        mesh = {axis: getattr(candidate.mesh, axis) for axis in sharding.AXES}
        parts = mesh["fsdp"] * mesh["context"] * mesh["tensor"]
        bytes_ = state / parts, parameters / parts
        for one in _policies(candidate):
            need = memory.of_bytes(one, mesh, *bytes_, slice_.device)
            if need.total <= limit:
                found.append(Fit(one, need, _seconds(one, flops_per_token, slice_)))
    return sorted(found, key=lambda fit: fit.seconds)


@functools.lru_cache(maxsize=64)
def _sizes(run: config.Run) -> tuple[int, int, int]:
    """Bytes of the state with what is frozen, and of trained parameters; FLOPs a token."""
    program = programs.build(run, sharding.abstract(config.Mesh(), 1))
    state, parameters = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in ((program.state, program.frozen), program.state.params)
    )
    return state, parameters, flops.per_token(program.module, run.data.seq_len)


def _candidates(run: config.Run, name: str, slice_: hardware.Slice) -> Iterator[config.Run]:
    chips = slice_.devices // slice_.slices
    powers = [2**n for n in range(chips.bit_length()) if 2**n <= chips]
    contexts = [n for n in powers if run.data.seq_len // n >= 8192] or [1]
    kernel = "blockwise" if kernels.unable(run.model, slice_.kernel) else slice_.kernel
    model = dataclasses.replace(run.model, kernel=kernel)
    for tensor, context, fsdp in itertools.product((1, 2, 4, 8), contexts, powers):
        data, rest = divmod(chips, tensor * context * fsdp)
        rows = data * fsdp * slice_.slices
        if rest or data == 0 or run.train.batch_size % rows:
            continue
        if not _divides(run, fsdp * context, tensor, context):
            continue
        mesh = config.Mesh(
            slices=slice_.slices,
            data=data,
            fsdp=fsdp,
            context=context,
            tensor=tensor,
            hardware=name,
        )
        for microbatches in _divisors(run.train.batch_size // rows):
            chunks = _chunks(run, rows, microbatches, mesh)
            train = dataclasses.replace(run.train, microbatches=microbatches, loss_chunks=chunks)
            yield dataclasses.replace(run, model=model, mesh=mesh, train=train)


def _divides(run: config.Run, shards: int, tensor: int, context: int) -> bool:
    model = run.model
    wide = (model.heads, model.kv_heads, model.ffn_dim, model.vocab_size)
    return (
        model.dim % shards == 0
        and (shards == 1 or model.dim // shards >= SMALLEST_SHARD)
        and (shards == 1 or model.dim // shards % TILE == 0)
        and all(size % tensor == 0 for size in wide)
        and model.heads % (tensor * context) == 0
        and run.data.seq_len % (tensor * context) == 0
    )


def _policies(run: config.Run) -> Iterator[config.Run]:
    for remat in REMAT:
        if remat == "none" and run.mesh.tensor > 1:
            continue  # much more is kept than memory.py counts: 405B, 81 GiB by formula, did not fit into 95
        yield dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))


def _chunks(run: config.Run, rows: int, microbatches: int, mesh: config.Mesh) -> int:
    """Enough of them that the logits of one stay below LOGITS_GIB."""
    tokens = run.tokens_per_step / microbatches / rows / mesh.context / mesh.tensor
    wanted = 6 * tokens * run.model.vocab_size / 2**30 / LOGITS_GIB
    return next(n for n in _divisors(run.data.seq_len) if n >= min(wanted, run.data.seq_len))


def _seconds(run: config.Run, flops_per_token: float, slice_: hardware.Slice) -> float:
    device = hardware.DEVICES[slice_.device]
    rate = PRODUCT_RATE.get(slice_.device, USUAL_RATE)
    model, mesh = run.model, run.mesh
    work = flops_per_token * run.tokens_per_step / slice_.devices
    products = work * REMAT[model.remat] / (rate * device.bf16_tflops * 1e12)
    if device.hbm_gb_s:
        lanes = memory.padded(model) if slice_.topology else model
        kept = 2 * memory.stored(lanes) * run.tokens_per_step / slice_.devices
        products += STORED_PASSES * kept / (device.hbm_gb_s * 1e9)
    kept_by_host = roofline.host(memory.offloaded(run))
    layer = (
        2
        * model.dim
        * (2 * model.head_dim * (model.heads + model.kv_heads) + 3 * model.ffn_dim)
        / mesh.tensor
    )  # bytes of one layer's parameters in bfloat16
    apart, sharded = mesh.tensor, mesh.tensor * mesh.context * mesh.fsdp
    exchange = functools.partial(roofline.exchange, slice_)
    gather = exchange("all-gather", layer, mesh.fsdp * mesh.context, apart)
    weights = model.layers * gather * (mesh.fsdp > 1)
    rows = mesh.slices * mesh.data * mesh.fsdp
    row = 2 * run.tokens_per_step / run.train.microbatches / rows / mesh.context
    between = exchange("all-gather", row * model.dim, mesh.tensor)
    activations = 10 * between * (mesh.tensor > 1)
    # Heads for positions and back: queries, keys, values and what comes out, and their gradients.
    heads = row * model.head_dim * 2 * (model.heads + model.kv_heads) / mesh.tensor
    activations += 3 * exchange("all-to-all", heads, mesh.context, apart) * (mesh.context > 1)
    # Weights are gathered behind the products, forward and backward; their gradients are reduced behind them
    # by sparse cores alone. Activations are exchanged between them. Whether copies to the host hide behind
    # anything is not known.
    micro = run.train.microbatches
    hidden = 3 if slice_.device in hardware.SPARSE_CORES else 2
    between_products = micro * ((3 - hidden) * weights + model.layers * activations)
    if mesh.slices > 1:  # and the shards of gradients of one slice are added to another's
        shard = layer / (mesh.fsdp * mesh.context)
        between_products += micro * model.layers * shard / (device.dcn_gb_s * 1e9)
    if not slice_.topology and mesh.data > 1:  # and those of one group of GPUs to another's
        shard = layer / (mesh.fsdp * mesh.context)
        summed = exchange("all-reduce", shard, mesh.data, sharded)
        between_products += micro * model.layers * summed
    return max(products, micro * hidden * weights) + between_products + kept_by_host


@functools.cache
def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
