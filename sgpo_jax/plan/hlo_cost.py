"""What a compiled program moves on one device: collectives by kind, bytes of HBM by phase, and its largest arrays."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from sgpo_jax.plan import hlo
from sgpo_jax.plan.hlo import Array, Computation, Module, Op, Run
from sgpo_jax.plan.phases import Scopes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "copy-done", "async-start", "async-update", "async-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done",
}  # fmt: skip
_BARE = {"AllocateBuffer", "Sharding"}  # custom calls like that
_SCATTERS = "all-reduce-scatter"  # in the name of a fusion that is a reduce-scatter
# What reads a part of its first operand as large as its result.
_SLICING = ("dynamic-slice", "gather", "slice")


class Collective(NamedTuple):
    """Collectives of one kind, between as many devices, of arrays of one size, in one phase."""

    kind: str
    phase: str
    bytes: int  # of one's result on a device
    devices: int  # that take part in one
    times: float  # how often, over the program

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one of them when it goes round a ring."""
        others = (self.devices - 1) / self.devices
        parts = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1.0}
        return self.bytes * parts.get(self.kind, others)


def collectives(module: Module, scopes: Scopes) -> list[Collective]:
    """Every collective, once for each time that it runs.

    An asynchronous one stands in the text several times, with the same channel: where it starts, in each fusion that it
    runs beside, and where it ends. Only the start counts.
    """
    whole: dict[Collective, float] = defaultdict(float)
    pieces: dict[str, list[tuple[float, Collective]]] = defaultdict(list)
    counted = set()
    for run in hlo.runs(module, scopes):
        for op in module.computations[run.name].ops.values():
            kind = op.kind.removesuffix("-start")
            if kind in KINDS:
                counted.add(_channel(op))
                whole[_collective(module, op, kind, op, run, scopes)] += run.times
            for name in op.called("calls") if op.kind == "fusion" else ():
                fused = module.computations[name]
                for inner in fused.ops.values():
                    if inner.kind not in KINDS:
                        continue
                    scatters = inner.kind == "all-reduce" and _SCATTERS in name
                    kind = "reduce-scatter" if scatters else inner.kind
                    found = _collective(module, inner, kind, op if scatters else inner, run, scopes)
                    if scatters or _asynchronous(fused) == "AsyncCollectiveStart":
                        counted.add(_channel(inner))
                        whole[found] += run.times
                    else:
                        pieces[_channel(inner)].append((run.times, found))
    for channel in pieces.keys() - counted:
        times, found = min(pieces[channel])
        whole[found] += times
    return [each._replace(times=times) for each, times in whole.items()]


def _asynchronous(fused: Computation) -> str:
    """AsyncCollectiveStart or AsyncCollectiveDone where that is all that a fused computation does, else ""."""
    found = re.search(r'custom_call_target="(AsyncCollective\w+)"', fused.root.text)
    return found[1] if found else ""


def _channel(op: Op) -> str:
    found = re.search(r"channel_id=(\d+)", op.text)
    return found[1] if found else op.name


def _collective(module: Module, op: Op, kind: str, result: Op, run: Run, scopes: Scopes) -> Collective:
    sizes = [array.bytes for array in result.arrays]
    size = max(sizes) if op.kind.endswith("-start") else sum(sizes)  # a start has its operand beside the result
    return Collective(kind, scopes.phase(op.path or run.path), size, _participants(module, op), 0.0)


def _participants(module: Module, op: Op) -> int:
    if "source_target_pairs" in op.text:
        return 2
    found = re.search(r"replica_groups=(\{\{[^}]*\}|\[[\d,]+\]<=|mesh\[[^\]]*\] ?\{[^}]*\})", op.text)
    if not found:
        return module.devices
    groups = found[1]
    if groups.startswith("{{"):
        return groups.count(",") + 1
    if groups.startswith("["):
        return int(re.findall(r"\d+", groups)[-1])
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", groups)}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", groups.partition("]")[2]))


def hbm_bytes(module: Module, scopes: Scopes) -> dict[str, float]:
    """Bytes that are read from and written to HBM, by phase.

    Every operation reads its operands and writes its result, but for arrays in memory on the core; a fusion that
    slices an operand, or writes into one, moves that part only. A kernel moves all, unless `phases.reads` says less.
    """
    total: dict[str, float] = defaultdict(float)
    usage: dict[str, list[float]] = {}
    for run in hlo.runs(module, scopes):
        computation = module.computations[run.name]
        for op in computation.ops.values():
            path = op.path or run.path
            moved = scopes.read(path) if op.kind == "custom-call" else None
            if moved is None:
                moved = _moved(module, computation, op, usage)
            total[scopes.phase(path)] += run.times * moved
    return dict(total)


