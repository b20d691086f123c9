"""The formats that are written: each takes prepared blocks, and ends as a folder of files."""

import collections
import functools
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from llama_jax import config, dims, tree
from llama_jax.convert import hf, job, meta_params, names, native, pth_plan, safetensors
from llama_jax.convert.names import Unit

WRITING = 6  # pieces that TensorStore is given at a time


class _Files:
    """Files whose every byte has its place before the first is written."""

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self._files = {}
        for name, size in sizes.items():
            self._files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            os.truncate(self._files[name], size)

    def write(self, file: str, at: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._files[file], view, at)
            view, at = view[done:], at + done

    def sync(self) -> None:
        for descriptor in self._files.values():
            os.fdatasync(descriptor)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class HuggingFace:
    """model.safetensors, or shards of it with an index."""

    def __init__(self, folder: Path, model: config.Model, dtypes: dict[str, np.dtype]):
        self._folder, self._dtypes = folder, dtypes
        self._shapes = {u.hf: names.torch_shape(u.row, model) for u in names.units(model)}
        sizes = {
            name: int(np.prod(shape, dtype=np.int64)) * dtypes[name].itemsize
            for name, shape in self._shapes.items()
        }
        self._shards, self._total = hf.shards_of(sizes), sum(sizes.values())
        self._places, headers, lengths = {}, {}, {}
        for file, held in self._shards.items():
            tensors = {name: (dtypes[name], self._shapes[name]) for name in held}
            headers[file], places, lengths[file] = safetensors.plan(tensors)
            self._places |= {name: (file, at) for name, at in places.items()}
        self._files = _Files(folder, lengths)
        for file, header in headers.items():
            self._files.write(file, 0, header)

    def prepare(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        return _bytes(rows)

    def write(self, unit: Unit, start: int, stop: int, prepared: np.ndarray) -> None:
        file, at = self._places[unit.hf]
        self._files.write(file, at + start * (len(prepared) // (stop - start)), prepared)

    def end(self, unit: Unit) -> bool:
        return True

    def sync(self) -> None:
        self._files.sync()

    def close(self) -> None:
        self._files.close()

    @staticmethod
    def is_torn(folder: Path) -> bool:
        return False

    def finish(self, remembered: dict[str, Any]) -> None:
        if len(self._shards) > 1:
            where = {name: file for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self._folder / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n")


class Meta:
    """consolidated.00.pth and params.json; one model-parallel part."""

    FILE = "consolidated.00.pth"

    def __init__(self, folder: Path, model: config.Model, dtypes: dict[str, np.dtype]):
        self._folder, self._model = folder, model
        tensors = {
            u.meta: (dtypes[u.hf], names.torch_shape(u.row, model)) for u in names.units(model)
        }
        tied = {"output.weight": "tok_embeddings.weight"} if model.output == "tied" else {}
        self._plan = pth_plan.plan(tensors, tied)
        members = [*self._plan.small, *self._plan.tensors.values()]
        self._index = len(pth_plan.index(dict.fromkeys(members, 0), self._plan.end))
        self._files = _Files(folder, {self.FILE: self._plan.end + self._index})
        self._crc = 0

    def prepare(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        return _bytes(names.interleave(rows, self._model.head_dim) if unit.row.pairs else rows)

    def write(self, unit: Unit, start: int, stop: int, prepared: np.ndarray) -> None:
        member = self._plan.tensors[unit.meta]
        self._crc = zlib.crc32(prepared.data, self._crc if start else 0)
        at = member.data + start * (len(prepared) // (stop - start))
        self._files.write(self.FILE, at, prepared)

    def end(self, unit: Unit) -> int:
        return self._crc

    def sync(self) -> None:
        self._files.sync()

    def close(self) -> None:
        self._files.close()

    @staticmethod
    def is_torn(folder: Path) -> bool:
        return False

    def finish(self, remembered: dict[str, Any]) -> None:
        sums = {}
        for member, content in self._plan.small.items():
            sums[member] = zlib.crc32(content)
            self._files.write(self.FILE, member.data, content)
        for unit in names.units(self._model):
            sums[self._plan.tensors[unit.meta]] = remembered[unit.hf]
        for member, crc in sums.items():
            self._files.write(self.FILE, member.start, pth_plan.header(member, crc))
        self._files.write(self.FILE, self._plan.end, pth_plan.index(sums, self._plan.end))
        self._files.sync()
        params = json.dumps(meta_params.params_of(self._model), indent=2)
        (self._folder / "params.json").write_text(params + "\n")


class Native:
    """The parameter tree as an Orbax checkpoint. Arrays are written by TensorStore, then handed to Orbax."""

    def __init__(self, folder: Path, model: config.Model, dtypes: dict[str, np.dtype]):
        self._folder, self._model = folder, model
        self._stage = folder / "arrays"
        self._stage.mkdir(exist_ok=True)
        self._dtypes: dict[str, np.dtype] = {}
        for unit in names.units(model):  # one dtype for the layers of a stack
            other = self._dtypes.setdefault(unit.path, dtypes[unit.hf])
            if other != dtypes[unit.hf]:
                self._dtypes[unit.path] = np.dtype(np.float32)
        self._writing: collections.deque = collections.deque()
        self._open = functools.lru_cache(maxsize=None)(self._open_array)

    def _open_array(self, path: str) -> ts.TensorStore:
        unit = next(u for u in names.units(self._model) if u.path == path)
        shape = list(dims.shape(unit.row.letters, self._model))
        pieces = list(shape)
        rows = job.rows_per_block(unit, self._model) // names.unit_rows(unit.row, self._model)
        pieces[names.lead(unit.row)] = rows
        if unit.group >= 0:
            shape, pieces = [self._model.groups, *shape], [1, *pieces]
        spec = {
            "driver": "zarr3",
            # TensorStore leaves out pieces of zeros otherwise, and Orbax takes them for lost.
            "store_data_equal_to_fill_value": True,
            "kvstore": {"driver": "file", "path": str(self._stage / path.replace("/", ".")) + "/"},
            "metadata": {
                "shape": shape,
                "data_type": self._dtypes[path].name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": pieces}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
        }
        return ts.open(spec, create=True, open=True).result()

    def prepare(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        return names.to_ours(rows, unit.row, self._model).astype(
            self._dtypes[unit.path], copy=False
        )

    def write(self, unit: Unit, start: int, stop: int, prepared: np.ndarray) -> None:
        together = names.unit_rows(unit.row, self._model)
        index = (slice(None),) * names.lead(unit.row) + (
            slice(start // together, stop // together),
        )
        if unit.group >= 0:
            index = (unit.group, *index)
        if len(self._writing) == WRITING:
            self._wait()
        self._writing.append(
            self._open(unit.path)[index].write(
                prepared, can_reference_source_data_indefinitely=True
            )
        )

    def end(self, unit: Unit) -> bool:
        return True

    def sync(self) -> None:
        """A piece that TensorStore has written is on disk."""
        while self._writing:
            self._wait()

    def _wait(self) -> None:
        try:
            self._writing.popleft().result()
        except ValueError as error:  # TensorStore's, also for a disk that is full
            raise OSError(str(error).rsplit(": ", 1)[-1]) from error

    def close(self) -> None:
        """Nothing is written behind the back of whoever removes the folder."""
        for writing in self._writing:
            writing.exception()

    @staticmethod
    def is_torn(folder: Path) -> bool:
        """Orbax was taking the arrays over: some are moved already."""
        return any(folder.glob(native.PARAMS + "*"))

    def finish(self, remembered: dict[str, Any]) -> None:
        staged = tree.nest(
            {path: _Staged(self._stage / path.replace("/", ".")) for path in self._dtypes}
        )
        handlers = type_handlers.create_type_handler_registry((_Staged, _Handover()))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, type_handler_registry=handlers
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(self._folder / native.PARAMS, args=ocp.args.PyTreeSave(staged))
        self._stage.rmdir()


class _Staged:
    """An array that is already written, as a leaf for Orbax."""

    def __init__(self, path: Path):
        self.path = path


class _Handover(type_handlers.NumpyHandler):
    """Orbax's handler of arrays, except that an array is moved into place instead of written."""

    async def serialize(self, values: Any, infos: Any, args: Any = None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            shutil.move(value.path, Path(info.path))
        return []
