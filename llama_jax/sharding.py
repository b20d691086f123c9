"""Where arrays live: the mesh, the letter tables, the Layout that turns letters into shardings.

The only file that knows mesh axes and PartitionSpec. Tables, one for each place that an array can be in, map
a letter to mesh axes; everything else speaks letters, and asks a Layout how many devices share what. A
dimension that does not divide raises; nothing is silently replicated.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax import config, dims

AXES = ("slices", "data", "fsdp", "context", "tensor")

_WIDE = {"wide": ("tensor",), "vocabulary": ("tensor",)}
_WHOLE = dict.fromkeys(("inner", "rank", "entries", "stack"), ())
# Parameters at rest: their narrow width over fsdp (ZeRO stage 3, arXiv:1910.02054), and over context, whose
# devices would else hold the same; their other large dimension over tensor (arXiv:1909.08053).
# Norm scales carry only that width and are sharded likewise.
PARAMETERS = dims.of_roles({**_WHOLE, **_WIDE, "narrow": ("fsdp", "context")})
# Parameters in use: gathered over fsdp.
GATHERED = dims.of_roles({**_WHOLE, **_WIDE, "narrow": ()})
# A batch as it comes from the hosts: rows over every data-parallel axis.
BATCH = dims.of_roles({"rows": ("slices", "data", "fsdp"), "positions": ()})
# Activations: heads and hidden widths over tensor; positions over context, and over tensor where nothing
# else is: residuals and norms (sequence parallelism, arXiv:2205.05198).
ACTIVATIONS = {**BATCH, **GATHERED, "T": ("context", "tensor")}
# Within attention every position is needed: heads take the place of positions over context (all-to-all,
# arXiv:2309.14509).
HEADS = {**ACTIVATIONS, "N": ("tensor", "context"), "K": ("tensor", "context"), "T": ()}
# Decoding has one position of each row, and rows that are not spread over fsdp.
_ONE_POSITION = {"B": ("slices", "data"), "T": ()}

Table = Mapping[str, tuple[str, ...]]  # letter -> mesh axes


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """The table of each place that an array can be in. Equal to itself alone, so that it can be hashed."""

    at_rest: Table  # parameters
    in_use: Table  # parameters
    batch: Table
    activations: Table
    heads: Table  # within attention
    products: Table | None  # what a product has just made; None: where XLA has it


TRAINING = Tables(
    at_rest=PARAMETERS,
    in_use=GATHERED,
    batch=BATCH,
    activations=ACTIVATIONS,
    heads=HEADS,
    products=None,
)
# Decoding reads every weight for a few tokens: weights are used where they rest, and the small activations
# go around (arXiv:2211.05102 section 3.2.2), spread as the weights are. Left free, XLA may gather the weights
# after all to have a product whole.
DECODING = Tables(
    at_rest=PARAMETERS,
    in_use=PARAMETERS,
    batch={**BATCH, **_ONE_POSITION},
    activations={**ACTIVATIONS, **_ONE_POSITION},
    heads={**HEADS, **_ONE_POSITION},
    products={**ACTIVATIONS, **PARAMETERS, **_ONE_POSITION},
)


class DeviceGroup(NamedTuple):
    """Devices that share the work on one array, or exchange parts of it."""

    parts: int  # their number
    apart: int  # from one to the next, in the order of the mesh


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what each letter means on it. Hashable, so that modules may hold it."""

    mesh: Mesh | AbstractMesh  # abstract: for shapes, before there are devices
    tables: Tables = TRAINING

    def param(self, letters: str) -> NamedSharding:
        return NamedSharding(self.mesh, _spec(self.tables.at_rest, letters))

    def batch(self, letters: str) -> NamedSharding:
        return NamedSharding(self.mesh, _spec(self.tables.batch, letters))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_parts(self) -> int:
        """The number of parts that the rows of a batch are spread over."""
        return self._parts(self.tables.batch, "B")

    @property
    def position_parts(self) -> int:
        """The number of parts that the positions of a row are spread over between layers."""
        return self._parts(self.tables.activations, "T")

    @property
    def slices(self) -> int:
        return self.mesh.shape["slices"]

    @property
    def shards(self) -> DeviceGroup:
        """The devices that a parameter is gathered from: each has a part of its narrow width."""
        return self._group(*self.tables.at_rest["D"])

    @property
    def wide(self) -> DeviceGroup:
        """The devices that split heads and hidden widths."""
        return self._group(*self.tables.at_rest["F"])

    @property
    def exchanging(self) -> DeviceGroup:
        """The devices that exchange positions for heads around attention."""
        return self._group(*(set(self.tables.heads["N"]) - set(self.tables.activations["N"])))

    @property
    def replicas(self) -> DeviceGroup:
        """The devices of a slice that hold the same part of every parameter."""
        return self._group("data")

    @property
    def decoding(self) -> "Layout":
        return dataclasses.replace(self, tables=DECODING)

    def act(self, x: jax.Array, letters: str) -> jax.Array:
        """Constrain an activation inside jit: `layout.act(x_BTD, "BTD")`."""
        return self._constrain(x, self.tables.activations, letters)

    def made(self, x: jax.Array, letters: str) -> jax.Array:
        """Constrain what a product has just made, where its table says how."""
        return self._constrain(x, self.tables.products, letters) if self.tables.products else x

    def materialise(self, x: jax.Array) -> jax.Array:
        """Keep XLA from computing x again inside each operation that reads it."""
        return x if self.mesh.size == 1 else _materialise(x)

    def rest(self, w: jax.Array, letters: str) -> jax.Array:
        """Constrain a parameter, or its gradient, to the place where the parameter is kept."""
        return self._constrain(w, self.tables.at_rest, letters)

    def gather(self, w: jax.Array, letters: str, dtype: str) -> jax.Array:
        """A parameter for use: cast, then whole over fsdp, unless it is used where it rests.

        The gradient is constrained to the shard at once, so that it is reduce-scattered. The transpose of
        a mere constraint would ask for the whole gradient on every device: an all-reduce, twice the
        bytes.
        """
        if self.mesh.size == 1:
            return w.astype(dtype)
        if self.tables.in_use is self.tables.at_rest:
            return self.rest(w.astype(dtype), letters)
        return _gather(self.rest(w.astype(dtype), letters), self, letters)

    def heads(self, q_BNTH: jax.Array, *keys_BKSH: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys and values as attention wants them: every position of a part of the heads.

        Where there are more parts than key heads, those are repeated.
        """
        self.check((q_BNTH.shape[1],), "N", "attention", self.tables.heads)
        times = self.key_heads(keys_BKSH[0].shape[1]) // keys_BKSH[0].shape[1]
        keys = (jnp.repeat(x, times, axis=1) if times > 1 else x for x in keys_BKSH)
        return (
            self._constrain(q_BNTH, self.tables.heads, "BNTH"),
            *(self._constrain(x, self.tables.heads, "BKSH") for x in keys),
        )

    def key_heads(self, kv_heads: int) -> int:
        """Their number after `heads`."""
        return math.lcm(self._parts(self.tables.heads, "K"), kv_heads)

    def cache(self, letters: str) -> NamedSharding:
        """Of keys and values that wait for later queries."""
        if self.mesh.size == 1:  # what XLA makes of it, and gives back
            return self.replicated
        return NamedSharding(self.mesh, _spec(self.tables.heads, letters))

    def on_own_heads(
        self,
        attend: Callable[..., jax.Array],
        q_BNTH: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        keys: Any,
    ) -> jax.Array:
        """Call `attend` on each device with its own rows and heads, for kernels that see one device.

        keys: which of them are seen, a tree of arrays [B, T] (model/context.py) or without any.
        """
        arrays = (*self.heads(q_BNTH, k_BKSH, v_BKSH), keys)
        if self.mesh.size == 1:
            return attend(*arrays)
        own = functools.partial(_spec, self.tables.heads)
        specs = (own("BNTH"), *(own("BKSH"),) * 2, own("BT"))
        call = jax.shard_map(
            attend, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return call(*arrays)

    def _constrain(self, x, table, letters):
        if self.mesh.size == 1:
            return x
        place = NamedSharding(self.mesh, _spec(table, letters))
        return jax.lax.with_sharding_constraint(x, place)

    def check(
        self, shape: Sequence[int], letters: str, what: str, table: Table | None = None
    ) -> None:
        """ValueError unless every dimension divides by the devices that its letter is spread over.

        table: that of parameters at rest, if none is given.
        """
        table = table or self.tables.at_rest
        for size, letter in zip(shape, letters, strict=True):
            parts = self._parts(table, letter)
            if size % parts:
                axes = [axis for axis in table[letter] if self.mesh.shape[axis] > 1]
                given = " x ".join(f"mesh.{axis}={self.mesh.shape[axis]}" for axis in axes)
                named = " x ".join(f"mesh.{axis}" for axis in axes)
                of, near = dims.LETTERS[letter], max(parts, round(size / parts) * parts)
                raise ValueError(
                    f"{what}: {given} must divide {of.setting}={size} ({of.words}); "
                    f"try {named}={math.gcd(size, parts)}, or {of.setting}={near}"
                )

    def check_rows(self, rows: int) -> None:
        """ValueError unless so many rows, one microbatch, spread evenly over the devices."""
        self.check((rows,), "B", "batch", self.tables.batch)

    def host_rows(self, rows: int, process: int | None = None) -> np.ndarray:
        """The global rows that the devices of a process hold, this one's if none is named, ascending.

        They are seldom contiguous: a mesh follows the torus of a TPU slice, where the chips of a host are
        not neighbours along fsdp or data.
        """
        process = jax.process_index() if process is None else process
        parts = self.batch("B").devices_indices_map((rows,)).items()
        spans = {part.indices(rows) for device, (part,) in parts if device.process_index == process}
        return np.concatenate([np.arange(*span) for span in sorted(spans)])

    def put(self, local: np.ndarray, letters: str, rows: int) -> jax.Array:
        """A global array of `rows` rows from this process's rows `host_rows(rows)`."""
        shape = (rows, *local.shape[1:])
        return jax.make_array_from_process_local_data(self.batch(letters), local, shape)

    def _parts(self, table: Table, letter: str) -> int:
        return self._group(*table[letter]).parts

    def _group(self, *axes: str) -> DeviceGroup:
        sizes = self.mesh.shape
        within = AXES[max((AXES.index(axis) for axis in axes), default=len(AXES)) + 1 :]
        return DeviceGroup(math.prod(sizes[a] for a in axes), math.prod(sizes[a] for a in within))


def _spec(table: Table, letters: str) -> PartitionSpec:
    """T takes those of its axes that no other dimension has."""
    taken = {axis for letter in letters if letter != "T" for axis in table[letter]}
    axes = (
        tuple(axis for axis in table[letter] if letter != "T" or axis not in taken)
        for letter in letters
    )
    return PartitionSpec(*(of_letter or None for of_letter in axes))


class Largest:
    """The largest of one number from each host, known to all. All call it equally often.

    The devices compute it, in step with what else they do: no host waits before it reads the result.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        self._own = NamedSharding(mesh, PartitionSpec("all"))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._zeros = self._spread(0)  # what nearly every call is of

    def __call__(self, number: int) -> jax.Array:
        return self._max(self._spread(number) if number else self._zeros)

    def _spread(self, number: int) -> jax.Array:
        own = np.full(1, number, np.int32)
        return jax.make_array_from_callback((self._own.num_devices,), self._own, lambda _: own)


def make(mesh: config.Mesh, devices: Sequence[Any]) -> Layout:
    """The layout of `mesh` over `devices`; the axis given as -1 takes those that are left."""
    shape = _shape(mesh, len(devices))
    if mesh.slices > 1 and hasattr(devices[0], "slice_index"):
        within, across = (1, *shape[1:]), (shape[0], 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Layout(Mesh(grid, AXES, axis_types=_AUTO))


def abstract(mesh: config.Mesh, devices: int) -> Layout:
    """The layout over so many devices that need not exist; for shapes and sizes alone."""
    return Layout(AbstractMesh(_shape(mesh, devices), AXES, axis_types=_AUTO))


def fewest(mesh: config.Mesh) -> int:
    """Devices that `mesh` can be laid out over: one along the axis that is given as -1."""
    return math.prod(max(getattr(mesh, axis), 1) for axis in AXES)


def meshes(
    hardware: str, slices: int, chips: int, contexts: Sequence[int]
) -> Iterator[config.Mesh]:
    """Every mesh of powers of two over slices of so many chips, with one of the `contexts`.

    tensor is at most 8: its devices exchange activations between products, and are to be neighbours.
    """
    powers = [2**n for n in range(chips.bit_length())]
    for tensor, context, fsdp in itertools.product((1, 2, 4, 8), contexts, powers):
        data, rest = divmod(chips, tensor * context * fsdp)
        if data and not rest:
            yield config.Mesh(slices, data, fsdp, context, tensor, hardware)


# jax.make_mesh defaults to Explicit, under which a contraction over a sharded dimension is a type error.
_AUTO = (AxisType.Auto,) * len(AXES)


def _shape(mesh: config.Mesh, devices: int) -> tuple[int, ...]:
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and devices % fixed == 0:
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh={sizes} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices, "
            f"but {devices} are here; set one axis to -1 to take what is left"
        )
    return tuple(sizes.values())


@jax.custom_vjp
def _materialise(x):
    return jax.lax.optimization_barrier(x)


_materialise.defvjp(lambda x: (_materialise(x), None), lambda _, slope: (slope,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, layout, letters):
    return layout._constrain(w, layout.tables.in_use, letters)


def _gather_forward(w, layout, letters):
    # Remat "none" knows it by the constraint.
    return layout._constrain(w, layout.tables.in_use, letters), None


def _gather_backward(layout, letters, _, slope):
    return (layout.rest(slope, letters),)


_gather.defvjp(_gather_forward, _gather_backward)
