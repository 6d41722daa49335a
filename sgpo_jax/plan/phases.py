"""Maps the operations of a program to phases, and its loops to trip counts, by the names in their name stacks."""

import re
from typing import NamedTuple


class Scopes(NamedTuple):
    """Facts about a program that its HLO does not contain.

    Each fact has a regular expression, which is searched for in the path of an operation. The first pattern that
    matches wins. A path is what XLA calls op_name, as in "jit(update)/autonomous/while/body/chunks/while".
    """

    rest: str  # phase of the operations that no pattern matches
    phases: tuple[tuple[str, str], ...] = ()  # (pattern, phase)
    trips: tuple[tuple[str, float], ...] = ()  # (pattern, trip count), for loops whose text does not state it
    reads: tuple[tuple[str, float], ...] = ()  # (pattern, bytes of HBM a call reads), for kernels that read in part
    entries: tuple[tuple[str, int], ...] = ()  # (pattern, n), for kernels that read one entry of each stack of n
    branches: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (pattern, share of each branch), for a `cond`

    def phase(self, path: str) -> str:
        """Returns the phase of the operation at `path`."""
        return next((phase for pattern, phase in self.phases if re.search(pattern, path)), self.rest)

    def trip_count(self, path: str) -> float:
        """Returns how often the body of the loop at `path` runs.

        Raises:
            ValueError: no pattern matches.
        """
        for pattern, trips in self.trips:
            if re.search(pattern, path):
                return trips
        raise ValueError(f"loop {path}: neither the program nor Scopes.trips says how often it runs")

    def read_bytes(self, path: str) -> float | None:
        """Returns the bytes that a call of the kernel at `path` reads; None where no pattern matches."""
        return next((size for pattern, size in self.reads if re.search(pattern, path)), None)

    def stacked(self, path: str) -> int:
        """Returns the length of the stacks of which the kernel at `path` reads one entry each; 0 if it reads all."""
        return next((count for pattern, count in self.entries if re.search(pattern, path)), 0)

    def branch_shares(self, path: str) -> tuple[float, ...] | None:
        """Returns how often each branch of the `cond` at `path` runs when it runs once; None where none matches."""
        return next((shares for pattern, shares in self.branches if re.search(pattern, path)), None)
