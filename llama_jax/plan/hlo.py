"""Read the scheduled program that XLA's TPU compiler writes: cycles, collectives, what overlaps.

The compiler gives every operation that it schedules on the cores an estimate of cycles. A loop's body
stands once in the text; its operations count as often as the loop turns. Collectives and Pallas kernels
carry no estimate, nor does what runs beside on v5p's and v6e's sparse cores.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"),
    *("send", "recv"),
)
_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8},
}
_SHAPE = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")
_OP = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CALL = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(condition|body|calls|to_apply|called_computations)=\{?%([\w.\-]+)")


class Op(NamedTuple):
    """One line of the program."""

    name: str
    kind: str  # opcode
    shape: str  # as written, a tuple in parentheses
    operands: tuple[str, ...]
    called: dict[str, str]  # condition, body, calls -> computation
    cycles: int
    text: str

    @property
    def source(self) -> str:
        """The path of JAX names that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    @property
    def beside(self) -> bool:
        """Whether it runs on the sparse cores, beside what is scheduled."""
        return 'async_execution_thread="sparsecore"' in self.text


class Collective(NamedTuple):
    """A collective, with what one device holds of its result (of its operand for a reduce-scatter)."""

    kind: str
    bytes: int
    times: int  # a step
    parts: int  # devices that take part in one group
    started: bool  # and awaited apart, with other work between
    covered: float  # cycles of that work
    in_loop: bool
    source: str


class Compiled(NamedTuple):
    """One step, of training or of decoding, on one device."""

    hbm_gib: float  # arguments, results that are not written over them, temporaries
    argument_gib: float
    temporary_gib: float
    cycles: dict[str, float]  # by sort of work; Pallas kernels and collectives have none
    flops: float  # executed, kernels included
    kernel_flops: float  # of Pallas kernels alone
    collectives: list[Collective]
    seconds: float  # of compiling

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**self._asdict(), "collectives": [one._asdict() for one in self.collectives]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Compiled":
        collectives = [Collective(**one) for one in values["collectives"]]
        return cls(**{**values, "collectives": collectives})


class HloModule(NamedTuple):
    computations: dict[str, list[Op]]
    entry: str

    def times(self) -> dict[str, int]:
        """How often each computation that is scheduled runs in a step."""
        counted: collections.Counter = collections.Counter({self.entry: 1})
        order = [self.entry]
        for name in order:
            for op in self.computations[name]:
                if op.kind == "while":
                    body, turns = op.called["body"], self.turns(name, op)
                elif (
                    op.kind in ("call", "async-start", "conditional")
                    and op.called
                    and not op.beside
                ):
                    body, turns = next(iter(op.called.values())), 1
                else:
                    continue
                counted[body] += counted[name] * turns
                order.append(body)
        return dict(counted)

    def turns(self, where: str, loop: Op) -> int:
        """How often a loop turns: (bound - start) / step of its counter."""
        condition = {op.name: op for op in self.computations[loop.called["condition"]]}
        test = next(op for op in condition.values() if op.kind == "compare")
        counter, bound = (condition[name] for name in test.operands)
        index = int(re.findall(r"index=(\d+)", counter.text)[0])
        here = {op.name: op for op in self.computations[where]}
        start = self._constant(here, here[loop.operands[0]].operands[index])
        body = {op.name: op for op in self.computations[loop.called["body"]]}
        root = next(op for op in body.values() if op.text.startswith("ROOT"))
        step = self._step(body, root.operands[index])
        return math.ceil((_value(bound) - start) / step)

    def _constant(self, ops: dict[str, Op], name: str) -> int:
        op = ops[name]
        while op.kind in ("copy", "bitcast", "copy-done", "copy-start"):
            op = ops[op.operands[0]]
        return _value(op) if op.kind == "constant" else 0

    def _step(self, ops: dict[str, Op], name: str) -> int:
        """What the body adds to its counter: in an addition, or in a fusion of one."""
        total, op = 0, ops[name]
        while op.kind in ("add", "fusion", "copy", "bitcast"):
            inner = {o.name: o for o in self.computations[op.called["calls"]]} if op.called else ops
            if op.kind == "fusion":
                root = next(o for o in inner.values() if o.text.startswith("ROOT"))
                total += sum(_value(inner[n]) for n in root.operands if inner[n].kind == "constant")
                op = ops[op.operands[0]]
            elif op.kind == "add":
                constants = [n for n in op.operands if ops[n].kind == "constant"]
                total += sum(_value(ops[n]) for n in constants)
                op = ops[next(n for n in op.operands if n not in constants)]
            else:
                op = ops[op.operands[0]]
        return total or 1


def read(text: str) -> HloModule:
    computations: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in text.split("\n"):
        if header := _COMPUTATION.match(line):
            current = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _OP.match(line)):
            current.append(_op(found.group(1), found.group(2), line.strip()))
    return HloModule(computations, entry)


def cycles(program: HloModule) -> dict[str, float]:
    """Estimated cycles of a step by sort of work: matmul, elementwise, copy."""
    total: dict[str, float] = {"matmul": 0, "elementwise": 0, "copy": 0}
    for op, times in scheduled(program):
        total[sort(program, op)] += op.cycles * times
    return total


def scheduled(program: HloModule) -> Iterator[tuple[Op, int]]:
    """(op, how often it runs) of everything that a step schedules."""
    for name, times in program.times().items():
        for op in program.computations[name]:
            yield op, times


