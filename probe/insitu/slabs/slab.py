"""Slabs: preallocated memory that holds one step's taps, in a ring.

Layout of one slab, offsets in bytes, fixed by the frozen `Plan` and 64-byte aligned:

    stamp      int64[num_sites]      the step id, written by each tap as it fires: proof of identity
    count      int64[num_sites]      valid rows the tap saw; boundary and row sites only
    canary     f32[num_sites]        sum of the valid rows: not finite if any element is not
    row_sum    f32[num_boundaries, max_rows]
    row_absmax f32[num_boundaries, max_rows]
    load       int32[sum of num_experts]   of each router, how many of the valid rows chose each expert

Raw rows live in a second ring (`insitu.slabs.rows`), made once widths are known. The step thread takes slabs in order
and the drain frees them in order, so two counters are all the coordination there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from insitu.cached import cached
from insitu.flight.settings import FlightRule
from insitu.rules.rule import ROWS, Rule
from insitu.sites.site import Site, is_named

MAX_SLABS: Final = 256
MAX_VIEWS: Final = 16_384
"""Bound on preallocated views (two a site and slab); big models get fewer slabs."""
NUM_EXPLICIT: Final = 32
"""Places kept for `insitu.tap(...)` sites, which are known only when they first fire."""
NEVER: Final = -1
"""Stamp of a site that has not fired yet: no step has this id."""
_ALIGN: Final = 64


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True)
class Group:
    """Row sites that share one destination vector: one rule on one axis."""

    rule: Rule
    axis: str


@dataclass(frozen=True)
class Plan:
    """Which site writes where in a slab. Both sides use it; nothing is ever matched by order."""

    sites: tuple[Site, ...]
    rules: tuple[Rule, ...]
    max_rows: int

    @property
    def num_sites(self) -> int:
        return len(self.sites) + NUM_EXPLICIT

    @cached
    def root(self) -> Site | None:
        """What the model itself returned, where that is a site."""
        return next((site for site in reversed(self.sites) if not site.fqn), None)

    @cached
    def boundaries(self) -> tuple[int, ...]:
        return tuple(site.number for site in self.sites if site.boundary)

    @cached
    def loads(self) -> dict[int, tuple[int, int]]:
        """Router site -> (place of its first expert in the area `load`, number of its experts)."""
        found, at = {}, 0
        for site in self.sites:
            if site.num_experts:
                found[site.number] = (at, site.num_experts)
                at += site.num_experts
        return found

    @property
    def num_slabs(self) -> int:
        return max(8, min(MAX_SLABS, MAX_VIEWS // (2 * self.num_sites)))

    @cached
    def groups(self) -> tuple[Group, ...]:
        return tuple(dict.fromkeys(group for site in self.sites if (group := self.group_of(site))))

    @cached
    def row_sites(self) -> tuple[tuple[int, ...], ...]:
        """By group: the numbers of its sites."""
        return tuple(tuple(s.number for s in self.sites if self.group_of(s) == group) for group in self.groups)

    @cached
    def held_sites(self) -> frozenset[int]:
        """Row sites whose rows the flight recorder holds."""
        found = zip(self.groups, self.row_sites, strict=True)
        return frozenset(site for group, sites in found if isinstance(group.rule, FlightRule) for site in sites)

    def group_of(self, site: Site) -> Group | None:
        """Return the destination group of a site: the first rule for rows that names it, on the site's axis."""
        rule = next((r for r in self.rules if r.take == ROWS and is_named(r.sites, site)), None)
        return None if rule is None else Group(rule, site.axis)

    @property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Map area name to (offset, size) in bytes; `end` has size 0."""
        rows = 4 * len(self.boundaries) * self.max_rows
        sizes = {
            "stamp": 8 * self.num_sites,
            "count": 8 * self.num_sites,
            "canary": 4 * self.num_sites,
            "row_sum": rows,
            "row_absmax": rows,
            "load": 4 * sum(num_experts for _, num_experts in self.loads.values()),
            "end": 0,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = (at, size)
            at += _aligned(size)
        return offsets

    @property
    def slab_bytes(self) -> int:
        return self.offsets["end"][0]

    @property
    def digest(self) -> str:
        """16 hex digits over sites, rules and row capacity."""
        return hashlib.sha256(repr((self.sites, self.rules, self.max_rows)).encode()).hexdigest()[:16]


class Ring:
    """Counters of a ring of `size` places: one thread takes, one frees, both in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken = 0
        self._freed = 0

    def take(self) -> int | None:
        """Return a free place, or None when there is none."""
        if self._taken - self._freed >= self.size:
            return None
        place = self._taken % self.size
        self._taken += 1
        return place

    def free(self, num: int = 1) -> None:
        """Give back the places that were taken first."""
        assert self._freed + num <= self._taken, "a slab was freed that nobody had taken"
        self._freed += num

    def clear(self) -> None:
        """Give all places back, whoever took them."""
        self._freed = self._taken

    @property
    def num_taken(self) -> int:
        return self._taken - self._freed

    @property
    def is_filling(self) -> bool:
        """True when half the places are taken: the drain is to be woken."""
        return 2 * (self._taken - self._freed) >= self.size


