"""Memory traffic of a compiled program on one device: collectives, bytes of HBM by phase, and the largest arrays."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from sgpo_jax.plan import hlo
from sgpo_jax.plan.hlo import Array, Computation, Execution, Module, Op
from sgpo_jax.plan.phases import Scopes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "copy-done", "async-start", "async-update", "async-done",
    "all-gather-done", "all-reduce-done", "reduce-scatter-done", "all-to-all-done", "collective-permute-done",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "Sharding"}  # custom calls that move no bytes
_REDUCE_SCATTER = "all-reduce-scatter"  # stands in the name of a fusion that is a reduce-scatter
# Operations that read only a part of their first operand, as large as their result.
_SLICING = ("dynamic-slice", "gather", "slice")
# Operations that write a part of their first operand in place, which is the operand of this number.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": -1}
_COUNTED = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # the numbers of devices as `_counted` takes them
_WORKSPACE = ("s8", "u8")  # types of the scratch memory that libraries of matrix products ask for on GPUs


class Collective(NamedTuple):
    """All collectives of a program that agree in kind, phase, size, and number of devices and hosts."""

    kind: str  # one of KINDS
    phase: str
    bytes: int  # result of one collective on a device
    devices: int  # participants of one collective
    times: float  # number of such collectives in a call of the program
    hosts: int = 1  # of the participants; 1 too where no network lies between hosts

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one such collective, in a ring."""
        others = (self.devices - 1) / self.devices
        parts = {"all-reduce": 2 * others, "reduce-scatter": self.devices - 1, "collective-permute": 1.0}
        return self.bytes * parts.get(self.kind, others)

    @property
    def sent_to_hosts(self) -> float:
        """Bytes of `sent` that go to another host.

        There are as many rings as a host has participants, each with its share of the bytes, and each leaves a host
        once, through another device. In an all-to-all every device sends to all others alike.
        """
        if self.hosts == 1:
            return 0.0
        if self.kind == "all-to-all":
            return self.bytes * (self.hosts - 1) / self.hosts
        return self.sent * self.hosts / self.devices


def collectives(module: Module, scopes: Scopes, per_host: int = 0) -> list[Collective]:
    """Returns the collectives of a program, each weighted by how often it runs.

    Hosts have `per_host` devices each; with 0 they do not matter.

    An asynchronous collective appears in the text several times, always with the same channel: where it starts, in each
    fusion that overlaps with it, and where it ends. Only the start counts.
    """
    times: dict[Collective, float] = defaultdict(float)
    pieces: dict[str, list[tuple[float, Collective]]] = defaultdict(list)  # by channel; counted where there is no start
    counted = set()
    for execution in hlo.executions(module, scopes):
        for op in module.computations[execution.name].ops.values():
            kind = op.kind.removesuffix("-start")
            if kind in KINDS:
                counted.add(_channel(op))
                times[_collective(module, op, kind, op, execution, scopes, per_host)] += execution.times
            for name in op.called("calls") if op.kind == "fusion" else ():
                fused = module.computations[name]
                for inner in fused.ops.values():
                    if inner.kind not in KINDS:
                        continue
                    scatters = inner.kind == "all-reduce" and _REDUCE_SCATTER in name
                    kind = "reduce-scatter" if scatters else inner.kind
                    result = op if scatters else inner
                    collective = _collective(module, inner, kind, result, execution, scopes, per_host)
                    if scatters or _async_step(fused) == "AsyncCollectiveStart":
                        counted.add(_channel(inner))
                        times[collective] += execution.times
                    else:
                        pieces[_channel(inner)].append((execution.times, collective))
    for channel in pieces.keys() - counted:
        count, collective = min(pieces[channel])
        times[collective] += count
    return [collective._replace(times=count) for collective, count in times.items()]


def _async_step(fused: Computation) -> str:
    """Returns AsyncCollectiveStart or -Done for a fusion that only starts or ends a collective, else ""."""
    match = re.search(r'custom_call_target="(AsyncCollective\w+)"', fused.root.attributes)
    return match[1] if match else ""


def _channel(op: Op) -> str:
    """Returns the channel of a collective; its name where it has none."""
    match = re.search(r"channel_id=(\d+)", op.attributes)
    return match[1] if match else op.name