def sort(program: HloModule, op: Op) -> str:
    inside = [op]
    if op.kind == "fusion":
        inside = program.computations[op.called["calls"]]
    kinds = {one.kind for one in inside}
    if kinds & {"convolution", "dot"}:
        return "matmul"
    moving = {"copy", "bitcast", "transpose", "parameter", "slice", "dynamic-slice", "tuple"}
    moving |= {"dynamic-update-slice", "constant", "get-tuple-element", "copy-start", "copy-done"}
    return "copy" if kinds <= moving else "elementwise"


def kernels(program: HloModule) -> collections.Counter:
    """How often each Pallas kernel runs in a step, by its name."""
    counted: collections.Counter = collections.Counter()
    for op, times in scheduled(program):
        if 'custom_call_target="tpu_custom_call"' in op.text:
            counted[re.sub(r"[.\d]+$", "", op.name)] += times
    return counted


def collectives(program: HloModule) -> list[Collective]:
    found = []
    for name, times in program.times().items():
        ops = program.computations[name]
        clock = _clock(program, name)
        ends = {op.name: clock[i] for i, op in enumerate(ops)}
        awaited = {
            o: clock[i] for i, op in enumerate(ops) if "-done" in op.name for o in op.operands
        }
        updates = {o: op.name for op in ops if op.kind == "async-update" for o in op.operands}
        for op in ops:
            inner, kind = _collective(program, op)
            if inner is None:
                continue
            started = op.kind.endswith("-start") or op.name.startswith("async-collective-start")
            begun = updates.get(
                op.name, op.name
            )  # a sparse core gets its data after it was started
            fused = ends.get(op.name.replace("-start", "-done"), ends[op.name])
            covered = awaited.get(begun, fused) - ends[begun] if started else 0.0
            if op.name.startswith("async-collective-start") and not covered:
                covered = math.inf  # within products, as on v5e: by how much, the text does not say
            sizes = [_bytes(match) for match in _SHAPE.findall(inner.shape)]
            # An asynchronous all-gather has operand and result in its tuple.
            whole = max(sizes) if inner.kind.endswith("-start") else sum(sizes)
            parts = _parts(inner.text)
            if inner.kind.startswith(
                "reduce-scatter"
            ):  # else an all-reduce of which a part is kept
                whole *= parts
            found.append(
                Collective(kind, whole, times, parts, started, covered, times > 1, op.source)
            )
    return found


def merged(found: list[Collective]) -> list[Collective]:
    """The same without their sources, those that are alike once: their times add up."""
    times: collections.Counter = collections.Counter()
    for one in found:
        times[one._replace(times=0, source="")] += one.times
    return [one._replace(times=n) for one, n in times.items()]


def _clock(program: HloModule, name: str) -> list[float]:
    """Cycles that have passed when each operation of a computation ends, loops within it included."""
    now, clock = 0.0, []
    for op in program.computations[name]:
        now += op.cycles
        if op.kind == "while":
            within = _clock(program, op.called["body"])
            now += program.turns(name, op) * (within[-1] if within else 0.0)
        clock.append(now)
    return clock


def _collective(program: HloModule, op: Op) -> tuple[Op | None, str]:
    """The collective that an operation is or that, on v5e and later, it carries."""
    kind = next((k for k in COLLECTIVES if op.kind in (k, k + "-start")), "")
    if kind:
        return op, kind
    if op.beside:
        return next(_within(program, op), (None, ""))
    inside = op.called.get("calls", "") if op.kind == "fusion" else ""
    scattered = inside.startswith("all-reduce-scatter")
    if not scattered and not op.name.startswith("async-collective-start"):
        return None, ""
    for inner in program.computations[inside]:
        kind = next((k for k in COLLECTIVES if inner.kind in (k, k + "-start")), "")
        if kind:
            return inner, "reduce-scatter" if scattered else kind
    return None, ""


def _within(program: HloModule, op: Op) -> Iterator[tuple[Op, str]]:
    """The collectives of what an operation calls, at any depth."""
    for called in op.called.values():
        for one in program.computations[called]:
            if one.kind in COLLECTIVES:
                yield one, one.kind
            yield from _within(program, one)


def _op(name: str, rest: str, text: str) -> Op:
    if rest.startswith("("):
        end = _closing(rest)
        shape, rest = rest[: end + 1], rest[end + 1 :]
        call = _CALL.match(rest)
    else:
        call = _CALL.search(rest)
        shape = rest[: call.start()] if call else rest
        rest = rest[call.start() :] if call else ""
        call = _CALL.match(rest)
    kind = call.group(1) if call else ""
    inner = rest[call.end() - 1 :] if call else "()"
    arguments = inner[: _closing(inner) + 1]
    after = inner[len(arguments) :]
    return Op(
        name,
        kind,
        shape,
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        dict(_CALLED.findall(after)),
        _cycles(after),
        text,
    )


def _cycles(text: str) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', text)
    value = int(found.group(1)) if found else 0
    return value if value < 2**62 else 0


def _closing(text: str) -> int:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _bytes(match: tuple[str, str]) -> int:
    kind, sizes = match
    return _BYTES.get(kind, 4) * math.prod(int(size) for size in sizes.split(",") if size)


def _parts(text: str) -> int:
    """Devices a group."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        named = re.findall(r"'(\w+)'", found.group(2))
        return math.prod(int(sizes[axis]) for axis in named)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found.group(1).split(","))
    return 0


def _value(op: Op) -> int:
    return int(re.findall(r"constant\((-?\d+)\)", op.text)[0])
