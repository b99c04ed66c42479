"""Rows of a store that are meant, with what their numbers mean beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu_collector.clocks.timeline import Int64, numbers
from insitu_collector.export.tables import UNIX_OF
from insitu_collector.query.asked import EVERY_RUN, Asked, BadQuestion
from insitu_collector.query.directory import OF_WHOM, SITE_COLUMNS, Directory
from insitu_collector.query.extents import Bools, Extents
from insitu_collector.query.pruning import MayHaveSteps, Wanted
from insitu_collector.query.scan import Keep, Scan
from insitu_collector.query.segment import PAYLOAD
from insitu_collector.rows.selection import BY_STEP, MONOTONIC, TIMED, UNIX
from insitu_collector.tail import TIME_TABLES

ABOUT_RUNS: Final = ("gaps", "verdicts", "incidents")
"""Whose rows others write: what says of whom they are is not `epoch`."""
_FOREVER: Final = -(2**62), 2**62


def named_schema(table: str) -> pa.Schema:
    """Return the columns that rows of a table are given with: who wrote them, its own, and Unix times.

    Of a row that names a site the name and what it is stand in place of the number; a row without a time has
    `unix_ns`, when its step began on its rank.
    """
    own = {each.name: each for each in schema_of(table)}
    first = [(name, kind) for name, kind in OF_WHOM if name not in own]
    fields = [pa.field(*each) for each in (*first[:2], ("rank", pa.int16()), ("stage", pa.int16()), *first[2:])]
    if names_sites(table):
        fields += [pa.field(*each) for each in SITE_COLUMNS]
    last = ("epoch", "row_seq")
    for name, each in own.items():
        if name not in (*(field.name for field in fields), *last):
            fields.append(pa.field(name, each.type))
            if name in UNIX_OF:
                fields.append(pa.field(UNIX_OF[name], pa.int64()))
    if table in BY_STEP:
        fields.append(pa.field("unix_ns", pa.int64()))
    return pa.schema([*fields, *(pa.field(name, own[name].type) for name in last)])


def names_sites(table: str) -> bool:
    """Return whether a row of a table says by number at which site it was."""
    schema = schema_of(table)
    return table != "sites" and "site" in schema.names and bool(pa.types.is_integer(schema.field("site").type))


class Rows:
    """Answers questions about one store, as one tenant sees it."""

    def __init__(self, scan: Scan, directory: Directory) -> None:
        self._scan = scan
        self.directory = directory

    def batches(self, table: str, asked: Asked) -> Iterator[pa.RecordBatch]:
        """Yield the rows that are meant, of one process at a time, in stored order; see `named_schema`.

        Raises BadQuestion, KeyError for an unknown table, NothingFound where there is no such run: before the first.
        """
        question = Question(self, table, asked)
        return (
            question.shaped(batch, rows) for batch in question.batches() if (rows := question.meant(batch)).num_rows
        )

    def table(self, table: str, asked: Asked) -> pa.Table:
        """Return the same as one table."""
        question = Question(self, table, asked)
        return pa.Table.from_batches(self.batches(table, asked), schema=question.schema)

    def stored_schema(self, table: str) -> pa.Schema:
        """Return the columns of `stored`. Raises KeyError for an unknown table."""
        return schema_of(table)

    def stored(
        self, table: str, since_unix_ns: int | None = None, hidden: Counter[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a table as they are stored, of every run.

        since_unix_ns: sealed segments last written well before may be left out, of tables that grow with time.
        hidden: counts the rows, by epoch, that are left out because they are erased.
        """
        every = Question(self, table, Asked(run=EVERY_RUN))
        wanted = Wanted(since_unix_ns=since_unix_ns if table in TIME_TABLES else None)
        erased = Counter[int]()
        for batch in self._scan.batches(table, every.keep, wanted, hidden=erased):
            rows = every.meant(batch)
            if rows.num_rows:
                yield rows
        if hidden is not None:
            hidden.update({epoch: num for epoch, num in erased.items() if self.directory.shows(epoch)})

    def scan(self, table: str, keep: Keep, wanted: Wanted, *, payload: bool) -> Iterator[Batch]:
        """Yield batches of the store that may hold what is meant."""
        return self._scan.batches(table, keep, wanted, payload=payload)