def _collective(
    module: Module, op: Op, kind: str, result: Op, execution: Execution, scopes: Scopes, per_host: int
) -> Collective:
    """Describes the collective `op`, whose result is that of the operation `result`; its count is still 0."""
    sizes = [array.bytes for array in result.arrays]
    size = max(sizes) if op.kind.endswith("-start") else sum(sizes)  # a start returns its operand and its result
    groups = _groups(module, op)
    hosts = max(len({device // per_host for device in group}) for group in groups) if per_host else 1
    return Collective(kind, scopes.phase(op.path or execution.path), size, len(groups[0]), 0.0, hosts)


def _groups(module: Module, op: Op) -> list[list[int]]:
    """Returns the groups of devices that exchange data in a collective, all of the same size.

    Raises:
        ValueError: the text of the groups is in none of the known notations.
    """
    match = re.search(r"(replica_groups|source_target_pairs)=(.*)", op.attributes)
    text = match[2] if match else "{}"
    if text.startswith("{}"):
        return [list(range(module.devices))]
    if listed := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    # Groups x size.
    if counted := re.match(rf"\[(\d+),(\d+)\]<={_COUNTED}", text):
        return _counted(*counted.groups()[2:]).reshape(int(counted[1]), int(counted[2])).tolist()
    # Axes of a mesh along which the devices of a group lie.
    if named := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_COUNTED}\))? ?\{{([^}}]*)\}}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[4])
        order = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in along)  # those of a group at the end
        numbers = _counted(named[2] or str(math.prod(sizes.values())), named[3]).reshape(list(sizes.values()))
        return numbers.transpose(order).reshape(-1, math.prod(sizes[name] for name in along)).tolist()
    raise ValueError(f"{op.name}: the groups of this collective are written in an unknown way: {text[:80]}")


def _counted(shape: str, order: str | None) -> np.ndarray:
    """Returns the numbers of devices, counted in a shape such as "2,4", whose axes are then put into another order."""
    sizes = [int(size) for size in shape.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)


def hbm_bytes(module: Module, scopes: Scopes) -> dict[str, float]:
    """Returns phase -> bytes that are read from and written to HBM.

    Every operation reads its operands and writes its results. Arrays in memory on the core are free. A fusion that
    slices an operand, or writes a slice of one in place, moves only that slice. A kernel moves all of its arrays unless
    `Scopes.reads` or `Scopes.entries` says otherwise.
    """
    total: dict[str, float] = defaultdict(float)
    usage: dict[str, list[float]] = {}
    for execution in hlo.executions(module, scopes):
        computation = module.computations[execution.name]
        for op in computation.ops.values():
            path = op.path or execution.path
            moved = scopes.read_bytes(path) if op.kind == "custom-call" else None
            if moved is None:
                moved = _moved(module, computation, op, usage) - _other_entries(computation, op, scopes.stacked(path))
            total[scopes.phase(path)] += execution.times * moved
    return dict(total)


def _moved(module: Module, computation: Computation, op: Op, usage: dict[str, list[float]]) -> float:
    """Returns the bytes of HBM that an operation moves. `usage` remembers the results of `_usage`, by name."""
    if op.kind in _FREE or (op.kind == "custom-call" and any(f'"{name}"' in op.attributes for name in _FREE_CALLS)):
        return 0.0
    scratch = _WORKSPACE if _is_product(op) else ()
    results = [array.bytes * (array.space == 0 and array.dtype not in scratch) for array in op.arrays]
    reads = [sum(a.bytes for a in computation.ops[name].arrays if a.space == 0) for name in op.operands]
    if op.kind.endswith("-start"):  # (destination, source, ...) of a copy; an all-reduce on GPUs has only its result
        return float(sum(results[:2]) if len(results) > 1 else results[0] + sum(reads))
    if op.kind in _SLICING:
        return float(results[0] + min(sum(reads[:1]), op.arrays[0].bytes))
    if op.kind in _IN_PLACE:
        return 2.0 * min(reads[_IN_PLACE[op.kind]], results[0])
    if op.kind != "fusion":
        return float(sum(results) + sum(reads))
    name = op.called("calls")[0]
    if "Start" in (step := _async_step(module.computations[name])):  # it returns its operand and its result
        return float(sum(reads) + max(results))
    if step:
        return 0.0
    if name not in usage:
        usage[name] = _usage(module, name)
    read = sum(min(whole, part) for whole, part in zip(reads, usage[name], strict=False))
    return read + sum(min(whole, part) for whole, part in zip(results, _written(module, name), strict=False))


