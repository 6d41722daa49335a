"""Generates the embedded world: digit arithmetic whose methods must be known, not computed.

A problem names its type and shows three pairs of digits:

    problem   Prices at copper market: 3 4, 5 2, 8 6
    strategy  Problem type: copper market. Strategy: trading rules.
              Steps: (a) sum (b) larger (c) product              (on one line)
    solution  (a) sum 3 4 = 7 (b) larger 5 2 = 5 (c) product 8 6 = 8. \\boxed{758}

There are four families of 16 types. A family determines which two methods compete at each of the three stages. A hidden
table, the same for every seed, says which of the two is right for each type. The problem does not show it: without a
strategy it has to be learnt for each type, with a strategy it can be read. The rest is digit arithmetic, which is easy
for a very small model.

The competing methods always give different digits, so an answer is right only if all three methods are right. Without
the table, each stage is a guess between two methods. Sums and products are cut to their last digit. The first result is
never 0, so an answer never starts with 0.

Options vary the world: one to four families, up to four methods that compete at a stage, chains of one to three
stages, strategies that sometimes name a wrong method, types that the base model knows already, and the words of the
solutions (`wording`).
"""

import functools
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sgpo_jax.data.generators.wording import WORDINGS, Line, worded

METHODS: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: (a + b) % 10,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
    "product": lambda a, b: a * b % 10,
}
STAGES = ("(a)", "(b)", "(c)")
SPLITS = ("train", "eval")
MOST_COMPETING = 4
MAX_COUNT = 1_000_000
KNOWN = 0.95  # probability, at each stage, that the base model uses the right method for a type that it knows
_EVAL_SHARE = 1 / 8


@dataclass(frozen=True)
class Family:
    """A family of sixteen problem types with the same wording and the same pairs of competing methods."""

    opening: str
    rules: str
    stages: tuple[tuple[str, str], tuple[str, str], tuple[str, str]]
    types: tuple[str, ...]


FAMILIES = {
    "market": Family(
        "Prices at",
        "trading",
        (("sum", "difference"), ("larger", "smaller"), ("sum", "product")),
        tuple(
            "copper silver amber silk cotton pepper salt tea coffee honey wool paper glass ivory timber grain".split()
        ),
    ),
    "garden": Family(
        "Beds in",
        "planting",
        (("larger", "sum"), ("difference", "product"), ("smaller", "sum")),
        tuple(
            "tulip rose lily daisy fern moss ivy clover poppy violet orchid lotus maple cedar willow thistle".split()
        ),
    ),
    "harbor": Family(
        "Crews in",
        "docking",
        (("product", "larger"), ("sum", "smaller"), ("difference", "larger")),
        tuple(
            "northern southern eastern western misty stormy quiet frozen "
            "sunny windy rocky sandy deep narrow hidden busy".split()
        ),
    ),
    "workshop": Family(
        "Parts in",
        "building",
        (("smaller", "product"), ("difference", "sum"), ("product", "larger")),
        tuple(
            "wagon clock violin saddle lantern barrel basket mirror "
            "candle hammer kettle ladder anchor pottery carpet armor".split()
        ),
    ),
}


def _check_whole(**fields: tuple[int, int, int]) -> None:
    for name, (value, low, high) in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; allowed: an integer from {low} to {high}")


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; allowed: a number from 0 to 1")


@dataclass(frozen=True)
class World:
    """A world: how many families and competing methods it has, how long chains are, and how solutions are worded.

    Attributes:
      competing: methods that compete at each stage, 2 to 4.
      stages: length of the chain, 1 to 3.
      wording: of the solutions; a name in `wording.WORDINGS`.
      families: the first ones of `FAMILIES`, each with 16 types.

    Raises:
      ValueError: an attribute is not allowed.
    """

    competing: int = 2
    stages: int = 3
    wording: str = "plain"
    families: int = len(FAMILIES)

    def __post_init__(self):
        _check_whole(competing=(self.competing, 2, MOST_COMPETING), stages=(self.stages, 1, len(STAGES)))
        _check_whole(families=(self.families, 1, len(FAMILIES)))
        if self.wording not in WORDINGS:
            raise ValueError(f"wording is {self.wording!r}; allowed: {', '.join(WORDINGS)}")


class _Draw(NamedTuple):
    """A problem: its family, its type within the family, and up to three pairs of digits."""

    family: str
    kind: str
    pairs: tuple[tuple[int, int], ...]

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.family}/" + "".join(f"{a}{b}" for a, b in self.pairs)

    @property
    def text(self) -> str:
        digits = ", ".join(f"{a} {b}" for a, b in self.pairs)
        return f"{FAMILIES[self.family].opening} {self.kind} {self.family}: {digits}"


