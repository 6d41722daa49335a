"""Wordings of the embedded world's solutions: in each, another part of a method has something to do.

    plain     (a) sum 3 4 = 7               a decision is one word
    spread    (a) join both , add 3 4 = 7   a decision is spread over several words
    ways      one of three forms            several right solutions, of which the student prefers one
    mention   As the strategy says , (a)    a guided solution has words that an unguided one never has
    foreign   (a) plus 3 4 = 7              the expert's words are not those of the student
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Line = Callable[[str, str, int, int, int], str]  # (stage, method, two digits, result) -> text of the stage

# Each word rules out a part of the methods that the words before it have left.
_SPREAD = {
    "sum": "join both , add", "product": "join both , multiply", "difference": "join one , subtract",
    "larger": "keep one , above", "smaller": "keep one , below",
}  # fmt: skip
_FOREIGN = {"sum": "plus", "difference": "minus", "larger": "max", "smaller": "min", "product": "times"}
_SHARES = (0.8, 0.1, 0.1)  # of the forms in solutions without strategy, for the wording "ways"; with one, all are equal
MENTION = "As the strategy says , "


def _plain(stage: str, method: str, a: int, b: int, result: int) -> str:
    return f"{stage} {method} {a} {b} = {result}"


@dataclass(frozen=True)
class Wording:
    """A way to word solutions.

    Attributes:
      forms: forms of a stage; a solution has the same one throughout.
      expert: form of the expert's solutions.
      opening: what a solution begins with that follows a strategy.
    """

    forms: tuple[Line, ...] = (_plain,)
    expert: Line = _plain
    opening: str = ""

    def draw(self, rng: random.Random, guided: bool) -> Line:
        """Draws the form of a student's solution."""
        if len(self.forms) == 1:
            return self.forms[0]
        return rng.choices(self.forms, None if guided else _SHARES)[0]


def _renamed(names: dict[str, str]) -> Line:
    return lambda stage, method, a, b, result: _plain(stage, names[method], a, b, result)


_WAYS: tuple[Line, ...] = (
    _plain,
    lambda stage, method, a, b, result: f"{stage} with {a} {b} : {method} = {result}",
    lambda stage, method, a, b, result: f"{stage} from {a} {b} the {method} is {result}",
)
WORDINGS = {
    "plain": Wording(),
    "spread": Wording((_renamed(_SPREAD),), _renamed(_SPREAD)),
    "ways": Wording(_WAYS),
    "mention": Wording(opening=MENTION),
    "foreign": Wording(expert=_renamed(_FOREIGN)),
}


def worded(
    line: Line, stages: Sequence[str], methods: Sequence[str], pairs: Sequence[tuple[int, int]], results: Sequence[int]
) -> str:
    """Returns the worked solution, up to its box."""
    steps = zip(stages, methods, pairs, results, strict=False)
    return " ".join(line(stage, method, a, b, result) for stage, method, (a, b), result in steps)