@dataclass(frozen=True)
class Views:
    """One slab as the taps see it: device tensors at fixed addresses."""

    stamp: tuple[torch.Tensor, ...]
    host_stamp: memoryview | None
    """The same int64s, where the slab lies in host memory."""
    count: torch.Tensor
    host_count: memoryview | None
    """Likewise."""
    canary: tuple[torch.Tensor, ...]
    row_sum: dict[int, torch.Tensor]
    row_absmax: dict[int, torch.Tensor]
    load: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Readings:
    """Slabs as the drain sees them, on the host: dim 0 is the place in the ring, the others those of the areas."""

    stamp: NDArray[np.int64]
    count: NDArray[np.int64]
    canary: NDArray[np.float32]
    row_sum: NDArray[np.float32]
    row_absmax: NDArray[np.float32]
    load: NDArray[np.int32]


def _area(buffer: torch.Tensor, span: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return buffer[span[0] : span[0] + span[1]].view(dtype)


class Slabs:
    """The ring of slabs on one device, with a host mirror where the device is not the host."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.ring = Ring(plan.num_slabs)
        on_host = device.type == "cpu"
        shape = (plan.num_slabs + 1, plan.slab_bytes)
        with torch.inference_mode(False):
            self._memory = torch.zeros(shape, dtype=torch.uint8, device=device)
            self._mirror = (
                self._memory if on_host else torch.zeros(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            )
            self.views = tuple(self._views(row) for row in self._memory[:-1])
            self._readings = self._read_views(self._mirror.numpy())
            self.areas["stamp"].fill_(NEVER)

    def _views(self, memory: torch.Tensor) -> Views:
        offsets, boundaries = self.plan.offsets, self.plan.boundaries
        shape = (len(boundaries), self.plan.max_rows)
        row_sum = _area(memory, offsets["row_sum"], torch.float32).view(shape)
        row_absmax = _area(memory, offsets["row_absmax"], torch.float32).view(shape)
        stamp = _area(memory, offsets["stamp"], torch.int64)
        load, count = _area(memory, offsets["load"], torch.int32), _area(memory, offsets["count"], torch.int64)
        on_host = memory.device.type == "cpu"
        return Views(
            stamp=stamp.unbind(),
            host_stamp=memoryview(stamp.numpy().data) if on_host else None,
            count=count,
            host_count=memoryview(count.numpy().data) if on_host else None,
            canary=_area(memory, offsets["canary"], torch.float32).unbind(),
            row_sum=dict(zip(boundaries, row_sum.unbind(), strict=True)),
            row_absmax=dict(zip(boundaries, row_absmax.unbind(), strict=True)),
            load={site: load[at : at + size] for site, (at, size) in self.plan.loads.items()},
        )

    @property
    def memory(self) -> torch.Tensor:
        """All slabs on the device, uint8[num_slabs + 1, slab_bytes]; the last is of no step, and not read."""
        return self._memory

    @cached
    def areas(self) -> dict[str, torch.Tensor]:
        """Areas of all slabs on the device: dim 0 is the place in the ring, the others those of `Readings`."""
        areas = {
            name: self._memory[:-1, at : at + size].view(dtype)
            for name, dtype in (("stamp", torch.int64), ("count", torch.int64), ("canary", torch.float32))
            for at, size in (self.plan.offsets[name],)
        }
        shape = (self.plan.num_slabs, len(self.plan.boundaries), self.plan.max_rows)
        for name in ("row_sum", "row_absmax"):
            at, size = self.plan.offsets[name]
            areas[name] = self._memory[:-1, at : at + size].view(torch.float32).view(shape)
        return areas

    def forget(self, place: int, step_id: int) -> None:
        """Let no stamp in a slab be taken for one of this step, which is about to write there."""
        self.areas["stamp"][place].fill_(NEVER if step_id != NEVER else NEVER - 1)

    def read(self, places: Sequence[int]) -> Readings:
        """Return all slabs on the host, those at `places` as they are now; valid until the places are freed."""
        if self._mirror is not self._memory:
            for place in places:
                self._mirror[place].copy_(self._memory[place])
        return self._readings

    def _read_views(self, memory: NDArray[np.uint8]) -> Readings:
        offsets = self.plan.offsets

        def area(name: str, dtype: type) -> NDArray[np.generic]:
            at, size = offsets[name]
            return memory[:, at : at + size].view(dtype)

        shape = (len(memory), len(self.plan.boundaries), self.plan.max_rows)
        return Readings(
            stamp=area("stamp", np.int64),  # type: ignore[arg-type]
            count=area("count", np.int64),  # type: ignore[arg-type]
            canary=area("canary", np.float32),  # type: ignore[arg-type]
            row_sum=area("row_sum", np.float32).reshape(shape),  # type: ignore[arg-type]
            row_absmax=area("row_absmax", np.float32).reshape(shape),  # type: ignore[arg-type]
            load=area("load", np.int32),  # type: ignore[arg-type]
        )


class ControlBlock:
    """Device int64[8]: step_id, slab, num_rows, num_samples, variant, row slab, 0, 0. One async copy a step.

    A pinned block for each slab feeds it: that of a step is written again only when the drain has read its slab,
    however far the host runs ahead of the device.
    """

    def __init__(self, device: torch.device, num_slabs: int = 1) -> None:
        """num_slabs: of the ring; one more stands for none of them, and always gets the same numbers."""
        with torch.inference_mode(False):
            self.block = torch.zeros(8, dtype=torch.int64, device=device)
            shape, is_pinned = (num_slabs + 1, 8), device.type != "cpu"
            self._staged = torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=is_pinned)
        self._numbers = self._staged.numpy()
        self.step_id = self.block[0]

    def write(self, step_id: int, slab: int, num_rows: int, num_samples: int, variant: int, row_slab: int) -> None:
        self._numbers[slab, :6] = step_id, slab, num_rows, num_samples, variant, row_slab
        self.block.copy_(self._staged[slab], non_blocking=True)