class Question:
    """One table, and which of its rows are meant."""

    def __init__(self, rows: Rows, table: str, asked: Asked) -> None:
        asked.check(table)
        self._rows = rows
        self._directory = rows.directory
        self.table = table
        self.asked = asked
        self.schema = asked_schema(table, asked)
        self._says_whose = table != "sources" and "tenant" in schema_of(table).names
        """Each row does: a collector writes what several sent by OTLP as its own."""
        of = None if self._is_of_no_epoch else self._directory.epochs(asked, rows_say_whose=self._says_whose)
        self._epochs = of
        self._run = self._directory.chosen_run(asked.run)
        self._begin, self._end = asked.window
        self._steps = asked.step_range
        own = () if names_sites(table) else tuple(schema_of(table).names)
        self._added = [name for name in self.schema.names if name not in own]
        self._needs_payload = PAYLOAD.get(table) in self.schema.names

    @property
    def _is_of_no_epoch(self) -> bool:
        return self.table in ABOUT_RUNS

    def batches(self, keep: Keep = Extents.all, may_have_steps: MayHaveSteps | None = None) -> Iterator[Batch]:
        """Yield the batches that may hold rows that are meant; the arguments: and what else is said of them."""
        return self._rows.scan(
            self.table,
            lambda extents: self.keep(extents) & keep(extents),
            self._wanted(may_have_steps),
            payload=self._needs_payload,
        )

    def _wanted(self, may_have_steps: MayHaveSteps | None) -> Wanted:
        begin, end = (self._begin, self._end) if self.table in TIMED else (None, None)
        moved_ns = None
        if (begin, end) != (None, None) and self.table not in BY_STEP:
            moved_ns = self._directory.moved_ns(self._epochs) if self.table in MONOTONIC else (0, 0)
        return Wanted(self._epochs, begin, end, moved_ns, self._hull_of_steps, may_have_steps)

    @cached_property
    def _hull_of_steps(self) -> range | None:
        """From the first to the last step that is meant; of a table without times, of those that began in the window.
        None: any."""
        if (self._begin, self._end) == (None, None) or self.table not in BY_STEP:
            return self._steps
        found = [steps for steps in self._steps_inside.values() if len(steps)]
        if not found:
            return range(0)
        first, last = min(int(steps[0]) for steps in found), max(int(steps[-1]) for steps in found)
        meant = range(first, last + 1) if self._steps is None else self._steps
        return range(max(first, meant.start), min(last + 1, meant.stop))

    def meant(self, batch: Batch) -> pa.RecordBatch:
        """Return the rows of a batch that are meant, as they are stored."""
        data = batch.data
        mask = self._whose(batch) & self._touches(batch)
        if self._steps is not None:
            step = numbers(data, "step_id", -1)
            mask &= (step >= self._steps.start) & (step < self._steps.stop)
        if self.asked.row_seqs is not None:
            mask &= np.isin(np.asarray(data["row_seq"]), np.array(self.asked.row_seqs, np.int64))
        sites = self._directory.sites(batch.epoch, self.asked)
        if sites is not None:
            number = numbers(data, "site", -1)
            mask &= sites[np.where((number >= 0) & (number < len(sites)), number, -1)]  # the last is nobody's
        if self.asked.request is not None:
            mask &= np.asarray(pc.fill_null(pc.equal(data["request"], self.asked.request), False))
        return data if mask.all() else data.filter(pa.array(mask))

    def shaped(self, batch: Batch, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return rows of a batch with the columns that were asked for."""
        names = self.schema.names
        found = self._directory.named(self._added, rows, batch.epoch)
        for own, unix in UNIX_OF.items():
            if unix in names and own in rows.schema.names:
                found[unix] = self._unix(rows, own, batch.epoch)
        if "unix_ns" in names and self.table in BY_STEP:
            found["unix_ns"] = self._begun(numbers(rows, "step_id", -1), batch.epoch)
        columns = [found[name] if name in found else rows[name] for name in names]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    # -- which batches -------------------------------------------------------------------------------------------

    def keep(self, extents: Extents) -> Bools:
        """Return which batches may hold rows that are meant."""
        found = extents.all()
        if self._epochs is not None:
            found &= np.isin(extents.epoch, np.array(sorted(self._epochs), np.uint64))
        if self._steps is not None:
            found &= extents.touching("step_id", self._steps.start, self._steps.stop - 1)
        if self.asked.row_seqs:
            found &= extents.touching("row_seq", min(self.asked.row_seqs), max(self.asked.row_seqs))
        if self.asked.request is not None:
            found &= extents.naming(self.asked.request)
        for epoch in np.unique(extents.epoch[found]).tolist():
            mine = extents.epoch == np.uint64(epoch)
            found &= ~mine | self._may_be_meant(extents, epoch)
        return found

    def _may_be_meant(self, extents: Extents, epoch: int) -> Bools:
        found = extents.all()
        sites = self._directory.sites(epoch, self.asked)
        if sites is not None:
            meant = np.flatnonzero(sites)
            found &= extents.touching("site", int(meant[0]), int(meant[-1])) if len(meant) else ~found
        if self._begin is None and self._end is None:
            return found
        if self.table in BY_STEP:
            return found & self._has_step(extents, epoch)
        return found & self._touches_window(extents, epoch)

    def _has_step(self, extents: Extents, epoch: int) -> Bools:
        steps = self._steps_inside.get(self._group(epoch), np.zeros(0, np.int64))
        low, high = extents.low("step_id"), extents.high("step_id")
        found: Bools = np.searchsorted(steps, low, "left") < np.searchsorted(steps, high, "right")
        return found

    def _touches_window(self, extents: Extents, epoch: int) -> Bools:
        first, last = MONOTONIC.get(self.table) or UNIX.get(self.table, ("", ""))
        if first not in extents.columns:
            return extents.all()
        low, high, slack = extents.low(first), extents.high(last), 0
        known = low <= high
        if self.table in MONOTONIC:
            unix = [self._directory.unix_ns(np.where(known, each, 0), epoch) for each in (low, high)]
            if unix[0] is None or unix[1] is None:
                return ~known & known
            low, high, slack = unix[0], unix[1], self._directory.slack_ns(epoch)
        since, until = self._window
        found: Bools = known & (high + slack >= since) & (low - slack < until)
        return found

    @property
    def _window(self) -> tuple[int, int]:
        return (
            _FOREVER[0] if self._begin is None else self._begin,
            _FOREVER[1] if self._end is None else self._end,
        )

    # -- which rows ----------------------------------------------------------------------------------------------

    def _whose(self, batch: Batch) -> Bools:
        if not self._is_of_no_epoch:
            mine = self._epochs is None or batch.epoch in self._epochs
            found = np.full(batch.num_rows, mine)
            return found & self._of_tenant(batch) if self._says_whose and self._directory.tenant else found
        if self._run == EVERY_RUN and not self._directory.tenant:
            return np.ones(batch.num_rows, bool)
        return np.asarray(_of_runs(self.table, batch.data, self._runs, self._directory))

    def _of_tenant(self, batch: Batch) -> Bools:
        is_theirs = pc.equal(batch.data["tenant"], self._directory.tenant)
        return np.asarray(pc.fill_null(is_theirs, False))

    @cached_property
    def _runs(self) -> set[str]:
        return self._directory.runs if self._run == EVERY_RUN else {self._run}

    def _touches(self, batch: Batch) -> Bools:
        every = np.ones(batch.num_rows, bool)
        if self._begin is None and self._end is None:
            return every
        if self.table in BY_STEP:
            steps = self._steps_inside.get(self._group(batch.epoch), np.zeros(0, np.int64))
            return np.isin(numbers(batch.data, "step_id", -1), steps)
        if self.table in MONOTONIC:
            unix = [self._directory.unix_ns(numbers(batch.data, c, 0), batch.epoch) for c in MONOTONIC[self.table]]
            begin, end = unix
            if begin is None or end is None:
                return ~every
        elif self.table in UNIX:
            begin, end = (numbers(batch.data, column, 0) for column in UNIX[self.table])
        else:
            return every
        since, until = self._window
        found: Bools = (end >= since) & (begin < until)
        return found

    def _group(self, epoch: int) -> tuple[str, int]:
        process = self._directory.processes.get(epoch)
        return ("", 0) if process is None else process.group

    @cached_property
    def _steps_inside(self) -> dict[tuple[str, int], Int64]:
        """Replica -> steps that began in the window on any of its ranks, sorted."""
        found: dict[tuple[str, int], list[Int64]] = {}
        for epoch, steps, _ in self._steps_begun(Asked(t0=self._begin, t1=self._end, run=self.asked.run)):
            found.setdefault(self._group(epoch), []).append(steps)
        return {group: np.unique(np.concatenate(parts)) for group, parts in found.items()}

    # -- times of steps ------------------------------------------------------------------------------------------

    def _steps_begun(self, asked: Asked) -> Iterator[tuple[int, Int64, Int64]]:
        """Yield epoch, steps and when they began (Unix ns) of steps that are meant."""
        question = Question(self._rows, "steps", asked)
        for batch in question.batches():
            rows = question.meant(batch)
            unix = self._directory.unix_ns(numbers(rows, "t0_ns", 0), batch.epoch)
            if rows.num_rows and unix is not None:
                yield batch.epoch, numbers(rows, "step_id", -1), unix

    @cached_property
    def _begins(self) -> dict[int, tuple[Int64, Int64]]:
        """Epoch -> its steps, sorted, and when they began."""
        asked, found = self.asked, dict[int, list[tuple[Int64, Int64]]]()
        meant = self._hull_of_steps
        of = Asked(run=asked.run, replica=asked.replica, rank=asked.rank, stage=asked.stage, steps=meant)
        for epoch, steps, unix in self._steps_begun(of):
            found.setdefault(epoch, []).append((steps, unix))
        joined = {epoch: tuple(map(np.concatenate, zip(*parts, strict=True))) for epoch, parts in found.items()}
        order = {epoch: np.argsort(steps, kind="stable") for epoch, (steps, _) in joined.items()}
        return {epoch: (steps[order[epoch]], unix[order[epoch]]) for epoch, (steps, unix) in joined.items()}

    def _begun(self, steps: Int64, epoch: int) -> pa.Array:
        known, unix = self._begins.get(epoch, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
        if not len(known):
            return pa.nulls(len(steps), pa.int64())
        place = np.clip(np.searchsorted(known, steps), 0, len(known) - 1)
        return pa.array(unix[place], pa.int64(), mask=known[place] != steps)

    def _unix(self, rows: pa.RecordBatch, column: str, epoch: int) -> pa.Array:
        unix = self._directory.unix_ns(numbers(rows, column, 0), epoch)
        if unix is None:
            return pa.nulls(rows.num_rows, pa.int64())
        return pa.array(unix, pa.int64(), mask=np.asarray(pc.is_null(rows[column])))


def _of_runs(table: str, rows: pa.RecordBatch, runs: set[str], directory: Directory) -> NDArray[Any]:
    """Return which rows are of some runs, of a table whose rows others write about them."""
    if table == "incidents":
        return np.asarray(pc.fill_null(pc.is_in(rows["run"], pa.array(sorted(runs), pa.utf8())), False))
    if table == "gaps":
        mine = [epoch for epoch, process in directory.processes.items() if process.run in runs]
        return np.asarray(pc.is_in(rows["source_epoch"], pa.array(mine, pa.uint64())))
    prefixes = [name.partition("-")[0].partition(".")[0] for name in rows["verdict"].to_pylist()]
    return np.array([any(run.startswith(prefix) for run in runs) for prefix in prefixes], bool)


def asked_schema(table: str, asked: Asked) -> pa.Schema:
    """Return the columns that are asked for. Raises BadQuestion where one is not there."""
    every = named_schema(table)
    if asked.columns is None:
        return pa.schema([each for each in every if each.name != PAYLOAD.get(table)])
    unknown = [name for name in asked.columns if name not in every.names]
    if unknown or not asked.columns:
        what = f"no column {unknown[0]!r}" if unknown else "no column is asked for"
        raise BadQuestion(f"{what}; those of {table} are {', '.join(every.names)}")
    return pa.schema([every.field(name) for name in dict.fromkeys(asked.columns)])
