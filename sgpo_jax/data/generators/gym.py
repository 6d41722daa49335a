"""Generates text problems with reasoning-gym, and adds a strategy and a short worked solution to each."""

import ast
import dataclasses
import hashlib
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from sgpo_jax.data.generators import logic

SPLITS = ("train", "eval")
_EVAL_SHARE = 1 / 8
_MAX_ROUNDS = 20


def _as_asked(item: dict) -> tuple[str, str]:
    return item["question"].strip(), item["answer"]


class Family(NamedTuple):
    """A family of reasoning-gym's problems, and how to solve them.

    strategy: the three-part strategy; it names the method, without numbers.
    solve: metadata of a problem -> (answer, worked solution without the box), or None if the problem has no exact
      answer.
    hints: metadata of a problem -> values for the {names} in the strategy.
    read: item -> (problem as a model sees it, answer for grading).
    limits: option -> (least, largest) value with which the generator terminates.
    """

    strategy: str
    solve: Callable[[dict], tuple[str, str] | None]
    hints: Callable[[dict], dict[str, str]] = lambda metadata: {}
    read: Callable[[dict], tuple[str, str]] = _as_asked
    limits: dict[str, tuple[int, int]] = {}


_OPERATORS: dict[type, tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", lambda a, b: a / b),
}


