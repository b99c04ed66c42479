"""From what a forward was given to its row map. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from insitu.session.row_map import Rows


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start .. start + count - 1` of one sequence of a batch, at positions `position ..`: none is padding."""

    start: int
    count: int
    position: int

    @property
    def next_position(self) -> int:
        return self.position + self.count


@dataclass(frozen=True, slots=True)
class Batch:
    """A forward of [num_sequences, num_tokens] token rows, batch-major, and the runs of each sequence."""

    runs: Sequence[Sequence[Run]]
    num_tokens: int
    num_logits: int
    """Logits of each sequence: those of its last tokens."""

    @property
    def num_sequences(self) -> int:
        return len(self.runs)

    @property
    def has_all_logits(self) -> bool:
        """Whether there is a row of logits for each of several token rows: then it has the same number."""
        return self.num_logits == self.num_tokens > 1


def runs_of(valid: NDArray[np.bool_], positions: NDArray[np.int64]) -> list[Run]:
    """Return the runs of one sequence: stretches of valid tokens whose positions go up by one."""
    at = np.flatnonzero(valid)
    if not len(at):
        return []
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(positions[at]) != 1)) + 1
    return [
        Run(int(part[0]), len(part), int(positions[part[0]]))
        for part in (np.split(at, breaks) if len(breaks) else [at])
    ]


def valid_by_position(positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which tokens of a sequence are no padding, where its positions alone say so.

    `generate` gives padding position 0, and so it gives the first token: that is the last 0 before the others.
    """
    later = np.flatnonzero(positions)
    valid: NDArray[np.bool_] = positions != 0
    first = int(later[0]) if len(later) else len(positions)
    if first:
        valid[first - 1] = True
    return valid


def row_map(
    batch: Batch,
    names: Sequence[str],
    phase: str,
    ended: Collection[int] = (),
    capture: bool = False,
) -> list[Rows]:
    """Return the row map of a forward. names: of its sequences, one each. ended: sequences that are over, whose rows
    nobody asked for any more. capture: as of `Rows`."""
    found: list[Rows] = []
    for at, (name, runs) in enumerate(zip(names, batch.runs, strict=True)):
        for run in () if at in ended else runs:
            found += _entries(batch, at, run, name, phase, capture)
    return found


def _entries(batch: Batch, at: int, run: Run, name: str, phase: str, capture: bool) -> list[Rows]:
    """Return a run as entries: each sampled row is that of an entry's last token."""
    first = batch.num_tokens - batch.num_logits
    begin, end = run.start, run.start + run.count
    ends = range(max(begin, first) + 1, end + 1) if not batch.has_all_logits and end > first else [end]
    found: list[Rows] = []
    for until in ends:
        sample = -1 if batch.has_all_logits or until <= first else at * batch.num_logits + until - 1 - first
        position = run.position + begin - run.start
        start = at * batch.num_tokens + begin
        found.append(Rows(name, start, until - begin, position, phase, sample, capture))
        begin = until
    return found
