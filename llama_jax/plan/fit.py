"""How to lay a run out on a slice: every mesh, remat policy and microbatch, those that fit, fastest first.

By formula: memory as analysis/memory.py has it, time as products at a usual share of the peak rate plus the
collectives that they cannot cover. Good for ranking; the compiler has the last word on what fits.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from llama_jax import config, sharding, tree
from llama_jax.analysis import flops, hardware, memory
from llama_jax.model import kernels
from llama_jax.plan import roofline
from llama_jax.sharding import Layout
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
    for candidate, layout in _candidates(run, name, slice_):
        parts = layout.shards.parts * layout.wide.parts
        bytes_ = state / parts, parameters / parts
        for one in _policies(candidate, layout):
            need = memory.of_bytes(one, layout, *bytes_, slice_.device)
            if need.total <= limit:
                found.append(Fit(one, need, _seconds(one, layout, flops_per_token, slice_)))
    return sorted(found, key=lambda fit: fit.seconds)


@functools.lru_cache(maxsize=64)
def _sizes(run: config.Run) -> tuple[int, int, int]:
    """Bytes of the state with what is frozen, and of trained parameters; FLOPs a token."""
    program = programs.build(run, sharding.abstract(config.Mesh(), 1))
    state, parameters = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in ((program.state, program.frozen), program.state.params)
    )
    a_token = flops.per_token(program.module, run.data.seq_len, tree.paths(program.frozen))
    return state, parameters, a_token


def _candidates(
    run: config.Run, name: str, slice_: hardware.Slice
) -> Iterator[tuple[config.Run, Layout]]:
    chips = slice_.devices // slice_.slices
    powers = [2**n for n in range(chips.bit_length())]
    contexts = [n for n in powers if run.data.seq_len // n >= 8192] or [1]
    kernel = "blockwise" if kernels.unable(run.model, slice_.kernel) else slice_.kernel
    model = dataclasses.replace(run.model, kernel=kernel)
    for mesh in sharding.meshes(name, slice_.slices, chips, contexts):
        layout = sharding.abstract(mesh, slice_.devices)
        rows = layout.row_parts
        if run.train.batch_size % rows or not _divides(run, layout):
            continue
        for microbatches in _divisors(run.train.batch_size // rows):
            chunks = _chunks(run, microbatches, layout)
            train = dataclasses.replace(run.train, microbatches=microbatches, loss_chunks=chunks)
            yield dataclasses.replace(run, model=model, mesh=mesh, train=train), layout


def _divides(run: config.Run, layout: Layout) -> bool:
    model, shards = run.model, layout.shards.parts
    wide = (model.heads, model.kv_heads, model.ffn_dim, model.vocab_size)
    return (
        model.dim % shards == 0
        and (shards == 1 or model.dim // shards >= SMALLEST_SHARD)
        and (shards == 1 or model.dim // shards % TILE == 0)
        and all(size % layout.wide.parts == 0 for size in wide)
        and model.heads % (layout.wide.parts * layout.exchanging.parts) == 0
        and run.data.seq_len % layout.position_parts == 0
    )


def _policies(run: config.Run, layout: Layout) -> Iterator[config.Run]:
    for remat in REMAT:
        if remat == "none" and layout.wide.parts > 1:
            continue  # much more is kept than memory.py counts: 405B, 81 GiB by formula, did not fit into 95
        yield dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))


def _chunks(run: config.Run, microbatches: int, layout: Layout) -> int:
    """Enough of them that the logits of one stay below LOGITS_GIB."""
    tokens = run.tokens_per_step / microbatches / layout.row_parts / layout.position_parts
    wanted = 6 * tokens * run.model.vocab_size / 2**30 / LOGITS_GIB
    return next(n for n in _divisors(run.data.seq_len) if n >= min(wanted, run.data.seq_len))


def _seconds(
    run: config.Run, layout: Layout, flops_per_token: float, slice_: hardware.Slice
) -> float:
    device = hardware.DEVICES[slice_.device]
    rate = PRODUCT_RATE.get(slice_.device, USUAL_RATE)
    model, wide, shards = run.model, layout.wide, layout.shards
    work = flops_per_token * run.tokens_per_step / slice_.devices
    products = work * REMAT[model.remat] / (rate * device.bf16_tflops * 1e12)
    if device.hbm_gb_s:
        lanes = memory.padded(model) if slice_.topology else model
        kept = 2 * memory.stored(lanes) * run.tokens_per_step / slice_.devices
        products += STORED_PASSES * kept / (device.hbm_gb_s * 1e9)
    kept_by_host = roofline.host(memory.offloaded(run, slice_.devices))
    layer = (
        2
        * model.dim
        * (2 * model.head_dim * (model.heads + model.kv_heads) + 3 * model.ffn_dim)
        / wide.parts
    )  # bytes of one layer's parameters in bfloat16
    exchange = functools.partial(roofline.exchange, slice_)
    # What context alone shards is left out.
    weights = model.layers * exchange("all-gather", layer, *shards)
    weights *= shards.parts > layout.exchanging.parts
    row = 2 * run.tokens_per_step / run.train.microbatches / layout.row_parts
    row /= layout.exchanging.parts
    between = exchange("all-gather", row * model.dim, *wide)
    activations = 10 * between * (wide.parts > 1)
    # Heads for positions and back: queries, keys, values and what comes out, and their gradients.
    heads = row * model.head_dim * 2 * (model.heads + model.kv_heads) / wide.parts
    swapped = exchange("all-to-all", heads, *layout.exchanging)
    activations += 3 * swapped * (layout.exchanging.parts > 1)
    # Weights are gathered behind the products, forward and backward; their gradients are reduced behind them
    # by sparse cores alone. Activations are exchanged between them. Whether copies to the host hide behind
    # anything is not known.
    micro = run.train.microbatches
    hidden = 3 if slice_.device in hardware.SPARSE_CORES else 2
    between_products = micro * ((3 - hidden) * weights + model.layers * activations)
    # Shards of gradients of one slice are added to another's, and those of one group of GPUs.
    shard = layer / shards.parts
    if layout.slices > 1:
        between_products += micro * model.layers * shard / (device.dcn_gb_s * 1e9)
    if not slice_.topology and layout.replicas.parts > 1:
        summed = exchange("all-reduce", shard, *layout.replicas)
        between_products += micro * model.layers * summed
    return max(products, micro * hidden * weights) + between_products + kept_by_host


@functools.cache
def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
