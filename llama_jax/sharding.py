"""Where arrays live: the mesh, the letter tables, the Layout that turns letters into shardings.

The only file that knows mesh axes and PartitionSpec. Two tables, one for parameters and one for
activations, map a letter to mesh axes; everything else speaks letters. A dimension that does not
divide raises; nothing is silently replicated.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax import config, dims

AXES = ("data", "fsdp", "tensor")

# Parameters: their width over fsdp (ZeRO stage 3, arXiv:1910.02054), their other large dimension
# over tensor (arXiv:1909.08053). Norm scales carry only D and are sharded likewise.
PARAMETERS = {
    **{"D": ("fsdp",)},
    **{"N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)},
    **{"H": (), "L": ()},
}
# Activations: rows over every data-parallel axis, heads and hidden widths over tensor.
ACTIVATIONS = {
    **{"B": ("data", "fsdp"), "T": (), "S": (), "D": ()},
    **{"N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)},
    **{"G": (), "H": ()},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what each letter means on it. Hashable, so that modules may hold it."""

    mesh: Mesh

    def param(self, letters: str) -> NamedSharding:
        return NamedSharding(self.mesh, _spec(PARAMETERS, letters))

    def batch(self, letters: str) -> NamedSharding:
        return NamedSharding(self.mesh, _spec(ACTIVATIONS, letters))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_parts(self) -> int:
        """The number of parts that the rows of a batch are spread over."""
        return self._parts(ACTIVATIONS, "B")

    def act(self, x: jax.Array, letters: str) -> jax.Array:
        """Constrain an activation inside jit: `layout.act(x_BTD, "BTD")`."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.batch(letters))

    def check(self, shape: Sequence[int], letters: str, what: str, table=PARAMETERS) -> None:
        """ValueError unless every dimension divides by the devices that its letter is spread over."""
        for size, letter in zip(shape, letters, strict=True):
            parts = self._parts(table, letter)
            if size % parts:
                axes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in table[letter])
                near = max(parts, round(size / parts) * parts)
                raise ValueError(
                    f"{what}: {dims.FIELDS[letter]}={size} ({dims.WORDS[letter]}) must divide by "
                    f"{parts}, the devices of mesh {axes}; nearest size that does: {near}, "
                    f"or change the mesh"
                )

    def check_rows(self, rows: int) -> None:
        """ValueError unless so many rows, one microbatch, spread evenly over the devices."""
        self.check((rows,), "B", "batch", ACTIVATIONS)

    def host_rows(self, rows: int) -> tuple[int, int]:
        """(start, stop) of the global rows that this process's devices hold."""
        indices = self.batch("B").addressable_devices_indices_map((rows,)).values()
        spans = [index[0].indices(rows)[:2] for index in indices]
        return min(start for start, _ in spans), max(stop for _, stop in spans)

    def put(self, local: np.ndarray, letters: str, rows: int) -> jax.Array:
        """A global array of `rows` rows from this process's rows `host_rows(rows)`."""
        shape = (rows, *local.shape[1:])
        return jax.make_array_from_process_local_data(self.batch(letters), local, shape)

    def _parts(self, table, letter: str) -> int:
        return math.prod(self.mesh.shape[axis] for axis in table[letter])


def make(mesh: config.Mesh, devices: Sequence[jax.Device]) -> Layout:
    """The layout of `mesh` over `devices`; the axis given as -1 takes those that are left."""
    sizes = dataclasses.asdict(mesh)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {
            axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()
        }
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh={sizes} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices, "
            f"but {len(devices)} are here; set one axis to -1 to take what is left"
        )
    # Auto axes: jax.make_mesh defaults to Explicit, under which a contraction over a sharded
    # dimension is a type error.
    auto = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes[axis] for axis in AXES)
    return Layout(jax.make_mesh(shape, AXES, axis_types=auto, devices=devices))


def _spec(table: dict[str, tuple[str, ...]], letters: str) -> PartitionSpec:
    return PartitionSpec(*(table[letter] or None for letter in letters))
