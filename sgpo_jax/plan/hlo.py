"""Parses the HLO text of a compiled program, and finds how often each of its computations runs.

The text is the optimised, scheduled module that `compiled.as_text()` returns. Its shapes are those of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from sgpo_jax.plan.phases import Scopes

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """One array of an operation's result."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int  # with the padding of its layout
    space: int  # memory space: 0 is HBM, others are on the core


class Op(NamedTuple):
    """One operation."""

    name: str
    kind: str  # such as "fusion"
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]  # names; of a parameter its number, of a constant its value
    attributes: str  # the text after the operands
    root: bool  # its result is that of the computation

    @property
    def path(self) -> str:
        """The operation's place in the traced program; "" where the text does not say."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute, such as "body"."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(match[1]) if match else []


class Computation(NamedTuple):
    """A sequence of operations, as in the body of a loop or of a fusion."""

    ops: dict[str, Op]  # by name

    @property
    def root(self) -> Op:
        """The operation whose result is that of the computation."""
        return next(op for op in self.ops.values() if op.root)

    def parameter(self, number: int) -> Op | None:
        """Returns a parameter by its number, or None where the computation does not have it."""
        return next((op for op in self.ops.values() if op.kind == "parameter" and op.operands == (str(number),)), None)


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]  # by name
    entry: str  # name of the computation that the program begins with
    devices: int  # partitions times replicas


class Execution(NamedTuple):
    """A computation that runs by itself, not as part of a fusion."""

    name: str
    times: float
    path: str  # of the innermost loop around it


def parse(text: str) -> Module:
    """Parses the text of a module."""
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
    """Parses the line of an operation; returns None for any other line."""
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, _, after = rest[end:].strip().partition("(")
    close = _closing("(" + after) - 1
    inside = after[:close]
    operands = (inside,) if kind in ("parameter", "constant") else tuple(_NAME.findall(inside))
    arrays = tuple(_array(*parts) for parts in _ARRAY.findall(rest[:end]))
    return Op(_NAME.findall(name)[0], kind, arrays, operands, after[close + 1 :], name.startswith("ROOT"))


def _array(dtype: str, shape: str, layout: str) -> Array:
    """Parses an array such as f32[2,3]{1,0:T(8,128)S(1)}, which is given in three parts."""
    sizes = tuple(map(int, filter(None, shape.split(","))))
    space = re.search(r"S\((\d+)\)", layout)
    # "{1,0:T(8,128)}" has the dimensions, fastest first, and the tile that the fastest ones are padded to.
    order, _, tiles = layout.strip("{}").partition(":")
    padded = [sizes[int(axis)] for axis in order.split(",") if axis] or list(sizes[::-1])
    if tile := re.match(r"T\(([\d,]+)\)", tiles):
        for place, size in enumerate(map(int, reversed(tile[1].split(",")))):
            padded[place : place + 1] = [-(-(padded[place] if place < len(padded) else 1) // size) * size]
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return Array(dtype, sizes, -(-bits * math.prod(padded) // 8), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    """Returns the position at which the bracket that opens `text` closes."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def executions(module: Module, scopes: Scopes) -> Iterator[Execution]:
    """Yields every computation that runs. One that several operations call is yielded for each of them.

    Raises:
        ValueError: neither the text nor `scopes` says how often a loop runs.
    """

    def visit(execution: Execution) -> Iterator[Execution]:
        yield execution
        for op in module.computations[execution.name].ops.values():
            if op.kind == "while":
                trips = _trip_count(module, execution.name, op)
                path = op.path or execution.path
                trips = scopes.trip_count(path) if trips is None else trips
                yield from visit(Execution(op.called("body")[0], execution.times * trips, path))
                yield from visit(Execution(op.called("condition")[0], execution.times * (trips + 1), path))
            elif op.kind in ("call", "async-start", "conditional"):
                attributes = ("to_apply", "calls", "branch_computations", "false_computation", "true_computation")
                names = [name for attribute in attributes for name in op.called(attribute)]
                shares = scopes.branch_shares(op.path or execution.path) if op.kind == "conditional" else None
                for name, share in zip(names, shares or [1.0] * len(names), strict=True):
                    yield from visit(execution._replace(name=name, times=execution.times * share))

    yield from visit(Execution(module.entry, 1.0, ""))


def _trip_count(module: Module, caller: str, loop: Op) -> float | None:
    """Returns how often a loop runs that counts up by one to a constant; None for other loops.

    Args:
        module: the program.
        caller: name of the computation that the loop stands in.
        loop: a "while".
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return float(known[1])
    condition = module.computations[loop.called("condition")[0]]
    compare, arguments = condition.root, {}
    if compare.kind == "fusion":
        fused = module.computations[compare.called("calls")[0]]
        for number, operand in enumerate(compare.operands):
            if parameter := fused.parameter(number):
                arguments[parameter.name] = condition.ops[operand]
        compare, condition = fused.root, fused
    if compare.kind != "compare" or "direction=LT" not in compare.attributes:
        return None
    start = module.computations[caller].ops[loop.operands[0]]

    def constant(name: str) -> float | None:
        """Returns the value of a constant, or of an element of the tuple that the loop starts with."""
        op = arguments.get(name, condition.ops[name])
        if op.kind == "get-tuple-element" and start.kind == "tuple":
            index = re.search(r"index=(\d+)", op.attributes)
            op = module.computations[caller].ops[start.operands[int(index[1])]] if index else op
        return float(op.operands[0]) if op.kind == "constant" else None

    # The start tuple holds only the first value of the counter, which changes. The bound stays the same.
    counter, bound = map(constant, compare.operands)
    return None if bound is None else bound - (counter or 0.0)
