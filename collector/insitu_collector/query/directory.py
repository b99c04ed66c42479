"""Who wrote a row and what its numbers mean: runs, places, clocks, names of sites. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.rules.rule import matches
from insitu.vocabulary import Role
from insitu_collector.clocks.timeline import Int64, Timeline, timeline_of
from insitu_collector.query.asked import EVERY_RUN, Asked
from insitu_collector.rows.selection import NothingFound, no_run
from insitu_collector.rows.slices import Groups, latest

SITE_COLUMNS: Final = (("site", pa.utf8()), ("layer", pa.int16()), ("shard", pa.utf8()), ("axis", pa.utf8()))
"""What is said of a row's site instead of its number."""
OF_WHOM: Final = (("run", pa.utf8()), ("replica", pa.int16()), ("tp_rank", pa.int16()))
"""What is said of a row's writer beside `epoch`, `rank` and `stage`."""


@dataclass(frozen=True, slots=True)
class Process:
    """One row of `sources`, as far as questions go."""

    epoch: int
    run: str
    is_rank: bool
    replica: int
    rank: int
    stage: int
    tp_rank: int | None
    tenant: str
    unix_minus_mono_ns: int
    """As its own anchors have it."""

    @property
    def group(self) -> tuple[str, int]:
        """Whose steps count alike: those of one replica of one run."""
        return self.run, self.replica


class Directory:
    """The processes of a store, by epoch. allowed: of which tenant; empty: of all of them."""

    def __init__(self, store: str, sources: pa.Table, clocks: pa.Table, sites: pa.Table, tenant: str = "") -> None:
        """store: what people call it."""
        self._store = store
        self.tenant = tenant
        """Whose rows are shown; rows of no known process are shown to nobody in particular. Empty: everybody's."""
        self._everybody = {row["epoch"]: _process(row) for row in sources.to_pylist()}
        if tenant:
            sources = sources.filter(_of_tenant(sources, tenant))
        self._sources = sources
        self._clocks = clocks
        self._clock_of: dict[str, Timeline] = {}
        self._sites = _Sites(sites)
        self.processes = {epoch: each for epoch, each in self._everybody.items() if tenant in ("", each.tenant)}

    def shows(self, epoch: int) -> bool:
        """Return whether all rows of a process are shown, known to anybody or not."""
        return not self.tenant or epoch in self.processes

    @property
    def runs(self) -> set[str]:
        """Every run there is."""
        return {process.run for process in self.processes.values()}

    def chosen_run(self, run: str) -> str:
        """Return the run that is meant; `*` stays what it is. Raises NothingFound where there is none."""
        if run == EVERY_RUN:
            return run
        found = Groups().sort({"sources": self._sources})
        group = latest(found, run)
        if group is None:
            raise NothingFound(no_run(self._store, run, found))
        return group[0]

    def epochs(self, asked: Asked, *, rows_say_whose: bool = False) -> frozenset[int] | None:
        """Return whose rows are meant; None: anybody's, known or not. Raises NothingFound for a run that is not.

        rows_say_whose: of a table that says of each row whose it is, whoever wrote it.
        """
        run = self.chosen_run(asked.run)
        places = {"replica": asked.replica, "rank": asked.rank, "stage": asked.stage, "epoch": asked.epoch}
        said = {name: value for name, value in places.items() if value is not None}
        is_open = not self.tenant or rows_say_whose
        if run == EVERY_RUN and not said and is_open:
            return None
        return frozenset(
            process.epoch
            for process in (self._everybody if is_open else self.processes).values()
            if run in (EVERY_RUN, process.run) and all(getattr(process, name) == value for name, value in said.items())
        )

    def sources(self, run: str) -> pa.Table:
        """Return what the processes of a run said of themselves."""
        return self._sources.filter(pc.equal(self._sources["run"], run))

    def clock(self, run: str) -> Timeline:
        """Return the one clock of a run's rows."""
        if run not in self._clock_of:
            self._clock_of[run] = timeline_of(self.sources(run), self._clocks)
        return self._clock_of[run]

    def unix_ns(self, t_ns: Int64, epoch: int) -> Int64 | None:
        """Return times of one process's own clock as Unix times; None where nobody knows the process."""
        process = self.processes.get(epoch)
        if process is None:
            return None
        clock = self.clock(process.run)
        return clock.times(t_ns, np.full(len(t_ns), epoch, np.uint64)) + np.int64(clock.unix_minus_mono_ns)

    def moved_ns(self, epochs: Iterable[int] | None) -> tuple[int, int]:
        """Return by how much, least and most, `unix_ns` is later than what processes' own anchors say; None: of all."""
        found = [(0, 0)]
        for epoch in self.processes if epochs is None else epochs:
            process = self.processes[epoch]
            clock = self.clock(process.run)
            ahead = clock.measured.get(clock.boots.get(epoch, ""))
            base = clock.unix_minus_mono_ns - process.unix_minus_mono_ns
            if ahead is None:
                found.append((base + clock.offset_ns.get(epoch, 0),) * 2)
            else:
                found.append((base - int(ahead.ns.max()), base - int(ahead.ns.min())))
        return min(least for least, _ in found), max(most for _, most in found)

    def slack_ns(self, epoch: int) -> int:
        """Return how far out of order two times of a process may come on the one clock: by the jumps of its own."""
        process = self.processes[epoch]
        clock = self.clock(process.run)
        ahead = clock.measured.get(clock.boots.get(epoch, ""))
        return 0 if ahead is None else int(np.abs(ahead.jumps).sum()) + 1_000_000

    def sites(self, epoch: int, asked: Asked) -> NDArray[np.bool_] | None:
        """Return which site numbers of a process are meant, by number; None: all of them."""
        if asked.layer is None and asked.site is None:
            return None
        return self._sites.that(epoch, lambda site: _is_meant(site, asked))

    def named(self, columns: Iterable[str], rows: pa.RecordBatch, epoch: int) -> dict[str, pa.Array]:
        """Return those of some columns that say of whom rows of one process are, and of which site."""
        found: dict[str, pa.Array] = {}
        process = self.processes.get(epoch)
        for name, kind in OF_WHOM:
            if name in columns:
                found[name] = pa.repeat(pa.scalar(None if process is None else getattr(process, name), kind), len(rows))
        for name, kind in SITE_COLUMNS:
            if name in columns:
                found[name] = self._sites.column(epoch, name, kind).take(self._sites.places(epoch, rows["site"]))
        return found


