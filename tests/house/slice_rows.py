"""Which rows of a batch each host of a TPU slice loads, in the order in which libtpu gives the slice's devices.

Runs in a process of its own (test_topologies.py), with the environment of llama_jax/plan/aot.py: names of configs
on standard input, one line of JSON on standard output.
"""

import collections
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np

from llama_jax import config, sharding
from llama_jax.analysis import hardware
from llama_jax.data import iterator, mixture
from llama_jax.plan import aot, fit


class Rows:
    """A split whose row n holds the token n, and no others."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def read(self, rows):
        return np.repeat(np.array(rows)[:, None], 3, axis=1), None


class Ordered:
    """Row n of training is row n of the only source."""

    def __getitem__(self, n):
        return 0, n


class Host:
    """The layout as one host sees it. What it would put on its devices is kept instead."""

    def __init__(self, layout, process):
        self.layout, self.process = layout, process

    def host_rows(self, rows):
        return self.layout.host_rows(rows, self.process)

    def put(self, local, letters, rows):
        return local


def wrong(layout, rows, local_of) -> tuple[str, int]:
    """What JAX would refuse or place wrongly ("" if nothing), and how many hosts' rows lie apart.

    jax.make_array_from_process_local_data wants the different parts that a host's devices hold, ascending.
    """
    parts = collections.defaultdict(set)
    for device, (part,) in layout.batch("B").devices_indices_map((rows,)).items():
        parts[device.process_index].add(part.indices(rows)[:2])
    seen, apart = set(), 0
    for process, held in parts.items():
        wanted = [n for part in sorted(held) for n in range(*part)]
        got = local_of(Host(layout, process))
        if got.shape[0] != len(wanted):
            return f"host {process} loads {len(got)} rows, its devices hold {len(wanted)}", 0
        if got[:, 0].tolist() != wanted:
            return f"host {process} loads other rows than its devices hold", 0
        seen.update(wanted)
        apart += wanted[-1] - wanted[0] >= len(wanted)
    return ("" if seen == set(range(rows)) else f"{rows - len(seen)} rows are on no device"), apart


def main() -> None:
    mixture.order_of = lambda data, prepared: Ordered()
    answer = {"layouts": 0, "hosts": 0, "apart": 0, "slices": [], "wrong": []}
    checked = set()
    names = [name for name, of in hardware.SLICES.items() if of.hosts > 1 and of.topology]
    for stem in json.load(sys.stdin):
        run = config.freeze(importlib.import_module(f"configs.{stem}").get_config())
        for name in names:
            found = fit.fits(run, name)
            if not found or (found[0].run.mesh, found[0].run.train) in checked:
                continue
            laid_out = found[0].run
            checked.add((laid_out.mesh, laid_out.train))
            slice_ = hardware.SLICES[name]
            layout = sharding.make(laid_out.mesh, aot.devices(slice_))
            size = laid_out.train.batch_size
            store = SimpleNamespace(train=Rows(size), validation=Rows(size))
            tokenizer = SimpleNamespace(bos=-1, eos=-2)
            prepared = SimpleNamespace(
                sources=[SimpleNamespace(name="text", store=store)], tokenizer=tokenizer
            )

            def train(host, run=laid_out, prepared=prepared, size=size):
                return iterator.loader(run, prepared, host.host_rows(size))(0).batch.tokens_BT

            def held_out(host, run=laid_out, prepared=prepared):
                return next(iterator.validation(run, prepared, host)).batch.tokens_BT

            answer["layouts"] += 1
            answer["hosts"] += slice_.hosts
            answer["slices"] = sorted({*answer["slices"], name})
            for what, rows, local_of in (
                ("training", size, train),
                ("validation", size // laid_out.train.microbatches, held_out),
            ):
                fault, apart = wrong(layout, rows, local_of)
                answer["apart"] += apart
                if fault:
                    answer["wrong"].append(f"{stem}:{name}, {what}: {fault}")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