def _hash(text: str) -> float:
    """Returns a number in [0, 1) that depends only on the text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def choices(family: str, competing: int = 2) -> tuple[tuple[str, ...], ...]:
    """Returns the methods that compete at each stage of a family: its two, then others up to `competing`."""
    pairs = FAMILIES[family].stages
    return tuple((*pair, *(method for method in METHODS if method not in pair))[:competing] for pair in pairs)


@functools.cache
def right_methods(competing: int = 2) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns the hidden table: {(family, type): the right method of each stage}.

    With two competing methods, each of a family's 8 combinations is right for two types. With more, a hash decides.
    """
    table = {}
    for name, family in FAMILIES.items():
        for rank, kind in enumerate(sorted(family.types, key=lambda t: _hash(f"{t} {name}"))):
            numbers = [rank >> 2 & 1, rank >> 1 & 1, rank & 1]
            if competing > 2:
                numbers = [int(_hash(f"{kind} {name} {stage}") * competing) for stage in STAGES]
            table[name, kind] = tuple(methods[i] for methods, i in zip(choices(name, competing), numbers, strict=True))
    return table


def strategy_text(family: str, kind: str, methods: tuple[str, ...]) -> str:
    """Returns the three-part strategy that names one method for each stage."""
    steps = " ".join(f"{stage} {method}" for stage, method in zip(STAGES, methods, strict=False))
    rules = FAMILIES[family].rules
    return f"Problem type: {kind} {family}. Strategy: {rules} rules. Steps: {steps}"


def solve(pairs: tuple[tuple[int, int], ...], methods: tuple[str, ...], line: Line) -> tuple[str, str]:
    """Returns (answer, worked solution) of up to three pairs of digits with one method for each."""
    results = [METHODS[method](a, b) for method, (a, b) in zip(methods, pairs, strict=True)]
    answer = "".join(map(str, results))
    return answer, f"{worded(line, STAGES, methods, pairs, results)}. \\boxed{{{answer}}}"


def _pair_allowed(stage: int, methods: tuple[str, ...], a: int, b: int) -> bool:
    """Returns True if all methods give different digits, none of them 0 at the first stage."""
    results = {METHODS[method](a, b) for method in methods}
    return len(results) == len(methods) and not (stage == 0 and 0 in results)


@functools.cache
def _pairs(competing: int) -> dict[str, list[list[tuple[int, int]]]]:
    """Returns {family: the pairs of digits that each stage may show}."""
    return {
        name: [
            [(a, b) for a in range(10) for b in range(10) if _pair_allowed(stage, methods, a, b)]
            for stage, methods in enumerate(choices(name, competing))
        ]
        for name in FAMILIES
    }


def _draws(count: int, rng: random.Random, split: str, world: World) -> list[_Draw]:
    """Returns `count` different problems of a split, the world's types in turn."""
    _check_whole(count=(count, 1, MAX_COUNT))
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    competing, stages = world.competing, world.stages
    families = list(FAMILIES)[: world.families]
    kinds = [kind for kind in right_methods() if kind[0] in families]
    pairs = {name: _pairs(competing)[name] for name in families}
    share = _EVAL_SHARE if split == "eval" else 1 - _EVAL_SHARE
    # At most a quarter of the smallest family's problems, so that drawing different ones ends soon.
    least = min(math.prod(map(len, by_stage[:stages])) for by_stage in pairs.values())
    most = int(share * least * len(kinds) / 4)
    if count > most:
        size = f"competing={competing}, stages={stages} and families={world.families}"
        raise ValueError(f"count is {count}; allowed: at most {most} with {size}")
    draws: dict[_Draw, None] = {}
    while len(draws) < count:
        family, kind = kinds[len(draws) % len(kinds)]
        draw = _Draw(family, kind, tuple(rng.choice(allowed) for allowed in pairs[family][:stages]))
        # Only the digits decide the split, so no type shows an evaluation problem's digits in training.
        if (_hash(str(draw.pairs)) < _EVAL_SHARE) == (split == "eval"):
            draws[draw] = None
    return list(draws)


def problems(
    count: int, seed: int, split: str = "train", world: World = World(), noise: float = 0.0
) -> list[dict]:
    """Generates problems with the right strategy and the expert's solution.

    Args:
      count: number of rows, all different; types take turns.
      seed: any integer. The hidden table does not depend on it.
      split: "train" or "eval"; they share no problem, whatever the seeds.
      world: the world.
      noise: probability, at each stage, that the strategy names a wrong method.

    Returns:
      Rows with id, problem, answer (one digit per stage), strategy, solution and source (the family).

    Raises:
      ValueError: an argument is not allowed.
    """
    _check_shares(noise=noise)
    line = WORDINGS[world.wording].expert
    wrong = random.Random(f"noise/{split}/{seed}")
    rows = []
    for draw in _draws(count, random.Random(f"problems/{split}/{seed}"), split, world):
        methods = right_methods(world.competing)[draw.family, draw.kind][: world.stages]
        answer, solution = solve(draw.pairs, methods, line)
        named = _sampled(wrong, methods, choices(draw.family, world.competing), 1 - noise)
        rows.append(
            {
                "id": draw.id,
                "problem": draw.text,
                "answer": answer,
                "strategy": strategy_text(draw.family, draw.kind, named),
                "solution": solution,
                "source": draw.family,
            }
        )
    return rows


