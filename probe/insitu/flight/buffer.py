"""What a flight recorder holds: parts of finished steps in order, never more bytes than it was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.session.row_map import Rows, axis_in
from insitu.slabs.harvest import Bools, Captures, Ints, Summaries

PIECES: Final = 16
"""A part of more than this share of the bound is cut, so that what is let go of is a share of it and not all."""
PART_BYTES: Final = 1024
"""What a part costs beside its values: objects of Python, numpy and Arrow."""
CAPTURE_BYTES: Final = 1024
"""And each site of a part of rows."""
ENTRY_BYTES: Final = 256
"""And each entry of a row map."""

Window = tuple[int, int]
"""[t0_ns, t1_ns], both ends inside."""


class Held(Protocol):
    """Some steps, in the order they ran."""

    @property
    def t_ns(self) -> Ints:
        """When each began, int64[n]."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def where(self, kept: Bools) -> Self:
        """Return some of the steps: a copy."""
        ...


@dataclass(frozen=True, slots=True)
class Canaries:
    """T0 of some steps, of the sites whose canary is not shipped anyway."""

    step_id: Ints
    t_ns: Ints
    canary: NDArray[np.float32]
    """[n, num_sites]"""
    untold: Bools
    """[n, num_sites]: it fired, and nothing of it was shipped."""

    @property
    def num_bytes(self) -> int:
        arrays = self.step_id, self.t_ns, self.canary, self.untold
        return PART_BYTES + sum(array.nbytes for array in arrays)

    def where(self, kept: Bools) -> Canaries:
        return Canaries(self.step_id[kept], self.t_ns[kept], self.canary[kept], self.untold[kept])

    def summaries(self) -> Summaries:
        """Return them as rows of `summaries`: step, site and canary, as inner sites of a flagged step have them."""
        step, site = np.nonzero(self.untold)
        none = np.zeros(len(step), np.int64)
        return Summaries(
            step_id=self.step_id[step],
            site=site,
            canary=self.canary[step, site],
            at_boundary=np.zeros(len(step), bool),
            num_rows=none,
            row_sum=np.zeros(len(step)),
            absmax=np.zeros(len(step), np.float32),
            num_bad=none,
            bad=none[:0],
        )


@dataclass(frozen=True, slots=True)
class FullSteps:
    """Raw rows of some steps. Whose they are is worked out when they are shipped: most never are."""

    step_id: Ints
    t_ns: Ints
    maps: tuple[Sequence[Rows] | None, ...]
    """The row map of each, as it was stated."""
    captures: tuple[Captures, ...]
    """By site; without requests and positions."""
    axes: dict[int, str]
    """Site -> axis."""

    @property
    def num_bytes(self) -> int:
        rows = sum(
            CAPTURE_BYTES + sum(values.nbytes for values in (p.data, p.step_id, p.row, p.position, p.request))
            for p in self.captures
        )
        entries = ENTRY_BYTES * sum(len(rows or ()) for rows in self.maps)
        return PART_BYTES + self.step_id.nbytes + self.t_ns.nbytes + entries + rows

    def where(self, kept: Bools) -> FullSteps:
        step_id = self.step_id[kept]
        of_steps = (_where(part, np.isin(part.step_id, step_id)) for part in self.captures)
        return FullSteps(
            step_id,
            self.t_ns[kept],
            tuple(self.maps[place] for place in np.flatnonzero(kept)),
            tuple(part for part in of_steps if len(part.step_id)),
            self.axes,
        )

    def named(self) -> Iterator[Captures]:
        """Yield the rows with the requests and positions that the row maps give them; rows of nobody are left out."""
        order = np.argsort(self.step_id, kind="stable")
        has_map = np.array([rows is not None for rows in self.maps], bool)
        for part in self.captures:
            step = order[np.searchsorted(self.step_id[order], part.step_id)]
            request, position = whose(step, part.row, self.maps, self.axes[part.site])
            kept = np.asarray(request.is_valid()) | ~has_map[step]
            if kept.any():
                yield _where(_with(part, request, position), kept)


def _with(part: Captures, request: pa.Array, position: Ints) -> Captures:
    return Captures(part.site, part.dtype, part.width, part.step_id, request, part.row, position, part.data)


def _where(part: Captures, kept: Bools) -> Captures:
    if kept.all():
        return part
    return Captures(
        part.site,
        part.dtype,
        part.width,
        part.step_id[kept],
        part.request.filter(pa.array(kept)),
        part.row[kept],
        part.position[kept],
        part.data[kept],
    )