def _evaluate(node: ast.expr, steps: list[str]) -> Fraction:
    """Returns the exact value of an expression and appends its operations to `steps`, innermost first."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _evaluate(operand, steps)
            if not isinstance(operand, ast.Constant):
                steps.append(f"-({value}) = {-value}.")
            return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _evaluate(left, steps), _evaluate(right, steps)
            symbol, apply = _OPERATORS[type(op)]
            steps.append(f"{a} {symbol} {b} = {apply(a, b)}.")
            return apply(a, b)
    raise ValueError(f"expression {ast.unparse(node)!r}; allowed: integers with + - * /")


def _expression(metadata: dict) -> tuple[str, str] | None:
    steps: list[str] = []
    try:
        value = _evaluate(ast.parse(metadata["expression"].strip(), mode="eval").body, steps)
    except ZeroDivisionError:
        return None
    return str(value), " ".join(steps)


def _gcd(metadata: dict) -> tuple[str, str]:
    result, *others = metadata["numbers"]
    steps = []
    for other in others:
        a, b = max(result, other), min(result, other)
        while b:
            steps.append(f"{a} mod {b} = {a % b}.")
            a, b = b, a % b
        result = a
    return str(result), " ".join(steps)


def _legs(metadata: dict) -> tuple[str, str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, number in metadata["animals"].items():
        legs = number * ANIMALS[animal]
        steps.append(f"{animal}: {number} * {ANIMALS[animal]} = {legs}.")
        if len(steps) > 1:
            steps.append(f"{total} + {legs} = {total + legs}.")
        total += legs
    return str(total), " ".join(steps)


def _linear(node: ast.expr) -> tuple[int, int]:
    """Returns (a, b) of an expression a * variable + b."""
    match node:
        case ast.Name():
            return 1, 0
        case ast.Constant(value=int(number)):
            return 0, number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            a, b = _linear(operand)
            return -a, -b
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            (a, b), (c, d) = _linear(left), _linear(right)
            if not (a and c):
                return a * d + b * c, b * d
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            (a, b), (c, d) = _linear(left), _linear(right)
            sign = 1 if isinstance(op, ast.Add) else -1
            return a + sign * c, b + sign * d
    raise ValueError(f"equation side {ast.unparse(node)!r}; allowed: linear in one variable")


def _equation(metadata: dict) -> tuple[str, str] | None:
    left, right = metadata["equation"].split(" = ")
    name, value = metadata["variable"], int(right)
    a, b = _linear(ast.parse(left, mode="eval").body)
    if not a:
        return None
    term = {1: name, -1: f"-{name}"}.get(a, f"{a}*{name}")
    steps = []
    if b:
        sign = "-" if b > 0 else "+"
        steps.append(f"{term} = {value} {sign} {abs(b)} = {value - b}.")
    solution = Fraction(value - b, a)
    if a != 1:
        steps.append(f"{name} = {value - b} / {a} = {solution}.")
    elif not b:
        steps.append(f"{name} = {solution}.")
    return str(solution), " ".join(steps)


def _gsm(metadata: dict) -> tuple[str, str]:
    steps, _, answer = metadata["answer_cot"].rpartition("####")
    return answer.strip().removesuffix(".0"), steps.strip()


def _strategy(kind: str, principle: str, *steps: str) -> str:
    lettered = " ".join(f"({chr(ord('a') + i)}) {step}" for i, step in enumerate(steps))
    return f"Problem type: {kind}. Strategy: {principle}. Steps: {lettered}"


FAMILIES = {
    "chain_sum": Family(
        _strategy(
            "chain of additions and subtractions",
            "keep a running total from left to right",
            "combine the leading pair of numbers",
            "add or subtract the next number, as its sign says",
            "go on until the last number",
        ),
        _expression,
    ),
    "basic_arithmetic": Family(
        _strategy(
            "arithmetic expression with several operations",
            "order of operations",
            "work out the brackets, innermost first",
            "then products and quotients from left to right",
            "then sums and differences from left to right, minding the signs",
        ),
        _expression,
    ),
    "gcd": Family(
        _strategy(
            "greatest common divisor",
            "Euclid's algorithm",
            "divide the larger number by the smaller and take the remainder",
            "replace the pair by the smaller number and the remainder",
            "repeat until the remainder vanishes; the last divisor is the result",
        ),
        _gcd,
    ),
    "leg_counting": Family(
        _strategy(
            "total of equal groups",
            "multiply for each kind, then add up",
            "recall how many legs one animal of each kind has",
            "multiply it by the number of such animals",
            "keep a running total over the kinds",
        ),
        _legs,
    ),
    "simple_equations": Family(
        _strategy(
            "linear equation in one unknown",
            "isolate the unknown by inverse operations",
            "move the constant term to the other side with the opposite sign",
            "divide both sides by the coefficient of the unknown",
        ),
        _equation,
    ),
    "gsm_symbolic": Family(
        _strategy(
            "word problem with several quantities",
            "translate the story into a chain of small calculations",
            "list the given quantities and what is asked",
            "find each intermediate quantity from those already known, in the story's order",
            "combine them into the quantity asked for",
        ),
        _gsm,
    ),
    "knights_knaves": Family(
        _strategy(
            "truth-tellers and liars",
            "distinction of cases, beginning with {islander}",
            "suppose that {islander} is {knight}",
            "check what {islander} says, then what the others say",
            "where a statement contradicts its speaker, go on to the next case",
        ),
        logic.knights_knaves,
        logic.begin,
        logic.islanders,
        {"n_people": (2, 3), "depth_constraint": (2, 3), "width_constraint": (2, 3)},
    ),
    "binary_alternation": Family(
        _strategy(
            "fewest swaps to make a binary string alternate",
            "comparison with the alternating strings that have as many of each digit",
            "count both digits; where they differ too much it cannot be done",
            "write the alternating string that begins with the more frequent digit, or both where they are as frequent",
            "count the places that differ; a swap mends a pair of them",
            "take the smaller number of swaps",
        ),
        logic.binary_alternation,
    ),
}


def _hash(text: str) -> int:
    """Returns a number below 2^48 that depends only on the text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _dataset(family: str, size: int, seed: int, options: dict):
    """Returns reasoning-gym's data set of a family, after checking the options."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("reasoning_gym problems need the extra 'gym'") from error
    fields = {
        field.name: field.default
        for field in dataclasses.fields(DATASETS[family][1])
        if field.name != "size" and isinstance(field.default, (int, float, str))
    }
    for name, value in options.items():
        if name not in fields:
            raise ValueError(f"option {name!r} of {family}; allowed: {', '.join(sorted(fields))}")
        if type(value) is not type(fields[name]):
            kind = type(fields[name]).__name__
            raise ValueError(f"option {name} of {family} is {value!r}; allowed: {kind} values")
    for name, (low, high) in FAMILIES[family].limits.items():
        if not low <= options.get(name, low) <= high:
            raise ValueError(f"option {name} of {family} is {options[name]!r}; allowed: from {low} to {high}")
    try:
        return reasoning_gym.create_dataset(family, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"options {options} of {family}: {error}") from error


def problems(
    family: str, count: int, seed: int, split: str = "train", guided_share: float = 1.0, **options: object
) -> list[dict]:
    """Generates problems of one reasoning-gym family with strategy and worked solution.

    A generated problem is used only if the worked solution gives reasoning-gym's answer. This leaves out inexact
    divisions, which reasoning-gym rounds down, and equations without the unknown ("0 = 0"): under 1 % of
    basic_arithmetic and simple_equations, none of the other families.

    Args:
      family: one of FAMILIES.
      count: number of rows, all different problems.
      seed: any integer.
      split: "train" or "eval". A problem's text decides its split, so they share no problem, whatever the seeds.
      guided_share: probability that a row has its strategy. A warm-up on both kinds of rows teaches both prompts.
      options: options of the family, such as max_value.

    Returns:
      Rows with id, problem, answer, solution (ends in \\boxed{answer}), source and strategy.

    Raises:
      ValueError: an argument is not allowed, or the options give too few problems.
      ImportError: reasoning-gym is not installed.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; allowed: {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count is {count!r}; allowed: at least 1")
    if isinstance(guided_share, bool) or not isinstance(guided_share, (int, float)) or not 0 <= guided_share <= 1:
        raise ValueError(f"guided_share is {guided_share!r}; allowed: a number from 0 to 1")
    kind = FAMILIES[family]
    rows: dict[str, dict] = {}
    for attempt in range(_MAX_ROUNDS):
        # reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items.
        spread_seed = _hash(f"{seed}/{attempt}")
        for item in _dataset(family, max(2 * count, 100), spread_seed, options):
            text, gold = kind.read(item)
            if (_hash(text) < _EVAL_SHARE * 2**48) != (split == "eval") or text in rows:
                continue
            solved = kind.solve(item["metadata"])
            if solved is None or solved[0] != gold:
                continue
            answer, steps = solved
            rows[text] = {
                "id": f"{family}/{_hash(text):012x}",
                "problem": text,
                "answer": answer,
                "solution": f"{steps} \\boxed{{{answer}}}",
                "source": f"reasoning_gym/{family}",
            }
            if _hash(f"guided/{text}") < guided_share * 2**48:
                rows[text]["strategy"] = kind.strategy.format(**kind.hints(item["metadata"]))
            if len(rows) == count:
                return list(rows.values())
    raise ValueError(
        f"count is {count}, but {family} with options {options} gave only {len(rows)} different "
        f"problems for split {split!r}; ask for fewer, or for a wider range in the options"
    )