class _Sites:
    """Rows of `sites` by process and number; of several the last with a type, which is the one that fired."""

    def __init__(self, sites: pa.Table) -> None:
        self._of: dict[int, dict[int, dict[str, Any]]] = {}
        self._columns: dict[tuple[int, str], pa.Array] = {}
        for row in sites.sort_by("row_seq").to_pylist():
            mine = self._of.setdefault(row["epoch"], {})
            if row["dtype"] is not None or row["site"] not in mine:
                mine[row["site"]] = row

    def that(self, epoch: int, is_meant: Callable[[dict[str, Any]], bool]) -> NDArray[np.bool_]:
        mine = self._of.get(epoch, {})
        found = np.zeros(max(mine, default=-1) + 2, bool)
        found[[number for number, site in mine.items() if is_meant(site)]] = True
        return found

    def places(self, epoch: int, numbers: pa.Array) -> pa.Array:
        """Return the place of each number in the columns of `column`; that of a null where nobody told of the site."""
        most = max(self._of.get(epoch, {}), default=-1) + 1
        return pc.min_element_wise(pc.fill_null(numbers.cast(pa.int64()), most), most)

    def column(self, epoch: int, name: str, kind: pa.DataType) -> pa.Array:
        key = epoch, name
        if key not in self._columns:
            mine = self._of.get(epoch, {})
            said = "name" if name == "site" else name
            values = [mine.get(number, {}).get(said) for number in range(max(mine, default=-1) + 2)]
            self._columns[key] = pa.array(values, kind)
        return self._columns[key]


def _process(row: dict[str, Any]) -> Process:
    return Process(
        row["epoch"],
        row["run"] or "",
        row["role"] == Role.RANK,
        row["replica"] or 0,
        row["rank"],
        row["stage"],
        row["tp_rank"],
        row.get("tenant") or "",
        (row["unix_anchor_ns"] or 0) - (row["mono_anchor_ns"] or 0),
    )


def _of_tenant(sources: pa.Table, tenant: str) -> pa.Array:
    if "tenant" not in sources.column_names:
        return pa.array(np.zeros(sources.num_rows, bool))
    return pc.fill_null(pc.equal(sources["tenant"], tenant), False)


def _is_meant(site: dict[str, Any], asked: Asked) -> bool:
    if asked.layer is not None and site["layer"] != asked.layer:
        return False
    module = site["fqn"] if site["io"] == "out" and not site["index"] else None
    return asked.site is None or matches(asked.site, site["name"] or "", module)
