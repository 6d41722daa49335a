"""The embedded world: digit arithmetic whose methods must be known, not computed.

A problem names its type and shows three pairs of digits:

    problem   Prices at copper market: 3 4, 5 2, 8 6
    strategy  Problem type: copper market. Strategy: trading rules.
              Steps: (a) sum (b) larger (c) product              (on one line)
    solution  (a) sum 3 4 = 7 (b) larger 5 2 = 5 (c) product 8 6 = 8. \\boxed{758}

There are four families of 16 types. A family fixes which two methods compete at each of the three
stages; a hidden table, the same for every seed, says which of the two is right for each type. The
problem does not show it: without a strategy it has to be learnt type by type, with a strategy it
can be read off. Everything else (digit arithmetic) is easy for a very small model.

The two competing methods always give different digits, so an answer is right only if all three
methods were right, and each stage of a type is a fair coin to whoever does not know the table.
Sums and products are last digits; the first result is never 0, so an answer never starts with 0.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

METHODS: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: (a + b) % 10,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
    "product": lambda a, b: a * b % 10,
}
STAGES = ("(a)", "(b)", "(c)")
SPLITS = ("train", "eval")
MAX_COUNT = 1_000_000
_EVAL_SHARE = 1 / 8


@dataclass(frozen=True)
class Family:
    """Sixteen problem types with the same wording and the same pairs of competing methods."""

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


class _Draw(NamedTuple):
    """One problem: its family, its type within the family, three pairs of digits."""

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
    """A number in [0, 1) that depends on the text alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _right_methods() -> dict[tuple[str, str], tuple[str, ...]]:
    """The hidden table: in each family every one of the 8 combinations is right for two types."""
    table = {}
    for name, family in FAMILIES.items():
        for rank, kind in enumerate(sorted(family.types, key=lambda t: _hash(f"{t} {name}"))):
            bits = (rank >> 2 & 1, rank >> 1 & 1, rank & 1)
            table[name, kind] = tuple(pair[bit] for pair, bit in zip(family.stages, bits, strict=True))
    return table


RIGHT_METHODS = _right_methods()


def strategy_text(family: str, kind: str, methods: tuple[str, ...]) -> str:
    """The three-part strategy that names one method for each stage."""
    steps = " ".join(f"{s} {m}" for s, m in zip(STAGES, methods, strict=True))
    rules = FAMILIES[family].rules
    return f"Problem type: {kind} {family}. Strategy: {rules} rules. Steps: {steps}"


def solve(pairs: tuple[tuple[int, int], ...], methods: tuple[str, ...]) -> tuple[str, str]:
    """(answer, worked solution) of three pairs of digits by the given methods."""
    results = [METHODS[m](a, b) for m, (a, b) in zip(methods, pairs, strict=True)]
    answer = "".join(map(str, results))
    lines = (f"{s} {m} {a} {b} = {r}" for s, m, (a, b), r in zip(STAGES, methods, pairs, results, strict=True))
    return answer, f"{' '.join(lines)}. \\boxed{{{answer}}}"


def _pair_allowed(stage: int, methods: tuple[str, str], a: int, b: int) -> bool:
    results = {METHODS[m](a, b) for m in methods}
    return len(results) == 2 and not (stage == 0 and 0 in results)


_PAIRS = {
    name: [
        [(a, b) for a in range(10) for b in range(10) if _pair_allowed(stage, methods, a, b)]
        for stage, methods in enumerate(family.stages)
    ]
    for name, family in FAMILIES.items()
}


def _draws(count: int, rng: random.Random, split: str) -> list[_Draw]:
    """`count` different problems, the 64 types in turn, digits from the split's share."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"count is {count!r}; allowed: an integer from 1 to {MAX_COUNT}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    kinds = list(RIGHT_METHODS)
    draws: dict[_Draw, None] = {}
    while len(draws) < count:
        family, kind = kinds[len(draws) % len(kinds)]
        draw = _Draw(family, kind, tuple(rng.choice(pairs) for pairs in _PAIRS[family]))
        # The six digits alone decide the split, so an evaluation problem's digits were never
        # seen in training under any type.
        if (_hash(str(draw.pairs)) < _EVAL_SHARE) == (split == "eval"):
            draws[draw] = None
    return list(draws)


def problems(count: int, seed: int, split: str = "train") -> list[dict]:
    """Problems with the right strategy and the expert's solution by the right methods.

    Args:
        count: number of rows, all different; types take turns.
        seed: any integer. The hidden table does not depend on it.
        split: "train" or "eval"; their problems never coincide, whatever the seeds.

    Returns:
        Rows with id, problem, answer (three digits), strategy, solution and source (the family).

    Raises:
        ValueError: count or split outside what is allowed.
    """
    rows = []
    for draw in _draws(count, random.Random(f"problems/{split}/{seed}"), split):
        methods = RIGHT_METHODS[draw.family, draw.kind]
        answer, solution = solve(draw.pairs, methods)
        rows.append(
            {
                "id": draw.id,
                "problem": draw.text,
                "answer": answer,
                "strategy": strategy_text(draw.family, draw.kind, methods),
                "solution": solution,
                "source": draw.family,
            }
        )
    return rows


def pretraining(count: int, seed: int, preference: float = 0.6, guided_share: float = 0.5) -> list[dict]:
    """Rows that make a base model from scratch: able to calculate and to follow a strategy, with
    only a weak idea of which method is right.

    Args:
        count: number of rows, all different problems of the train split.
        seed: any integer.
        preference: probability, at each stage of a row without strategy, that the solution uses
            the right method (0.5 knows nothing; the whole answer is then right in preference^3).
        guided_share: probability that a row carries a strategy. That strategy is a random choice
            of one competing method per stage, and the solution follows it: the model learns to
            follow strategies, and learns nothing from them about types.

    Returns:
        Rows as `problems` gives them, `strategy` absent in the unguided ones; `answer` is what the
        row's own solution arrives at, which is often not the problem's true answer.

    Raises:
        ValueError: an argument outside what is allowed.
    """
    for name, value in (("preference", preference), ("guided_share", guided_share)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; allowed: a number from 0 to 1")
    rng = random.Random(f"pretraining/{seed}")
    rows = []
    for draw in _draws(count, rng, "train"):
        guided = rng.random() < guided_share
        right = RIGHT_METHODS[draw.family, draw.kind]
        methods = tuple(
            method if rng.random() < (0.5 if guided else preference) else other
            for method, other in (
                (m, pair[1 - pair.index(m)]) for m, pair in zip(right, FAMILIES[draw.family].stages, strict=True)
            )
        )
        answer, solution = solve(draw.pairs, methods)
        row = {
            "id": f"pretraining/{draw.id}",
            "problem": draw.text,
            "answer": answer,
            "solution": solution,
            "source": draw.family,
        }
        if guided:
            row["strategy"] = strategy_text(draw.family, draw.kind, methods)
        rows.append(row)
    return rows


# A token is a word, a digit or a mark together with the space before it; see `vocabulary`.
TOKEN_PATTERN = r"\n+| ?\\boxed\{| ?\([abc]\)| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]"


def vocabulary() -> list[str]:
    """Every token that the world's texts and their prompts (without instruction) consist of."""
    names = [f" {w}" for name, f in FAMILIES.items() for w in (name, f.rules, *f.types)]
    openings = [f.opening for f in FAMILIES.values()]
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
