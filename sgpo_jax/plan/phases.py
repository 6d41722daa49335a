"""Which phase of a program an operation belongs to, and how often a loop runs, by the names in its name stack."""

import re
from typing import NamedTuple


class Scopes(NamedTuple):
    """What is known of a program beside its text. Patterns are searched in a path; the first that is found counts.

    A path is what XLA calls op_name, as in "jit(update)/autonomous/while/body/chunks/while".
    """

    rest: str  # phase of whatever no pattern names
    phases: tuple[tuple[str, str], ...] = ()  # (pattern, phase)
    trips: tuple[tuple[str, float], ...] = ()  # (pattern, how often such a loop runs), of loops whose text does not say
    reads: tuple[tuple[str, float], ...] = ()  # (pattern, bytes of HBM one run reads), of kernels that read in part

    def phase(self, path: str) -> str:
        return next((phase for pattern, phase in self.phases if re.search(pattern, path)), self.rest)

    def runs(self, path: str) -> float:
        """How often the loop at `path` runs.

        Raises:
          ValueError: no pattern names it.
        """
        for pattern, trips in self.trips:
            if re.search(pattern, path):
                return trips
        raise ValueError(f"loop {path}: its text does not say how often it runs, and no pattern of Scopes.trips does")

    def read(self, path: str) -> float | None:
        return next((size for pattern, size in self.reads if re.search(pattern, path)), None)
