"""Small tensors of a step that wait for one another: what measuring them costs is calls, and those are shared.

The tap of a site whose statistics are due copies its rows to the end of a buffer, a call of two microseconds. A buffer
holds tensors of one width; once it is full, or when the step ends, all in it are measured in one go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from insitu.sites.site import Site
from insitu.statistics.reductions import Places, compute, index_of
from insitu.statistics.workspace import Workspace

MAX_WIDTHS: Final = 16
"""Widths that have a buffer, each as large as a block; sites of any further one are measured one by one."""
MAX_SHAPES: Final = 64
"""Numbers of rows of which a buffer remembers how it is divided."""


def buffer_bytes(sites: Iterable[tuple[int, bool]], size: int) -> int:
    """Return the most that buffers of `size` values take. sites: width, and whether what a layer read comes with it."""
    found: dict[int, bool] = {}
    for width, has_source in sites:
        if 2 * width <= size:
            found[width] = has_source or found.get(width, False)
    kept = list(found.values())[:MAX_WIDTHS]
    return 4 * size * (len(kept) + sum(kept))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the statistics of one site go: a row of int64[n, NUM_INTS] and of float64[n, NUM_FLOATS]."""

    ints: Tensor
    floats: Tensor
    row: int


def places_of(places: list[Place]) -> Places:
    """Return the places, all of one slab, as one."""
    rows = tuple(place.row for place in places)
    return Places(places[0].ints, places[0].floats, index_of(rows, places[0].ints.device))


class Waiting:
    """Tensors of one width that wait; all in it at a time are of one shape and kind."""

    def __init__(self, width: int, size: int, work: Workspace) -> None:
        """size: of its buffer, in values."""
        self.sites: list[Site] = []
        self._places: list[Place] = []
        self._sourced: list[int] = []
        self._num_rows, self._has_scores = 0, False
        self._width, self._size, self._work = width, size, work
        self._values = self._buffer()
        self._sources: Tensor | None = None
        self._shelves: dict[tuple[int, bool], tuple[Tensor, ...]] = {}

    def _buffer(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(self._size, dtype=torch.float32, device=self._work.device)

    @property
    def num_bytes(self) -> int:
        """Memory that is kept."""
        return self._values.nbytes + (0 if self._sources is None else self._sources.nbytes)

    def has_room(self, num_rows: int, *, has_scores: bool) -> bool:
        """Tell whether a tensor of so many rows can be added now."""
        if not self.sites:
            return True
        is_alike = num_rows == self._num_rows and has_scores == self._has_scores
        return is_alike and (len(self.sites) + 1) * num_rows * self._width <= self._size

    def add(self, site: Site, x: Tensor, source: Tensor | None, place: Place, *, has_scores: bool) -> None:
        """Add a site's valid rows, and what its layer had read."""
        self._num_rows, self._has_scores = x.shape[0], has_scores
        at = len(self.sites)
        self._shelf(is_source=False)[at].copy_(x)
        if source is not None:
            self._shelf(is_source=True)[len(self._sourced)].copy_(source)
            self._sourced.append(at)
        self.sites.append(site)
        self._places.append(place)

    def _shelf(self, *, is_source: bool) -> tuple[Tensor, ...]:
        """Return the places of tensors in the buffer."""
        shelf = self._shelves.get((self._num_rows, is_source))
        if shelf is None:
            if is_source and self._sources is None:
                self._sources = self._buffer()
            if len(self._shelves) >= MAX_SHAPES:
                self._shelves.clear()
            num = self._size // (self._num_rows * self._width)
            shelf = self._shelves[self._num_rows, is_source] = self._as_block(num, is_source=is_source).unbind()
        return shelf

    def _as_block(self, num: int, *, is_source: bool) -> Tensor:
        memory = self._sources if is_source else self._values
        assert memory is not None, "a source was added"
        return memory[: num * self._num_rows * self._width].view(num, self._num_rows, self._width)

    def measure(self, step: Tensor) -> None:
        """Write the statistics of all that wait. step: int64[], the stamp."""
        num_sourced = len(self._sourced)
        compute(
            self._as_block(len(self.sites), is_source=False),
            places_of(self._places),
            self._work,
            step,
            has_scores=self._has_scores,
            source=self._as_block(num_sourced, is_source=True) if num_sourced else None,
            sourced=self._sourced,
        )

    def clear(self) -> None:
        """Let go of all that waits."""
        self.sites, self._places, self._sourced = [], [], []


class Staging:
    """What waits to be measured, by width."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self._size = work.size
        self._waiting: dict[int, Waiting] = {}

    def find(self, x: Tensor) -> Waiting | None:
        """Return where rows x would wait, or None where they are too large for company, or too many are."""
        width = x.shape[1]
        if not x.numel() or 2 * x.numel() > self._size:
            return None
        found = self._waiting.get(width)
        if found is None and len(self._waiting) < MAX_WIDTHS:
            found = self._waiting[width] = Waiting(width, self._size, self.work)
        return found

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(waiting.num_bytes for waiting in self._waiting.values())

    def all(self) -> list[Waiting]:
        """Return whatever holds something."""
        return [waiting for waiting in self._waiting.values() if waiting.sites]
