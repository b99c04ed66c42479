"""How many bytes a second a rule may take: a step is taken whole, or it is left out. Pure."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 1.0
"""What was not used is kept for so long: a quiet second may be followed by a busy one, and no more than that."""


class Budget:
    """A bound on bytes over time. What a step takes may overdraw it once; then nothing is taken until it is paid for.

    So in any time T at most rate x (T + BURST_S) and one step are taken, and never a part of a step, which would
    favour the requests that come first in it.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._balance = bytes_per_s * BURST_S
        self._t_ns: int | None = None

    def is_open(self, t_ns: int) -> bool:
        """Return whether a step that begins at `t_ns` may be taken. Times do not fall."""
        if self._t_ns is not None:
            self._balance += self._rate * max(0, t_ns - self._t_ns) / 1e9
        self._t_ns = t_ns
        self._balance = min(self._balance, self._rate * BURST_S)
        return self._balance > 0

    def spend(self, num_bytes: int) -> None:
        """Take a step of so many bytes."""
        self._balance -= num_bytes


class LeftOut:
    """Rows that budgets left out: said at the first, and again whenever their number has doubled."""

    said = "rows were left out: max_bytes_per_s of their rules was reached"

    def __init__(self) -> None:
        self._num_told = 0

    def look(self, num_rows: int) -> str | None:
        """Return what to say of so many since the start; None where there is nothing new to say."""
        if num_rows < max(1, 2 * self._num_told):
            return None
        self._num_told = num_rows
        return f"{num_rows} {self.said}"


class Absent(LeftOut):
    """Rows that row maps named and tensors had not: nobody's, and of no step."""

    said = "rows were named by row maps and are not in the tensors of their sites: does a site have another axis?"


class Untaken(LeftOut):
    """Rows of the model's first step."""

    said = "rows were due in the model's first step, which tells how wide rows are: none of them are taken"
