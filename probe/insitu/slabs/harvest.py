"""Finished slabs to columns: what the taps of many steps left behind, read at once.

All steps of one collection go through each operation together: the drain shares the interpreter with the step
thread, so what it does a row at a time in Python, the steps wait for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from operator import attrgetter
from time import thread_time_ns
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.statistics import layout as statistic_layout
from insitu.statistics.parts import Partials, from_places

if TYPE_CHECKING:
    from insitu.session.step import StepRecord
    from insitu.slabs.rows import RowSlabs
    from insitu.slabs.slab import Plan, Slabs
    from insitu.slabs.statistics import StatisticSlabs

_NEVER: Final = np.iinfo(np.int64).max

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

STATISTIC_BYTES: Final = 1024
"""What the statistics of one site and step take here."""


@dataclass(frozen=True, slots=True)
class Summaries:
    """Rows of `summaries` as columns. Where `at_boundary` is False only step, site and canary mean anything."""

    step_id: Ints
    site: Ints
    canary: NDArray[np.float32]
    at_boundary: Bools
    num_rows: Ints
    row_sum: NDArray[np.float64]
    absmax: NDArray[np.float32]
    num_bad: Ints
    """How many of `bad` are this row's."""
    bad: Ints
    """Rows that are not finite, of all rows of this part in order."""


@dataclass(frozen=True, slots=True)
class Loads:
    """Rows of `expert_loads` of one site as columns."""

    site: int
    step_id: Ints
    num_rows: Ints
    load: NDArray[np.int32]
    """[n, num_experts]."""


@dataclass(frozen=True, slots=True)
class Captures:
    """Rows of `captures` of one site as columns."""

    site: int
    dtype: str
    width: int
    step_id: Ints
    request: pa.Array
    row: Ints
    position: Ints
    data: NDArray[np.uint8]
    """[n, bytes of a row in its form]."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Rows of `statistics` as columns."""

    step_id: Ints
    site: Ints
    parts: Partials


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read of some steps, whether it is shipped or not: for the flight recorder."""

    records: Sequence[StepRecord]
    reading: Reading
    summaries: Summaries
    held: Sequence[Captures]
    """Rows of the sites that only the recorder wants."""
    plan: Plan

    def name_of(self, site: int) -> str:
        sites = self.plan.sites
        return sites[site].name if site < len(sites) else f"site {site}"


@dataclass(frozen=True, slots=True)
class Plugged:
    """Rows of `plugin_statistics` of one statistic as columns."""

    statistic: str
    fields: tuple[str, ...]
    step_id: Ints
    site: Ints
    values: NDArray[np.float64]
    """[n, len(fields)]."""


@dataclass
class Harvest:
    """What was read from finished steps and is not shipped yet."""

    summaries: list[Summaries] = field(default_factory=list)
    loads: list[Loads] = field(default_factory=list)
    captures: list[Captures] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    plugged: list[Plugged] = field(default_factory=list)
    num_crowded: int = 0
    """Captures that were wanted and did not fit."""
    num_spared: int = 0
    """Captures that rules gave up since the queue was filling."""
    num_left_out: int = 0
    """Captures that a byte budget left out: asked not to be taken, so not dropped."""
    num_untaken: int = 0
    """Captures that were due in the first step of the model, which takes none."""
    num_absent: int = 0
    """Captures of rows that a row map named and the tensor had not."""
    num_unseen: int = 0
    """Summaries of steps that found no free slab."""
    sampling: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `sampling`."""
    cpu_ns: Counter[str] = field(default_factory=Counter)
    """CPU time that reading them took, by table."""
    num_unmeasured: int = 0
    """Statistics that were due and found no place."""
    num_unplugged: int = 0
    """Statistics of other packages that were due and found no place."""
    num_lost: Counter[str] = field(default_factory=Counter)
    """Rows by table, as far as it is known, of steps that could not be read."""
    errors: list[Exception] = field(default_factory=list)
    """Why not."""

    def add(self, other: Harvest) -> None:
        """Append what another holds."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @contextmanager
    def timed(self, table: str) -> Iterator[None]:
        """Add the CPU time of a block to what reading a table took."""
        began_ns = thread_time_ns()
        yield
        self.cpu_ns[table] += thread_time_ns() - began_ns

    @property
    def num_bytes(self) -> int:
        """What this holds, about."""
        parts: tuple[Any, ...] = (*self.summaries, *self.loads, *self.captures)
        arrays = (getattr(part, name) for part in parts for name in part.__slots__)
        sizes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray | pa.Array))
        return sizes + STATISTIC_BYTES * sum(len(part.step_id) for part in self.statistics)


@dataclass(frozen=True, slots=True)
class Reading:
    """Slabs of n steps, copied: [n, ...]."""

    step_id: Ints
    fired: Bools
    """[n, num_sites]: the site's stamp is the step's."""
    count: Ints
    canary: NDArray[np.float32]
    row_sum: NDArray[np.float32]
    """[n, num_boundaries, most rows any of them has]; beyond `count` it holds what older steps left."""
    row_absmax: NDArray[np.float32]
    load: NDArray[np.int32]
    """[n, sum of num_experts]; means something in sampled steps only."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows of which steps a site's captures are."""

    step: Ints
    """Index of the step in the collection."""
    place: Ints
    """Row of the row slab."""
    request: pa.Array
    row: Ints
    position: Ints

    def where(self, kept: Bools) -> Wanted:
        if kept.all():
            return self
        return Wanted(
            self.step[kept],
            self.place[kept],
            self.request.filter(pa.array(kept)),
            self.row[kept],
            self.position[kept],
        )


