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

The competing methods always give different digits, so an answer is right only if all three
methods were right, and each stage of a type is a fair coin to whoever does not know the table.
Sums and products are last digits; the first result is never 0, so an answer never starts with 0.

Three knobs vary the world: up to four methods that compete at a stage, chains of one to three
stages, and strategies that name a wrong method now and then.
"""

import functools
import hashlib
import math
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
MOST_COMPETING = 4
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


def choices(family: str, competing: int = 2) -> tuple[tuple[str, ...], ...]:
    """The methods that compete at each stage: the family's two, then others."""
    pairs = FAMILIES[family].stages
    return tuple((*pair, *(m for m in METHODS if m not in pair))[:competing] for pair in pairs)


@functools.cache
def right_methods(competing: int = 2) -> dict[tuple[str, str], tuple[str, ...]]:
    """The hidden table: family and type -> the right method of each stage.

    Of two methods, every one of the 8 combinations of a family is right for two types; of more, a hash decides.
    """
    table = {}
    for name, family in FAMILIES.items():
        for rank, kind in enumerate(sorted(family.types, key=lambda t: _hash(f"{t} {name}"))):
            numbers = [rank >> 2 & 1, rank >> 1 & 1, rank & 1]
            if competing > 2:
                numbers = [int(_hash(f"{kind} {name} {stage}") * competing) for stage in STAGES]
            table[name, kind] = tuple(among[i] for among, i in zip(choices(name, competing), numbers, strict=True))
    return table


def strategy_text(family: str, kind: str, methods: tuple[str, ...]) -> str:
    """The three-part strategy that names one method for each stage."""
    steps = " ".join(f"{s} {m}" for s, m in zip(STAGES, methods, strict=False))
    rules = FAMILIES[family].rules
    return f"Problem type: {kind} {family}. Strategy: {rules} rules. Steps: {steps}"


def solve(pairs: tuple[tuple[int, int], ...], methods: tuple[str, ...]) -> tuple[str, str]:
    """(answer, worked solution) of up to three pairs of digits by the given methods."""
    results = [METHODS[m](a, b) for m, (a, b) in zip(methods, pairs, strict=True)]
    answer = "".join(map(str, results))
    lines = (f"{s} {m} {a} {b} = {r}" for s, m, (a, b), r in zip(STAGES, methods, pairs, results, strict=False))
    return answer, f"{' '.join(lines)}. \\boxed{{{answer}}}"


def _pair_allowed(stage: int, methods: tuple[str, ...], a: int, b: int) -> bool:
    results = {METHODS[m](a, b) for m in methods}
    return len(results) == len(methods) and not (stage == 0 and 0 in results)


@functools.cache
def _pairs(competing: int) -> dict[str, list[list[tuple[int, int]]]]:
    """family -> the pairs of digits that a stage may show."""
    return {
        name: [
            [(a, b) for a in range(10) for b in range(10) if _pair_allowed(stage, methods, a, b)]
            for stage, methods in enumerate(choices(name, competing))
        ]
        for name in FAMILIES
    }


def _draws(count: int, rng: random.Random, split: str, competing: int, stages: int) -> list[_Draw]:
    """`count` different problems, the 64 types in turn, digits from the split's share."""
    _check_whole(count=(count, 1, MAX_COUNT), competing=(competing, 2, MOST_COMPETING), stages=(stages, 1, len(STAGES)))
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    pairs = _pairs(competing)
    share = _EVAL_SHARE if split == "eval" else 1 - _EVAL_SHARE
    # A quarter of what the smallest family has, so that drawing different ones ends, and soon.
    least = min(math.prod(map(len, each[:stages])) for each in pairs.values())
    most = int(share * least * len(right_methods()) / 4)
    if count > most:
        raise ValueError(f"count is {count}; allowed: at most {most} with competing={competing} and stages={stages}")
    kinds = list(right_methods())
    draws: dict[_Draw, None] = {}
    while len(draws) < count:
        family, kind = kinds[len(draws) % len(kinds)]
        draw = _Draw(family, kind, tuple(rng.choice(allowed) for allowed in pairs[family][:stages]))
        # The six digits alone decide the split, so an evaluation problem's digits were never
        # seen in training under any type.
        if (_hash(str(draw.pairs)) < _EVAL_SHARE) == (split == "eval"):
            draws[draw] = None
    return list(draws)


