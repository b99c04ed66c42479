"""Reading a store: tables, rows, tensors, SQL. Never writes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

import pyarrow as pa

from insitu.config import load
from insitu.records import TABLES, schema_of
from insitu.segments.layout import FORMAT, OPEN, SEALED, SegmentName, list_segments, odd_segments
from insitu.segments.reader import Damage
from insitu.wire.address import SCHEMES
from insitu_collector.query.asked import Asked, Filters, Time, checked_query
from insitu_collector.rows.incomplete import IncompleteRows
from insitu_collector.tail import StoreTail, Tail

if TYPE_CHECKING:
    import altair as alt

    from insitu.exporters.base import Batch
    from insitu_collector.query.payloads import Payloads
    from insitu_collector.query.rows import Rows
    from insitu_collector.query.scan import Scan
    from insitu_collector.query.tensors import Ref, SiteTensor, Tensors
    from insitu_collector.verdicts.finding import Verdict
    from insitu_collector.views.stalls import Stalls

_log = logging.getLogger("insitu")
_MAJOR: Final = re.compile(r"v[1-9]\d*")


def open_store(path: str | os.PathLike[str]) -> Store:
    """Return the store at `path`, which may be written to meanwhile; `grpc://host:port` or `grpcs://...`: that of a
    collector there, which is shown the token that settings name.

    Raises FileNotFoundError, with one line for the user, when there is none, and ValueError for what is no path.
    """
    path = _path_of(path)
    scheme, _, rest = str(path).partition(":/")  # a Path has one slash
    if scheme in SCHEMES:
        from insitu_collector.query.remote import RemoteStore

        return RemoteStore(f"{scheme}://{rest.lstrip('/')}", load().credentials)
    root = Path(path)
    _check(root)
    store = Store(root)
    store.tell_odd_segments()
    return store


def _path_of(path: object) -> str | os.PathLike[str]:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or isinstance(os.fspath(path), bytes):
        raise ValueError(f"path: {path!r} is no folder of a store; write its path, or grpc://host:port of a collector")
    text = os.fspath(path)
    if isinstance(path, str) and text.startswith("file://"):  # as destinations are written
        return _path_of(text.removeprefix("file://"))
    if text.startswith("file:/"):
        raise ValueError(f"path: {text} has lost a slash; write the folder's path, without file://")
    return path


def _check(root: Path) -> None:
    if not (root / FORMAT).is_dir():
        inside = sorted(folder.parent for folder in root.glob(f"*/{FORMAT}") if folder.is_dir())
        if inside:
            newest = max(inside, key=lambda store: (store / FORMAT).stat().st_mtime_ns)
            raise FileNotFoundError(f"no store at {root}, but {len(inside)} in it; the newest is {newest}")
        later = [folder.name for folder in root.glob("v*") if _MAJOR.fullmatch(folder.name)]
        if later:
            raise FileNotFoundError(
                f"the store at {root} has format {max(later)}, and this reads {FORMAT}; update insitu"
            )
        raise FileNotFoundError(
            f"no store at {root}: expected a folder {FORMAT!r} in it, made by a probe or collector; "
            "`insitu demo` makes one"
        )


class Store:
    """The rows of all shards of a store, open and sealed. Every row once, every checksum compared."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        """What people call it."""
        self.damage: list[Damage] = []
        """What could not be read by the last call of `table`, `scan` or `sql`; it is left out, and logged once."""
        self.all_damage: set[Damage] = set()
        """What could not be read by any call so far."""
        self.hidden: Counter[tuple[str, int]] = Counter()
        """Rows by table and epoch that the last call of `table` or `scan` left out because they are erased."""
        self._incomplete = IncompleteRows(self.name)
        self._payloads: Payloads | None = None

    @property
    def num_damaged(self) -> int:
        """How many stretches could not be read by any call so far."""
        return len(self.all_damage)

    @property
    def incomplete(self) -> dict[str, int]:
        """Rows, by table, that were left out of any answer so far: they have no value where readers need one."""
        return dict(self._incomplete.num_rows)

    def check(self) -> None:
        """Raise, as `open_store` or a first question does, where the store cannot be read now."""
        _check(self.path)

    def tell_odd_segments(self) -> None:
        """Log what has a segment's name and is no file, and count it as damage: no reader looks at it."""
        for state in (OPEN, SEALED):
            for name in odd_segments(self.path, state):
                _log.warning(
                    "insitu: %s is no file and is left out; move it out of the store", name.path(self.path, state)
                )
                self.all_damage.add(Damage(name, 0, 0, torn=False))

    def close(self) -> None:
        """Let go of the connection, where there is one; from any thread: a question that waits for its answer fails."""

    def last_written_ns(self) -> int:
        """Return when a segment was last written, Unix time where the store is; 0 where none is there."""
        found = 0
        for state in (OPEN, SEALED):
            for name in list_segments(self.path, state):
                with contextlib.suppress(FileNotFoundError):  # sealed or expired since
                    found = max(found, name.path(self.path, state).stat().st_mtime_ns)
        return found

    def tables(self) -> list[str]:
        """Return the tables that have segments, in order of `insitu.records.TABLES`."""
        found = {name.table for state in (OPEN, SEALED) for name in list_segments(self.path, state)}
        return [table for table in TABLES if table in found]

    def table(self, name: str) -> pa.Table:
        """Return every row of a table as it is now, with today's columns. Raises KeyError for an unknown name."""
        tail = self.tail([name])
        rows = tail.poll(final=True).get(name, schema_of(name).empty_table())
        tail.close()
        self.damage, self.hidden = tail.damage, tail.hidden
        return rows

    def scan(self, name: str, since_unix_ns: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a table as they are now, a batch at a time: a few MiB are in memory, never the table.

        since_unix_ns: as of `tail`. Raises KeyError for an unknown name.
        """
        tail = self.tail([name], since_unix_ns)
        try:
            yield from tail.batches(name, final=True)
        finally:
            tail.close()
            self.damage, self.hidden = tail.damage, tail.hidden

    def sql(self, query: str) -> pa.Table:
        """Run one query of DuckDB, and return its rows; what it does not need is not read.

        Tables stand under their names, and with what their numbers mean in schema `named` (docs/query.md). Raises
        BadQuestion, a ValueError, with one line that says what is wrong with the query.
        """
        from insitu_collector.query.sql import run

        self.damage = []
        return run(self.reading(), checked_query(query))

    def tail(
        self,
        tables: Iterable[str] | None = None,
        since_unix_ns: int | None = None,
        skip: Callable[[SegmentName], bool] | None = None,
    ) -> Tail:
        """Return a reader whose first `poll` gives all rows there are, and each later one those that are new.

        since_unix_ns: leave out, of `TIME_TABLES` only, sealed segments that were last written before this time, so
        that a large store opens fast. Rows a little older than it may come all the same. skip: leave out the sealed
        segments of which this is true (`insitu_collector.keeping.catalog` knows what is in each).
        """
        tables = TABLES if tables is None else tables
        return StoreTail(self.path, tables, since_unix_ns, self.all_damage, skip, self._incomplete)

    def otlp(self, table: str, since_unix_ns: int | None = None) -> Iterator[Any]:
        """Yield the requests of OTLP that brought the rows of `spans`, `metrics` or `logs`, as they are now.

        Each is an Export...ServiceRequest of `opentelemetry.proto`. since_unix_ns: as of `tail`. Raises KeyError for
        another table.
        """
        from insitu_collector.otlp.reading import requests_of
        from insitu_collector.otlp.signals import signal_of

        return requests_of(signal_of(table), self.scan(table, since_unix_ns))

    # -- for notebooks: docs/export.md ---------------------------------------------------------------------------

    def stalls(self, run: str = "", replica: int | None = None) -> Stalls:
        """Return verdicts and ledger of the latest run (whose name begins with `run`); a notebook shows a card.

        replica: of this one alone; None: of the first, with the run's others in `.siblings`.
        Each of these raises LookupError, with one line for the user, where there is nothing to show.
        """
        from insitu_collector.views import notebook

        return notebook.stalls(self, run, replica)

    def verdicts(self, run: str = "") -> list[Verdict]:
        """Return what stands of a run, most severe first; a store that was never judged is judged here."""
        from insitu_collector.views import notebook

        return notebook.verdicts(self, run)

    # -- rows and tensors: docs/query.md -----------------------------------------------------------------------------

    def rows(
        self, table: str, t0: Time | None = None, t1: Time | None = None, run: str = "", **asked: Unpack[Filters]
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows of any table, a batch at a time, with what their numbers mean; asked for as captures are.

        Raises KeyError for an unknown table, BadQuestion (a ValueError), and NothingFound (a LookupError) for a run
        that is not there.
        """
        self.damage = []
        return self.reading().batches(table, Asked(t0=t0, t1=t1, run=run, **asked))

    def captures(
        self, t0: Time | None = None, t1: Time | None = None, run: str = "", **asked: Unpack[Filters]
    ) -> pa.Table:
        """Return captured rows, without their values: `tensor` reads those.

        t0, t1: of steps that began in [t0, t1), Unix ns or ISO 8601. run: the latest whose name begins so; "*": all.
        Further, each as far as it is said: replica, rank, stage; layer, site (a glob as rules have them); request;
        steps (one, or a range); columns (which, in this order: "data" is one). Raises as `rows`.
        """
        return self._table("captures", Asked(t0=t0, t1=t1, run=run, **asked))

    def summaries(
        self, t0: Time | None = None, t1: Time | None = None, run: str = "", **asked: Unpack[Filters]
    ) -> pa.Table:
        """Return summaries, asked for as captures are (of no request)."""
        return self._table("summaries", Asked(t0=t0, t1=t1, run=run, **asked))

    def intervals(
        self, t0: Time | None = None, t1: Time | None = None, run: str = "", **asked: Unpack[Filters]
    ) -> pa.Table:
        """Return the intervals that touch [t0, t1), with Unix times and ledger class; asked for as captures are."""
        from insitu_collector.query.intervals import with_classes

        self.damage = []
        return with_classes(self.reading(), Asked(t0=t0, t1=t1, run=run, **asked))

    def tensor(self, ref: Ref, *, run: str = "", torch: bool = False, **asked: Unpack[Filters]) -> Any:
        """Return captured values: of one row in its shape, or of a request at a site, [positions, width].

        ref: a row of `captures()`, or (request, site), or (request, site, step or range of positions). Values lie in
        the mapped segment where they can, and are copied otherwise. numpy has no bfloat16 and float8: they come as
        float32, or as they are with `torch`. Where only the largest values of a row were kept: values and places.
        Raises NothingFound, BadQuestion.
        """
        return self._tensors().tensor(ref, Asked(run=run, **asked), torch=torch)

    def tensors(
        self,
        request: str,
        site: str = "*",
        *,
        run: str = "",
        replica: int | None = None,
        rank: int | None = None,
        steps: int | range | None = None,
        torch: bool = False,
    ) -> dict[str, SiteTensor]:
        """Return what was captured of a request at each site that a glob means; tensor-parallel ranks put together.

        Each position is there once, of the last step that computed it; what is missing is said. With `rank`: what that
        one holds. Raises NothingFound, BadQuestion.
        """
        asked = Asked(request=request, site=site, run=run, replica=replica, rank=rank, steps=steps)
        return self._tensors().tensors(asked, torch=torch)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files by `rows`, `captures`, `sql` and the like so far; maps of tensors are not in it."""
        return self._scan.bytes_read

    def _table(self, table: str, asked: Asked) -> pa.Table:
        self.damage = []
        return self.reading().table(table, asked)

    def reading(self, tenant: str = "") -> Rows:
        """Return what answers questions about the store as it is now, as one tenant sees it; empty: all there is."""
        from insitu_collector.query.directory import Directory
        from insitu_collector.query.rows import Rows

        sources, clocks, sites = (self._whole(name) for name in ("sources", "clocks", "sites"))
        return Rows(self._scan, Directory(self.name, sources, clocks, sites, tenant))

    def _whole(self, table: str) -> pa.Table:
        return pa.Table.from_batches((batch.data for batch in self._scan.batches(table)), schema=schema_of(table))

    def _tensors(self) -> Tensors:
        from insitu_collector.query.payloads import Payloads
        from insitu_collector.query.tensors import Tensors

        self.damage = []
        if self._payloads is None:
            self._payloads = Payloads(self.path, self._scan)
        return Tensors(self.reading, self._payloads)

    @cached_property
    def _scan(self) -> Scan:
        from insitu_collector.query.scan import Scan

        return Scan(self.path, self._salvage, incomplete=self._incomplete)

    def _salvage(self, name: SegmentName, is_sealed: bool) -> list[Batch]:
        tail = StoreTail(self.path, [name.table], None, self.all_damage)
        batches = list(tail.read_segment(name, is_done=is_sealed, final=True))
        self.damage += tail.damage
        tail.close()
        return batches

    def statistics(
        self, t0: Time | None = None, t1: Time | None = None, run: str = "", *, by_step: bool = False
    ) -> pa.Table:
        """Return what the values at each site were like in sampled steps, one row a site (or a site and step)."""
        from insitu_collector.views import notebook

        return notebook.statistics(self, t0, t1, run, by_step=by_step)

    def plugin_statistics(
        self, name: str, t0: Time | None = None, t1: Time | None = None, run: str = "", *, by_step: bool = False
    ) -> pa.Table:
        """Return what another package's statistic tells of each site, as `statistics` does; the package is needed."""
        from insitu_collector.views import notebook

        return notebook.plugin_statistics(self, name, t0, t1, run, by_step=by_step)

    def experts(self, t0: Time | None = None, t1: Time | None = None, run: str = "") -> pa.Table:
        """Return how evenly each router spread its choices over experts, one row a router."""
        from insitu_collector.views import notebook

        return notebook.experts(self, t0, t1, run)

    def divergence(self, t0: Time | None = None, t1: Time | None = None, run: str = "") -> pa.Table:
        """Return whether ranks that hold a site whole held the same bits in sampled steps, one row a site."""
        from insitu_collector.views import notebook

        return notebook.divergence(self, t0, t1, run)

    def timeline(
        self,
        step: int | None = None,
        window: tuple[Time, Time] | None = None,
        run: str = "",
        replica: int | None = None,
    ) -> alt.LayerChart:
        """Return a chart of what each rank did around a step, in a window, or at the end of the traffic.

        replica: whose ranks; None: those of the run's first.
        """
        from insitu_collector.views import notebook

        return notebook.timeline(self, step, window, run, replica)

    def ledger_chart(self, run: str = "", replica: int | None = None) -> alt.LayerChart:
        """Return a chart of where each rank's time went, in a replica (None: the run's first)."""
        from insitu_collector.views import notebook

        return notebook.ledger_chart(self, run, replica)

    def latency_chart(self, run: str = "") -> alt.VConcatChart:
        """Return a chart of what requests felt, a time bucket at a time."""
        from insitu_collector.views import notebook

        return notebook.latency_chart(self, run)

    def perfetto(
        self,
        path: str | os.PathLike[str],
        window: tuple[Time, Time] | None = None,
        run: str = "",
        *,
        force: bool = False,
    ) -> Path:
        """Write a Perfetto trace to a file that does not exist (unless `force`), and return its path."""
        from insitu_collector.views import notebook

        return notebook.perfetto(self, Path(path), window, run, force=force)