def read_steps(slabs: Slabs, records: Sequence[StepRecord]) -> Reading:
    """Return what the slabs of these steps hold. Every record has a slab."""
    places = [record.slab for record in records if record.slab is not None]
    found = slabs.read(places)
    step_id = np.array([record.step_id for record in records], np.int64)
    count, canary = found.count[places], found.canary[places]
    at_boundaries = np.clip(count[:, list(slabs.plan.boundaries)], 0, slabs.plan.max_rows)
    most = int(at_boundaries.max(initial=0))
    row_sum = found.row_sum[places, :, :most]
    add_up(canary, row_sum, count, slabs.plan)
    return Reading(
        step_id,
        found.stamp[places] == step_id[:, None],
        count,
        canary,
        row_sum,
        found.row_absmax[places, :, :most],
        found.load[places],
    )


def add_up(canary: NDArray[np.float32], row_sum: NDArray[np.float32], count: Ints, plan: Plan) -> None:
    """Write the canaries of boundaries all of whose rows have sums: no tap takes them."""
    for at, site in enumerate(plan.boundaries):
        num, sums = count[:, site], row_sum[:, at]
        is_valid = np.arange(sums.shape[1]) < num[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.where(is_valid, sums, np.float32(0)).sum(1, dtype=np.float32)
        canary[:, site] = np.where(num <= plan.max_rows, total, canary[:, site])


def summarise(reading: Reading, plan: Plan) -> Summaries:
    """Return a row for each boundary that fired, and for every site that fired in a step with a bad boundary."""
    boundaries = list(plan.boundaries)
    num_rows = reading.count[:, boundaries]
    valid = np.arange(reading.row_sum.shape[2]) < num_rows[:, :, None]
    fired = reading.fired[:, boundaries]
    bad = valid & ~np.isfinite(reading.row_absmax) & fired[:, :, None]
    flagged = fired & (bad.any(2) | ~np.isfinite(reading.canary[:, boundaries]))
    told: Bools = reading.fired & flagged.any(axis=1, keepdims=True)
    told[:, boundaries] = fired
    step, site = np.nonzero(told)
    column = np.full(plan.num_sites, -1)
    column[boundaries] = np.arange(len(boundaries))
    at = column[site]
    at_boundary = at >= 0
    with np.errstate(invalid="ignore"):  # inf - inf in a step that is about to be told of
        row_sum = np.where(valid, reading.row_sum, 0.0).sum(2, dtype=np.float64)
    absmax = np.where(valid, reading.row_absmax, 0.0).max(2, initial=0.0)
    bad_rows = bad[step, at] & at_boundary[:, None]
    return Summaries(
        reading.step_id[step],
        site,
        reading.canary[step, site],
        at_boundary,
        num_rows[step, at],
        row_sum[step, at],
        absmax[step, at].astype(np.float32),
        bad_rows.sum(1),
        np.nonzero(bad_rows)[1],
    )


def loads_of(reading: Reading, records: Sequence[StepRecord], plan: Plan) -> Iterator[Loads]:
    """Yield what the routers counted in the sampled steps in which they fired, a part a router."""
    sampled = np.array([record.sampled for record in records], bool)
    for site, (at, num_experts) in plan.loads.items():
        told = sampled & reading.fired[:, site]
        if told.any():
            load = reading.load[told, at : at + num_experts]
            yield Loads(site, reading.step_id[told], reading.count[told, site], load)


def measured(reading: Reading, records: Sequence[StepRecord], slabs: StatisticSlabs) -> Iterator[Statistics]:
    """Yield the statistics that were taken in these steps, of the sites that fired."""
    taken = np.array([i for i, record in enumerate(records) if record.statistic_slab is not None], np.int64)
    if not len(taken):
        return
    ints, floats = slabs.read([record.statistic_slab for record in records if record.statistic_slab is not None])
    step_id = reading.step_id[taken]
    told = (ints[:, :, statistic_layout.STAMP] == step_id[:, None]) & reading.fired[taken][:, slabs.sites]
    step, at = np.nonzero(told)
    if len(step):
        parts = from_places(step_id[step], ints[step, at], floats[step, at])
        yield Statistics(step_id[step], slabs.sites[at], parts)


def captured(
    reading: Reading, records: Sequence[StepRecord], slabs: RowSlabs, plan: Plan, into: Harvest
) -> Iterator[Captures]:
    """Yield the raw rows that these steps left, a part a site and kind of step; count in `into` what they have not."""
    full = np.array([i for i, record in enumerate(records) if record.row_slab is not None], np.int64)
    if not len(full):
        return
    slab_and_place = [(-1 if record.row_slab is None else record.row_slab, record.row_place) for record in records]
    at = np.array(slab_and_place, np.int64)
    for number, sites in enumerate(plan.row_sites):
        named = _named(records, [i for i in full.tolist() if records[i].places[number] is not None], number)
        nameless = np.array([i for i in full.tolist() if records[i].places[number] is None], np.int64)
        for site in sites:
            if site not in slabs.forms:
                continue
            kept = reading.fired[:, site] & (reading.step_id < slabs.broken.get(site, _NEVER))
            lengths = reading.count[nameless, site]
            if site not in plan.held_sites:
                into.num_crowded += int(np.clip(lengths - plan.max_rows, 0, None)[kept[nameless]].sum())
            for wanted in (named, _nameless(nameless, np.clip(lengths, 0, plan.max_rows))):
                wanted = wanted.where(kept[wanted.step])
                there = wanted.row < reading.count[wanted.step, site]
                into.num_absent += len(there) - int(there.sum())
                wanted = wanted.where(there)
                if len(wanted.step):
                    yield _captures(site, wanted, reading, at, slabs)


def num_lacking(
    reading: Reading, records: Sequence[StepRecord], kept: Collection[int], can_hold: Callable[[int], bool], plan: Plan
) -> Ints:
    """Return how many rows that were due in each of these steps had no memory: those of sites that fired.

    kept: sites that have some, but in a step without a slab of rows. can_hold: whether there can be any for a site.
    A quiet tap counts no rows: a tensor is taken to have as many as the boundaries on its axis.
    """
    is_without = np.array([record.row_slab is None for record in records], bool)
    num = np.zeros(len(records), np.int64)
    for number, (group, of_group) in enumerate(zip(plan.groups, plan.row_sites, strict=True)):
        sites = [site for site in of_group if site not in plan.held_sites and can_hold(site)]
        others = [site for site in sites if site not in kept]
        num_sites = np.where(is_without, reading.fired[:, sites].sum(1), reading.fired[:, others].sum(1))
        boundaries = [site for site in plan.boundaries if plan.sites[site].axis == group.axis]
        for at in np.flatnonzero(num_sites).tolist():
            if not records[at].places:
                continue
            counts = reading.count[at, boundaries][reading.fired[at, boundaries]]
            due = _num_due(records[at], number, int(counts.max()) if len(counts) else None)
            num[at] += due * int(num_sites[at])
    return num


def _num_due(record: StepRecord, group: int, num_rows: int | None) -> int:
    """Return how many rows of a tensor of so many a group takes in a step; None: nobody knows how many there are."""
    places = record.places[group]
    if places is None:
        return (record.num_rows or 0) if num_rows is None else num_rows
    return sum(num_rows is None or place.row < num_rows for place in places)


def _captures(site: int, wanted: Wanted, reading: Reading, at: Ints, slabs: RowSlabs) -> Captures:
    """at: of each step its slab, and its first place there."""
    form, (slab, first) = slabs.forms[site], at[wanted.step].T
    return Captures(
        site,
        form.name,
        form.width,
        reading.step_id[wanted.step],
        wanted.request,
        wanted.row,
        wanted.position,
        slabs.read(site, slab, first + wanted.place),
    )


def _named(records: Sequence[StepRecord], steps: Sequence[int], group: int) -> Wanted:
    """Return the rows that a group's rule chose from the row maps of these steps."""
    lists: list[Any] = [records[i].places[group] for i in steps]
    lengths = np.array([len(places) for places in lists], np.int64)
    fields = list(map(attrgetter("request", "row", "position"), (place for places in lists for place in places)))
    request, row, position = zip(*fields, strict=True) if fields else ((), (), ())
    step, rows = np.repeat(np.array(steps, np.int64), lengths), np.array(row, np.int64)
    place = _last_of_each(step, rows, _counted(lengths))
    return Wanted(step, place, pa.array(request, pa.utf8()), rows, np.array(position, np.int64))


def _last_of_each(step: Ints, row: Ints, place: Ints) -> Ints:
    """Return where each row of each step lies: one that two requests name was sent to the last of its places."""
    names, at = np.unique((step << 32) + row, return_inverse=True)
    if len(names) == len(place):
        return place
    last = np.zeros(len(names), np.int64)
    np.maximum.at(last, at, place)
    return last[at]


def _nameless(steps: Ints, lengths: Ints) -> Wanted:
    """Return every row of steps that stated no row map."""
    step, row = np.repeat(steps, lengths), _counted(lengths)
    return Wanted(step, row, pa.nulls(len(row), pa.utf8()), row, np.full(len(row), -1))


def _counted(lengths: Ints) -> Ints:
    """Return 0 .. length - 1 for each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
