"""A compiled program's text: its computations, and how often each of them runs.

Written for the optimised, scheduled modules that `compiled.as_text()` gives, in which shapes are those of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from sgpo_jax.plan.phases import Scopes

_BITS = {"pred": 8, "bf16": 16}  # of types whose name does not end in their number of bits
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """One array of an operation's result."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int  # with the padding of its layout
    space: int  # 0 is HBM; others are memory on the core


class Op(NamedTuple):
    """One operation."""

    name: str
    kind: str  # as in "fusion"
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]  # names
    text: str  # what follows the operands
    root: bool

    @property
    def path(self) -> str:
        """Where in the traced program it comes from, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1].replace("\\'", "'") if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations in `attribute`, such as "body"."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.text)
        return _NAME.findall(found[1]) if found else []


class Computation(NamedTuple):
    ops: dict[str, Op]

    @property
    def root(self) -> Op:
        return next(op for op in self.ops.values() if op.root)

    def parameter(self, number: int) -> Op | None:
        return next((op for op in self.ops.values() if op.kind == "parameter" and op.operands == (str(number),)), None)


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    devices: int


class Run(NamedTuple):
    """A computation that runs, other than as part of a fusion."""

    name: str
    times: float
    path: str  # of the innermost loop around it


def parse(text: str) -> Module:
    """The module whose text is `text`."""
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := _HEADER.match(line):
                computations[header[2]] = Computation({})
                ops = computations[header[2]].ops
                entry = header[2] if header[1] else entry
        elif op := _op(line):
            ops[op.name] = op
    devices = math.prod(int(n) for n in re.findall(r"num_(?:partitions|replicas)=(\d+)", text.partition("\n")[0]))
    return Module(computations, entry, devices)


def _op(line: str) -> Op | None:
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, _, after = rest[end:].strip().partition("(")
    close = _closing("(" + after) - 1
    inside = after[:close]
    operands = (inside,) if kind in ("parameter", "constant") else tuple(_NAME.findall(inside))
    arrays = tuple(_array(*found) for found in _ARRAY.findall(rest[:end]))
    return Op(_NAME.findall(name)[0], kind, arrays, operands, after[close + 1 :], name.startswith("ROOT"))


def _array(dtype: str, shape: str, layout: str) -> Array:
    sizes = tuple(map(int, filter(None, shape.split(","))))
    space = re.search(r"S\((\d+)\)", layout)
    # "{1,0:T(8,128)}": dimensions from the fastest on, and the tile that the last of them are padded to.
    order, _, tiles = layout.strip("{}").partition(":")
    padded = [sizes[int(axis)] for axis in order.split(",") if axis] or list(sizes[::-1])
    if tile := re.match(r"T\(([\d,]+)\)", tiles):
        for place, size in enumerate(map(int, reversed(tile[1].split(",")))):
            padded[place : place + 1] = [-(-(padded[place] if place < len(padded) else 1) // size) * size]
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return Array(dtype, sizes, -(-bits * math.prod(padded) // 8), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    """Where the bracket closes with which `text` begins."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def runs(module: Module, scopes: Scopes) -> Iterator[Run]:
    """Every computation that runs, with how often; one that several operations call comes several times.

    Raises:
      ValueError: for a loop of which neither the text nor `scopes` says how often it runs.
    """

    def visit(run: Run) -> Iterator[Run]:
        yield run
        for op in module.computations[run.name].ops.values():
            if op.kind == "while":
                trips = _trips(module, run.name, op)
                path = op.path or run.path
                trips = scopes.runs(path) if trips is None else trips
                yield from visit(Run(op.called("body")[0], run.times * trips, path))
                yield from visit(Run(op.called("condition")[0], run.times * (trips + 1), path))
            elif op.kind in ("call", "async-start", "conditional"):
                attributes = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")
                for name in (name for attribute in attributes for name in op.called(attribute)):
                    yield from visit(run._replace(name=name))

    yield from visit(Run(module.entry, 1.0, ""))


def _trips(module: Module, where: str, loop: Op) -> float | None:
    """How often a loop runs that counts up by one to a constant; None for others."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return float(known[1])
    condition = module.computations[loop.called("condition")[0]]
    compare, arguments = condition.root, {}
    if compare.kind == "fusion":
        fused = module.computations[compare.called("calls")[0]]
        for number, operand in enumerate(compare.operands):
            if parameter := fused.parameter(number):
                arguments[parameter.name] = condition.ops[operand]
        compare, condition = fused.root, fused
    if compare.kind != "compare" or "direction=LT" not in compare.text:
        return None
    start = module.computations[where].ops[loop.operands[0]]

    def constant(name: str) -> float | None:
        """Of a constant, or of what the loop begins with."""
        op = arguments.get(name, condition.ops[name])
        if op.kind == "get-tuple-element" and start.kind == "tuple":
            index = re.search(r"index=(\d+)", op.text)
            op = module.computations[where].ops[start.operands[int(index[1])]] if index else op
        return float(op.operands[0]) if op.kind == "constant" else None

    # The counter changes, so only what it begins with is told by the tuple; the bound is the same throughout.
    counter, bound = map(constant, compare.operands)
    return None if bound is None else bound - (counter or 0.0)