def problems(
    count: int, seed: int, split: str = "train", competing: int = 2, stages: int = 3, noise: float = 0.0
) -> list[dict]:
    """Problems with the right strategy and the expert's solution by the right methods.

    Args:
        count: number of rows, all different; types take turns.
        seed: any integer. The hidden table does not depend on it.
        split: "train" or "eval"; their problems never coincide, whatever the seeds.
        competing: methods that compete at each stage, 2 to 4.
        stages: length of the chain, 1 to 3.
        noise: probability, at each stage, that the strategy names another method than the right one.

    Returns:
        Rows with id, problem, answer (three digits), strategy, solution and source (the family).

    Raises:
        ValueError: count or split outside what is allowed.
    """
    _check_shares(noise=noise)
    wrong = random.Random(f"noise/{split}/{seed}")
    rows = []
    for draw in _draws(count, random.Random(f"problems/{split}/{seed}"), split, competing, stages):
        methods = right_methods(competing)[draw.family, draw.kind][:stages]
        answer, solution = solve(draw.pairs, methods)
        named = _drawn(wrong, methods, choices(draw.family, competing), 1 - noise)
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
    preference: float = 0.6,
    guided_share: float = 0.5,
    competing: int = 2,
    stages: int = 3,
    writing: float = 0.0,
) -> list[dict]:
    """Rows that make a base model from scratch: able to calculate and to follow a strategy, with
    only a weak idea of which method is right.

    Args:
        count: number of rows, all different problems of the train split.
        seed: any integer.
        preference: probability, at each stage of a row without strategy, that the solution uses
            the right method (1 / competing knows nothing); the whole answer is then right in
            preference^stages.
        guided_share: probability that a row carries a strategy. That strategy is a random choice
            of one competing method per stage, and the solution follows it: the model learns to
            follow strategies, and learns nothing from them about types.
        competing, stages: as in `problems`.
        writing: probability that a row, guided or not, becomes one that teaches to write strategies: its
            problem shows a problem with a solution by random methods, as `prompts.own_strategy` does,
            and its solution is the strategy that names them. The other rows stay as they are without.

    Returns:
        Rows as `problems` gives them, `strategy` absent in the unguided ones; `answer` is what the
        row's own solution arrives at, which is often not the problem's true answer.

    Raises:
        ValueError: an argument outside what is allowed.
    """
    _check_shares(preference=preference, guided_share=guided_share, writing=writing)
    rng, writers = random.Random(f"pretraining/{seed}"), random.Random(f"writing/{seed}")
    rows = []
    for draw in _draws(count, rng, "train", competing, stages):
        guided = rng.random() < guided_share
        right = right_methods(competing)[draw.family, draw.kind][:stages]
        methods = _drawn(rng, right, choices(draw.family, competing), 1 / competing if guided else preference)
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
        rows.append(_writing_row(row, draw, competing, writers) if writers.random() < writing else row)
    return rows


def _writing_row(row: dict, draw: _Draw, competing: int, rng: random.Random) -> dict:
    """The row with a problem and a solution by random methods as its problem, their strategy as its solution."""
    methods = tuple(rng.choice(among) for among in choices(draw.family, competing)[: len(draw.pairs)])
    answer, solution = solve(draw.pairs, methods)
    return {
        "id": row["id"],
        "problem": f"{draw.text}\n\n{solution}\n\nStrategy:",
        "answer": answer,
        "solution": strategy_text(draw.family, draw.kind, methods),
        "source": row["source"],
    }


def _check_whole(**fields: tuple[int, int, int]) -> None:
    for name, (value, low, high) in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; allowed: an integer from {low} to {high}")


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; allowed: a number from 0 to 1")


def _drawn(
    rng: random.Random, right: tuple[str, ...], among: tuple[tuple[str, ...], ...], share: float
) -> tuple[str, ...]:
    """At each stage the right method with probability `share`, else another of the competing ones."""
    drawn = []
    for method, competing in zip(right, among, strict=False):
        others = [m for m in competing if m != method]
        drawn.append(method if rng.random() < share else others[0] if len(others) == 1 else rng.choice(others))
    return tuple(drawn)


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
