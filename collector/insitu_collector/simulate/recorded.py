"""Service times of real steps: taken out of any store, and drawn again for steps of like shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from insitu.vocabulary import IntervalClass
from insitu_collector.simulate.work import StepShape, Taken, struck_by_load

Int64 = NDArray[np.int64]

SHIPPED: Final = "service_times.csv"
"""`recorded_steps` of a run of the tiny-llama that comes with insitu, two stages on two cores, as `write` left them."""
COLUMNS: Final = (
    "place",
    "num_rows",
    "prefill_rows",
    "context",
    "num_requests",
    "core_us",
    "off_us",
    "queued_us",
    "sample_us",
)
"""Of a step on one rank: where in the pipeline (`FIRST` ...), its shape, its time on the core, the time it was kept off
it, the part of that in the run queue, and what sampling took."""
FIRST, MIDDLE, LAST = 0, 1, 2
MOST_STEPS: Final = 1_500
"""Of each place that are kept."""
NUM_NEAREST: Final = 24
"""A step takes what one of so many recorded ones of the most alike shape took."""
TAIL: Final = 0.03
"""Chance that a step is kept from its core for some milliseconds. What a recorded step waited in the run queue was its
host's doing: it is left out, and this and the scenario's foreign load stand in for it."""
FEWEST_STEPS: Final = 50
_WARMUP: Final = "warmup-"
_CORE: Final = (int(IntervalClass.COMPUTE), int(IntervalClass.HOST))


@dataclass
class RecordedService:
    """Times drawn from recorded steps; `table` has the columns `COLUMNS`."""

    table: pa.Table
    num_stages: int
    _nearest: dict[tuple[int, StepShape], Int64] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_stages < 1 or not self.table.num_rows:
            raise ValueError("no recorded steps to draw service times from")
        self._column = {name: np.asarray(self.table[name]).astype(np.float64) for name in COLUMNS}
        self._rows = {place: np.flatnonzero(self._column["place"] == place) for place in (FIRST, MIDDLE, LAST)}
        scale = [max(1.0, float(np.std(self._column[name]))) for name in StepShape._fields]
        self._scale = np.array(scale)
        self._shape = np.stack([self._column[name] for name in StepShape._fields], axis=1) / self._scale

    def take(self, random: np.random.Generator, stage: int, shape: StepShape, width: int, load: float) -> Taken:
        """Draw what a step of this shape takes on each of `width` ranks of a stage; load: cores that others use."""
        near = self._alike(stage, shape)
        drawn = near[random.integers(len(near), size=width)]
        core, off, elsewhere = (self._column[name][drawn] * 1e3 for name in ("core_us", "off_us", "queued_us"))
        queued = struck_by_load(random, width, TAIL, load)
        is_last = stage == self.num_stages - 1
        sampling = float(np.median(self._column["sample_us"][near])) * 1e3 if is_last else 0.0
        return Taken(core * (1 + 0.1 * load), queued, np.maximum(off - elsewhere, 0.0), sampling)

    def _alike(self, stage: int, shape: StepShape) -> Int64:
        place = LAST if stage == self.num_stages - 1 else FIRST if stage == 0 else MIDDLE
        key = place, shape._replace(context=round(shape.context, -2))
        found = self._nearest.get(key)
        if found is None:
            rows = next(self._rows[each] for each in (place, FIRST, LAST, MIDDLE) if len(self._rows[each]))
            away = np.abs(self._shape[rows] - np.array(shape, np.float64) / self._scale).sum(axis=1)
            found = self._nearest[key] = rows[np.argsort(away, kind="stable")[:NUM_NEAREST]]
        return found


def shipped_steps() -> pa.Table:
    """Return the recorded steps that come with insitu."""
    with (files(__package__) / SHIPPED).open("rb") as file:
        return csv.read_csv(file)


def write(table: pa.Table, path: str) -> None:
    """Write recorded steps as a file that `shipped_steps` reads."""
    csv.write_csv(table, path, csv.WriteOptions(quoting_style="none"))


def recorded_steps(tables: dict[str, pa.Table]) -> pa.Table:
    """Return what each step took on each rank of a store's latest run; columns `COLUMNS`.

    tables: `sources`, `steps`, `intervals`, `health`. Raises ValueError where there are too few steps to draw from.
    """
    ranks = tables["sources"].filter(pc.equal(tables["sources"]["role"], "rank")).to_pylist()
    if not ranks:
        raise ValueError("no rank has written this store, so it has no service times")
    latest = max(ranks, key=lambda row: row["unix_anchor_ns"] or 0)
    mine = [row for row in ranks if row["run"] == latest["run"] and (row["replica"] or 0) == (latest["replica"] or 0)]
    stages = {row["epoch"]: row["stage"] for row in mine}
    shapes = _shapes(tables["steps"], [epoch for epoch, stage in stages.items() if stage == min(stages.values())])
    parts = []
    for epoch, stage in sorted(stages.items()):
        place = FIRST if stage == min(stages.values()) else LAST if stage == max(stages.values()) else MIDDLE
        parts.append(_of_rank(tables, epoch, place, shapes))
    found = pa.concat_tables(parts)
    if found.num_rows < FEWEST_STEPS:
        raise ValueError(f"{found.num_rows} whole steps with a row map; {FEWEST_STEPS} are needed to draw from")
    return found


def _shapes(steps: pa.Table, epochs: list[int]) -> dict[int, StepShape]:
    """Return the shape of each step that has a row map and is not warm-up."""
    found: dict[int, StepShape] = {}
    rows = steps.filter(pc.is_in(steps["epoch"], pa.array(epochs, pa.uint64())))
    for step, entries in zip(rows["step_id"].to_pylist(), rows["rows"].to_pylist(), strict=True):
        if entries and not any((entry["request"] or "").startswith(_WARMUP) for entry in entries):
            found[step] = _shape(entries)
    return found


def _shape(entries: list[dict[str, Any]]) -> StepShape:
    counts = [entry["count"] for entry in entries]
    context = sum(e["count"] * max(0, e["position"]) + e["count"] * (e["count"] + 1) / 2 for e in entries)
    return StepShape(sum(counts), sum(count for count in counts if count > 1), context, len(entries))


def _of_rank(tables: dict[str, pa.Table], epoch: int, place: int, shapes: dict[int, StepShape]) -> pa.Table:
    rows = tables["intervals"].filter(pc.equal(tables["intervals"]["epoch"], pa.scalar(epoch, pa.uint64())))
    step, cls, t0, t1, cpu = (
        np.asarray(rows[name].fill_null(0)).astype(np.int64) for name in ("step_id", "cls", "t0_ns", "t1_ns", "cpu_ns")
    )
    known = np.array(sorted(shapes), np.int64)
    at = np.searchsorted(known, step)
    inside = (at < len(known)) & (known[np.minimum(at, max(0, len(known) - 1))] == step) if len(known) else at < 0
    sums = {
        name: np.bincount(at[inside & kept], values[inside & kept], len(known))
        for name, kept, values in (
            ("core", np.isin(cls, _CORE), np.minimum(cpu, t1 - t0)),
            ("wall", np.isin(cls, _CORE), t1 - t0),
            ("sample", cls == IntervalClass.SAMPLE, t1 - t0),
        )
    }
    whole = np.flatnonzero(sums["core"] > 0)[:: max(1, int(np.count_nonzero(sums["core"]) / MOST_STEPS))]
    off = (sums["wall"] - sums["core"])[whole]
    columns = [np.full(len(whole), place), *np.array([shapes[int(step)] for step in known[whole]]).reshape(-1, 4).T]
    columns += [sums["core"][whole] / 1e3, off / 1e3, off * _queued(tables["health"], epoch, off) / 1e3]
    columns.append(sums["sample"][whole] / 1e3)
    return pa.table([np.rint(column).astype(np.int64) for column in columns], names=list(COLUMNS))


def _queued(health: pa.Table, epoch: int, off: NDArray[Any]) -> float:
    """Return the share of a rank's time off its core that the kernel says was spent waiting for one."""
    mine = health.filter(pc.equal(health["epoch"], pa.scalar(epoch, pa.uint64())))
    delays = np.asarray(mine["run_delay_ns"].fill_null(0))
    waited = float(delays.max() - delays.min()) if len(delays) else 0.0
    return min(1.0, waited / max(1.0, float(off.sum())))
