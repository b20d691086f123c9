"""A command on devices in an order in which the rows of a host lie apart, as on a TPU slice.

python -m tests.run.apart 0,1,4,5,2,3,6,7 experiments.train ...
"""

import runpy
import sys

from llama_jax import sharding


def reorder(order) -> None:
    """Lay meshes out over the devices in this order from now on."""
    make = sharding.make
    sharding.make = lambda mesh, devices: make(mesh, [devices[i] for i in order])


if __name__ == "__main__":
    reorder([int(number) for number in sys.argv[1].split(",")])
    del sys.argv[0:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