def pretraining(
    count: int,
    seed: int,
    world: World = World(),
    preference: float = 0.6,
    guided_share: float = 0.5,
    writing: float = 0.0,
    known: float = 0.0,
) -> list[dict]:
    """Generates rows that train a base model from scratch.

    It learns to calculate and to follow a strategy, but only a weak preference for the right methods.

    Args:
      count: number of rows, all different problems of the train split.
      seed: any integer.
      world: the world.
      preference: probability, at each stage of a row without strategy, that the solution uses the right method. With
        1 / competing it knows nothing. The whole answer is right with probability preference^stages.
      guided_share: probability that a row has a strategy. It names a random competing method at each stage, and the
        solution follows it. So the model learns to follow strategies, but nothing about types from them.
      writing: probability that a row, guided or not, is replaced by one that teaches to write strategies. Its problem
        shows a problem and a solution by random methods, as `prompts.own_strategy` does. Its solution is the strategy
        that names these methods. The other rows do not change.
      known: probability that the base model knows a type already; then `preference` is `KNOWN` for it.

    Returns:
      Rows as from `problems`, without `strategy` in the unguided ones. `answer` is the result of the row's solution,
      which is often not the problem's true answer.

    Raises:
      ValueError: an argument is not allowed.
    """
    _check_shares(preference=preference, guided_share=guided_share, writing=writing, known=known)
    competing, words = world.competing, WORDINGS[world.wording]
    rng, writers, writer = (random.Random(f"{use}/{seed}") for use in ("pretraining", "writing", "wording"))
    rows = []
    for draw in _draws(count, rng, "train", world):
        guided = rng.random() < guided_share
        right = right_methods(competing)[draw.family, draw.kind][: world.stages]
        liking = KNOWN if is_known(draw.family, draw.kind, known) else preference
        methods = _sampled(rng, right, choices(draw.family, competing), 1 / competing if guided else liking)
        answer, solution = solve(draw.pairs, methods, words.draw(writer, guided))
        row = {
            "id": f"pretraining/{draw.id}",
            "problem": draw.text,
            "answer": answer,
            "solution": words.opening * guided + solution,
            "source": draw.family,
        }
        if guided:
            row["strategy"] = strategy_text(draw.family, draw.kind, methods)
        rows.append(_writing_row(row, draw, competing, writers) if writers.random() < writing else row)
    return rows


def is_known(family: str, kind: str, share: float) -> bool:
    """Returns True if a type is among this share of types, which a base model knows; a hash decides."""
    return _hash(f"known {kind} {family}") < share


def _writing_row(row: dict, draw: _Draw, competing: int, rng: random.Random) -> dict:
    """Returns a row that shows a problem and a solution by random methods, and whose solution is their strategy."""
    methods = tuple(rng.choice(options) for options in choices(draw.family, competing)[: len(draw.pairs)])
    answer, solution = solve(draw.pairs, methods, WORDINGS["plain"].expert)
    return {
        "id": row["id"],
        "problem": f"{draw.text}\n\n{solution}\n\nStrategy:",
        "answer": answer,
        "solution": strategy_text(draw.family, draw.kind, methods),
        "source": row["source"],
    }


def _sampled(
    rng: random.Random, right: tuple[str, ...], competing: tuple[tuple[str, ...], ...], share: float
) -> tuple[str, ...]:
    """Samples a method for each stage: the right one with probability `share`, else another competing one."""
    methods = []
    for method, options in zip(right, competing, strict=False):
        others = [option for option in options if option != method]
        methods.append(method if rng.random() < share else others[0] if len(others) == 1 else rng.choice(others))
    return tuple(methods)


# A token is a word, a digit or a mark, with the space before it; see `vocabulary`.
TOKEN_PATTERN = r"\n+| ?\\boxed\{| ?\([abc]\)| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]"


def vocabulary() -> list[str]:
    """Returns every token of the world's texts and their prompts (without instruction)."""
    names = [f" {word}" for name, family in FAMILIES.items() for word in (name, family.rules, *family.types)]
    openings = [family.opening for family in FAMILIES.values()]
    starts, seconds = zip(*(opening.split() for opening in openings), strict=True)
    digits = [str(d) for d in range(10)]
    return list(
        dict.fromkeys(
            [
                *(digits + [f" {d}" for d in digits]),
                *("\n", "\n\n", ":", ",", ".", " =", " \\boxed{", "}"),
                *("Problem", "Strategy", " Strategy", " Steps", " type", " rules"),
                *(STAGES[:1] + tuple(f" {s}" for s in STAGES)),
                *(f" {m}" for m in METHODS),
                *starts,
                *(f" {w}" for w in seconds),
                *names,
            ]
        )
    )
