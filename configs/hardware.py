"""Where a page runs: `--config=configs/7b.py:v4_32` lays it out for that slice.

The layout (mesh, remat policy, microbatches, loss chunks) is the fastest that fits by the formulas of
llama_jax/plan/fit.py; `python -m experiments.plan` shows it and asks the compiler. What a user sets on the
command line goes on top. The slices are those of llama_jax/analysis/hardware.py.
"""

from llama_jax import config
from llama_jax.analysis import hardware
from llama_jax.plan import fit

PLACE = "the slice after the colon of --config"


def lay_out(run: config.Run, name: str) -> config.Run:
    """`run` with a mesh and a way of computing for the slice. ValueError if there is none that fits."""
    slice_ = hardware.find_slice(name, PLACE)
    name = hardware.name_of(name)
    if found := fit.fits(run, name):
        return found[0].run
    rows = run.train.batch_size
    why = "is too small for this run"
    # Every other axis of the mesh is a power of two.
    odd = slice_.devices // (slice_.devices & -slice_.devices)
    if rows < slice_.devices:
        why = f"has {slice_.devices} devices, over which train.batch_size={rows} rows cannot spread"
    elif rows % odd:
        why = f"has {slice_.devices} devices: train.batch_size={rows} must divide by {odd}"
    holding = [other for other in hardware.SLICES if fit.fits(run, other)]
    raise ValueError(f"{PLACE}, {name}, {why}; these hold it: {', '.join(holding) or 'none'}")