def _other_entries(computation: Computation, op: Op, count: int) -> float:
    """Returns the bytes of the entries that a kernel does not read in the largest operand that stacks `count`."""
    if not count or op.kind != "custom-call":
        return 0.0
    stacks = (a.bytes for name in op.operands for a in computation.ops[name].arrays if a.shape[:1] == (count,))
    return max(stacks, default=0) * (1 - 1 / count)


def _is_alias(module: Module, op: Op) -> bool:
    """Returns whether an operation gives the array that it takes another tiling where it lies, as for codes of int8."""
    if op.kind != "fusion" or "output_to_operand_aliasing={{}: (0, {})}" not in op.attributes:
        return False
    return {inner.kind for inner in module.computations[op.called("calls")[0]].ops.values()} == {"parameter", "copy"}


def _is_product(op: Op) -> bool:
    """Returns whether an operation is a matrix product of NVIDIA's library, which also returns its scratch memory."""
    return op.kind == "custom-call" and 'custom_call_target="__cublas' in op.attributes


def workspace(module: Module) -> int:
    """Returns the most bytes of scratch memory that one matrix product of NVIDIA's library takes in a program.

    Raises:
        ValueError: the program calls cuDNN's attention, which asks for its scratch memory only on the card.
    """
    most = 0
    for computation in module.computations.values():
        for op in computation.ops.values():
            if 'custom_call_target="__cudnn$fmha' in op.attributes:
                raise ValueError(f"{op.path or op.name}: cuDNN's attention takes memory that is known only on a card")
            sizes = [array.bytes for array in op.arrays if array.dtype in _WORKSPACE] if _is_product(op) else []
            most = max(most, *sizes, 0)
    return most


def _usage(module: Module, name: str) -> list[float]:
    """Returns the bytes that a fusion reads of each of its operands; infinite where it reads all of it."""
    computation = module.computations[name]
    # A collective that overlaps with a fusion is counted where it starts.
    free = ("tuple", *(() if _REDUCE_SCATTER in name else KINDS))
    users: dict[str, list[Op]] = defaultdict(list)
    for op in computation.ops.values():
        for operand in set(op.operands):
            users[operand].append(op)

    def used(value: Op) -> float:
        """Returns the bytes that the operations after a value read of it."""
        total = 0.0
        for op in users[value.name]:
            first = bool(op.operands) and op.operands[0] == value.name
            if op.kind in _SLICING and first:
                total += op.arrays[0].bytes
            elif (op.kind in ("bitcast", "reshape") or _is_alias(module, op)) and not op.root:
                total += used(op)
            elif op.kind == "fusion":
                inner = _usage(module, op.called("calls")[0])
                total += sum(part for operand, part in zip(op.operands, inner, strict=False) if operand == value.name)
            elif not (op.kind in free or (op.kind in _IN_PLACE and first)):
                return math.inf
        return total

    parameters = sorted(
        (op for op in computation.ops.values() if op.kind == "parameter"), key=lambda op: int(op.operands[0])
    )
    return [used(parameter) for parameter in parameters]


def _written(module: Module, name: str) -> list[float]:
    """Returns the bytes that a fusion writes of each of its results; infinite where it writes all of it."""
    ops = module.computations[name].ops
    root = module.computations[name].root

    def written(op: Op) -> float:
        """Returns the bytes that a result writes, by the operation that makes it."""
        while op.kind == "bitcast":
            op = ops[op.operands[0]]
        if op.kind == "parameter" or (op.kind in KINDS and _REDUCE_SCATTER not in name):  # passed through
            return 0.0
        if op.kind in _IN_PLACE:
            return float(ops[op.operands[_IN_PLACE[op.kind]]].arrays[0].bytes)
        if op.kind == "fusion":
            return _written(module, op.called("calls")[0])[0]
        return math.inf

    return [written(ops[operand]) for operand in root.operands] if root.kind == "tuple" else [written(root)]


def largest(module: Module, count: int = 8) -> list[tuple[int, str, str]]:
    """Returns (bytes, shape, origin) of the largest arrays in HBM, including the arguments of the program."""
    sizes: dict[tuple[str, str], int] = {}
    for execution in hlo.executions(module, Scopes("", trips=(("", 1.0),))):
        for op in module.computations[execution.name].ops.values():
            if op.kind in _FREE and not (op.kind == "parameter" and execution.name == module.entry):
                continue
            origin = "argument " * (op.kind == "parameter") + (op.path or execution.path or op.name)
            for array in op.arrays:
                if array.space == 0:
                    sizes.setdefault((_shape(array), origin), array.bytes)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [(size, shape, origin) for (shape, origin), size in ordered[:count]]


def _shape(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