def whose(step: Ints, row: Ints, maps: Sequence[Sequence[Rows] | None], axis: str) -> tuple[pa.Array, Ints]:
    """Return whose row `row[i]` of the step with map `maps[step[i]]` is, and its token position; null and -1: nobody's.

    What `insitu.session.row_map.places` says of one step a row at a time, of many steps at once.
    """
    entries = [
        (index, entry, of_samples)
        for index, rows in enumerate(maps)
        for of_samples in [axis_in(rows or (), axis) == "samples"]
        for entry in rows or ()
        if (entry.sample_row >= 0 if of_samples else entry.count > 0)
    ]
    if not entries or not len(row):
        return pa.nulls(len(row), pa.utf8()), np.full(len(row), -1, np.int64)
    of_step = np.array([index for index, _, _ in entries], np.int64)
    first = np.array([each.sample_row if sampled else each.start for _, each, sampled in entries], np.int64)
    count = np.array([1 if sampled else each.count for _, each, sampled in entries], np.int64)
    begin = np.array([each.position + (each.count - 1 if sampled else 0) for _, each, sampled in entries], np.int64)
    span = int(max(first.max(), row.max())) + 1
    order = np.argsort(of_step * span + first, kind="stable")
    at = np.searchsorted((of_step * span + first)[order], step * span + row, side="right") - 1
    entry = order[np.maximum(at, 0)]
    inside = (at >= 0) & (of_step[entry] == step) & (row - first[entry] < count[entry])
    requests = pa.array([each.request for _, each, _ in entries], pa.utf8())
    return (
        requests.take(pa.array(entry, mask=~inside)),
        np.where(inside, begin[entry] + row - first[entry], -1),
    )


P = TypeVar("P", bound=Held)


class Buffer(Generic[P]):
    """Parts in the order they came, at most `max_bytes` of them: the oldest are let go of first.

    What lies in the window of an open incident is kept until it is taken: where that leaves no room, what is newest
    is not kept, and counted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        """The most there ever were."""
        self.num_let_go = 0
        """Steps that were held and made room for newer ones."""
        self._parts: deque[P] = deque()

    def __len__(self) -> int:
        """Return how many steps are held."""
        return sum(len(part.t_ns) for part in self._parts)

    def add(self, part: P, windows: Sequence[Window] = ()) -> list[int]:
        """Hold some steps; return when those began for which there was no room."""
        refused: list[int] = []
        for piece in self._pieces(part):
            if self._make_room(piece.num_bytes, windows):
                self._append(piece)
            else:
                refused += piece.t_ns.tolist()
        return refused

    def _pieces(self, part: P) -> Iterator[P]:
        num_pieces = min(len(part.t_ns), -(-part.num_bytes * PIECES // self.max_bytes))
        if num_pieces <= 1:
            if len(part.t_ns):
                yield part
            return
        for places in np.array_split(np.arange(len(part.t_ns)), num_pieces):
            kept = np.zeros(len(part.t_ns), bool)
            kept[places] = True
            yield part.where(kept)

    def _append(self, part: P) -> None:
        self._parts.append(part)
        self.num_bytes += part.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def _make_room(self, num_bytes: int, windows: Sequence[Window]) -> bool:
        if num_bytes > self.max_bytes:
            return False
        excess = self.num_bytes + num_bytes - self.max_bytes
        going: list[P] = []
        for part in self._parts:
            if excess <= 0:
                break
            if not _touches(part, windows):
                going.append(part)
                excess -= part.num_bytes
        self._remove(going)
        self.num_let_go += sum(len(part.t_ns) for part in going)
        return excess <= 0

    def forget(self, before_ns: int, windows: Sequence[Window] = ()) -> None:
        """Let go of what began before a time, unless an incident wants it."""
        old = takewhile(lambda part: int(part.t_ns[-1]) < before_ns, self._parts)
        self._remove([part for part in old if not _touches(part, windows)])

    def take(self, windows: Sequence[Window], max_bytes: float) -> list[P]:
        """Take out what lies in any of the windows, the oldest first, about `max_bytes` of it at most."""
        taken: list[P] = []
        for part in [part for part in self._parts if _touches(part, windows)]:
            if taken and max_bytes < part.num_bytes:
                break
            max_bytes -= part.num_bytes
            inside = _inside(part.t_ns, windows)
            taken.append(part if inside.all() else part.where(inside))
            place = self._remove([part])
            if not inside.all():
                rest = part.where(~inside)
                self._parts.insert(place, rest)
                self.num_bytes += rest.num_bytes
        return taken

    def wants(self, windows: Sequence[Window]) -> bool:
        """Tell whether anything held lies in one of the windows."""
        return any(_touches(part, windows) for part in self._parts)

    def _remove(self, parts: Sequence[P]) -> int:
        """Take parts out; return where the last of them was."""
        place = 0
        for going in parts:
            place = next(at for at, part in enumerate(self._parts) if part is going)
            del self._parts[place]
            self.num_bytes -= going.num_bytes
        return place


def _inside(t_ns: Ints, windows: Sequence[Window]) -> Bools:
    inside = np.zeros(len(t_ns), bool)
    for begin, end in windows:
        inside |= (begin <= t_ns) & (t_ns <= end)
    return inside


def _touches(part: Held, windows: Sequence[Window]) -> bool:
    return bool(len(windows)) and bool(_inside(part.t_ns, windows).any())