def _moved(module: Module, computation: Computation, op: Op, usage: dict[str, list[float]]) -> float:
    if op.kind in _FREE or (op.kind == "custom-call" and any(f'"{name}"' in op.text for name in _BARE)):
        return 0.0
    results = [array.bytes * (array.space == 0) for array in op.arrays]
    reads = [sum(a.bytes for a in computation.ops[name].arrays if a.space == 0) for name in op.operands]
    if op.kind.endswith("-start"):  # (destination, source, ...) of a copy
        return float(sum(results[:2]))
    if op.kind in _SLICING:
        return float(results[0] + min(sum(reads[:1]), op.arrays[0].bytes))
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2.0 * min(reads[-1 if op.kind == "scatter" else 1], results[0])
    if op.kind != "fusion":
        return float(sum(results) + sum(reads))
    name = op.called("calls")[0]
    if "Start" in (step := _asynchronous(module.computations[name])):  # the result stands beside the operand
        return float(sum(reads) + max(results))
    if step:
        return 0.0
    if name not in usage:
        usage[name] = _usage(module, name)
    read = sum(min(whole, part) for whole, part in zip(reads, usage[name], strict=False))
    return read + sum(min(whole, part) for whole, part in zip(results, _written(module, name), strict=False))


def _usage(module: Module, name: str) -> list[float]:
    """Bytes that a fused computation reads of each of its operands."""
    computation = module.computations[name]
    # A collective beside which a fusion runs has been counted where it starts.
    free = ("tuple", *(() if _SCATTERS in name else KINDS))
    users: dict[str, list[Op]] = defaultdict(list)
    for op in computation.ops.values():
        for operand in set(op.operands):
            users[operand].append(op)

    def used(value: Op) -> float:
        total = 0.0
        for op in users[value.name]:
            first = bool(op.operands) and op.operands[0] == value.name
            if op.kind in _SLICING and first:
                total += op.arrays[0].bytes
            elif op.kind in ("bitcast", "reshape") and not op.root:
                total += used(op)
            elif op.kind == "fusion":
                inner = _usage(module, op.called("calls")[0])
                total += sum(part for operand, part in zip(op.operands, inner, strict=False) if operand == value.name)
            elif not (op.kind in free or (op.kind == "dynamic-update-slice" and first)):
                return math.inf
        return total

    parameters = sorted(
        (op for op in computation.ops.values() if op.kind == "parameter"), key=lambda op: int(op.operands[0])
    )
    return [used(parameter) for parameter in parameters]


def _written(module: Module, name: str) -> list[float]:
    """Bytes that a fused computation writes of each of its results."""
    ops = module.computations[name].ops
    root = module.computations[name].root

    def written(op: Op) -> float:
        while op.kind == "bitcast":
            op = ops[op.operands[0]]
        if op.kind == "parameter" or (op.kind in KINDS and _SCATTERS not in name):  # passed on
            return 0.0
        if op.kind == "dynamic-update-slice":
            return float(ops[op.operands[1]].arrays[0].bytes)
        if op.kind == "fusion":
            return _written(module, op.called("calls")[0])[0]
        return math.inf

    return [written(ops[operand]) for operand in root.operands] if root.kind == "tuple" else [written(root)]


def largest(module: Module, count: int = 8) -> list[tuple[int, str, str]]:
    """(bytes, shape, what makes it) of the largest arrays in HBM, the program's arguments included."""
    found: dict[tuple[str, str], int] = {}
    for run in hlo.runs(module, Scopes("", trips=(("", 1.0),))):
        for op in module.computations[run.name].ops.values():
            if op.kind in _FREE and not (op.kind == "parameter" and run.name == module.entry):
                continue
            where = "argument " * (op.kind == "parameter") + (op.path or run.path or op.name)
            for array in op.arrays:
                if array.space == 0:
                    found.setdefault((_shape(array), where), array.bytes)
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [(size, shape, where) for (shape, where), size in ordered[:count]]


def _shape(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
