"""`insitu stalls STORE`: what was judged, and where each rank's time went, for people and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.cli import ExitCode, StorePath
from insitu.records import schema_of
from insitu.vocabulary import ERASED, EXPIRED
from insitu_collector.clocks.timeline import Timeline, numbers, timeline_of
from insitu_collector.evidence import Tables
from insitu_collector.judge.runs import replica_verdicts
from insitu_collector.ledger import bubble
from insitu_collector.ledger.bubble import Bubble
from insitu_collector.ledger.window import Ledger, rank_ledger
from insitu_collector.opening import opened
from insitu_collector.requests.records import records_of_tables
from insitu_collector.requests.report import NoSuchRequest, RequestReport, request_report
from insitu_collector.rows.row_maps import entries
from insitu_collector.rows.selection import NothingFound, chosen_replica
from insitu_collector.rows.slices import JUDGED, Group, Groups, replicas_of_latest
from insitu_collector.steps import delay_words
from insitu_collector.steps.delay_matrix import DelayMatrix
from insitu_collector.verdicts.finding import Verdict, num_revised
from insitu_collector.views.row_counts import gone_rows, missing_rows, stored_rows
from insitu_collector.views.stalls_words import to_json, to_text
from insitu_collector.whatif.changes import NoPrediction, parse_changes
from insitu_collector.whatif.report import Asked, Unrecorded, ask

if TYPE_CHECKING:
    from insitu_collector.store import Store


@dataclass(frozen=True, slots=True)
class Stalls:
    """What a store says of its latest run: of one replica, and beside it (`siblings`) of the others."""

    store: str
    run: str
    others: list[str]
    """The other runs with ranks in this store."""
    verdicts: list[Verdict]
    ledger: Ledger | None
    timeline: Timeline
    missing: dict[str, int]
    """Rows that are known to be missing, by reason."""
    stored: dict[str, int]
    """Rows of the run by table, counted by reading every segment."""
    expired: dict[str, int]
    """Rows of the run by table that were stored and have gone by age or size since."""
    erased: dict[str, int]
    """Rows of the run by table that were stored and were erased since: gone, or hidden until they are."""
    revised: int
    """Verdicts that were withdrawn."""
    prediction: Asked | str | None = None
    """What a change would do, or why it cannot be said; None where nobody asked."""
    delays: DelayMatrix | None = None
    """Rank by rank, where it was asked for."""
    bubbles: tuple[Bubble, ...] = ()
    """What each stage waited, and what the pipeline's shape makes unavoidable; none without a ledger."""
    requests: RequestReport | None = None
    """Where requests' time went; None where none is on record."""
    num_damaged: int = 0
    """Stretches of the store's files that could not be read, of whichever run they were."""
    replica: int = 0
    replicas: tuple[int, ...] = (0,)
    """All that the run has."""
    siblings: tuple[Stalls, ...] = ()
    """The same of the run's other replicas; none where one alone was asked for. What is of the run they say too."""

    def _repr_html_(self) -> str:
        from insitu_collector.views.card import card

        return card(self)

    @property
    def shown(self) -> tuple[Stalls, ...]:
        """This one and its siblings."""
        return (self, *self.siblings)

    @property
    def window_unix_ns(self) -> list[int] | None:
        if self.ledger is None:
            return None
        return [self.timeline.unix_ns(self.ledger.t0_ns), self.timeline.unix_ns(self.ledger.t1_ns)]


def traffic_window(tables: Tables) -> tuple[int, int] | None:
    """Return [first traffic step's begin, last traffic step's end) on the timeline of `sources`, or None without steps.

    Tables of one run and replica. Steps of warm-up are left out: those of `warmup-*` requests, and those before the
    `warmup_end` event.
    """
    clock = timeline_of(tables["sources"], tables.get("clocks"))
    steps, intervals = tables.get("steps"), tables.get("intervals")
    if steps is None or not steps.num_rows:
        return None
    first = steps.filter(pc.equal(steps["stage"], pc.min(steps["stage"])))
    begin = clock.moved(first, "t0_ns")
    lengths = np.asarray(pc.list_value_length(first["rows"]).fill_null(0)).astype(np.int64)
    warmup = np.bincount(np.repeat(np.arange(len(begin)), lengths), entries(first["rows"])["warmup"], len(begin)) > 0
    events = tables.get("events", schema_of("events").empty_table())
    ends = clock.moved(events.filter(pc.equal(events["kind"], "warmup_end")), "t_ns")
    traffic = ~warmup & (begin >= ends.max(initial=0))
    if not traffic.any():
        return None
    t0, t1 = int(begin[traffic].min()), int(begin[traffic].max()) + 1
    if intervals is not None and intervals.num_rows:
        of_traffic = np.isin(numbers(intervals, "step_id", -1), numbers(first, "step_id", -1)[traffic])
        t1 = max(t1, int(clock.moved(intervals, "t1_ns")[of_traffic].max(initial=t1)))
    return t0, t1


def stalls_of(
    store: Store,
    run: str = "",
    changes: Sequence[str] = (),
    *,
    matrix: bool = False,
    request: str = "",
    replica: int | None = None,
) -> Stalls | None:
    """Return what a store says of its latest run (of those whose name begins with `run`), or None when it has none.

    replica: of this one alone; raises NothingFound where the run has none such. None: of the first, with the others
    as its siblings.
    changes: what is to be predicted, as `insitu_collector.whatif.changes.parse_changes` reads it; raises NoPrediction
    (of several replicas each says why not instead).
    matrix: work out the delay matrix too. request: report on it in particular; raises NoSuchRequest where no replica
    that is shown knows it.
    """
    read = {name: store.table(name) for name in JUDGED}
    groups = Groups().sort(read)
    of_run = replicas_of_latest(groups, run)
    if not of_run:
        return None
    name, replicas = of_run[0][0], [number for _, number in of_run]
    shown = of_run if replica is None else [(name, chosen_replica(name, replicas, replica))]
    told = [Verdict.from_row(row) for row in store.table("verdicts").to_pylist()]
    whole = _of_run(store, groups, of_run, told, read["sources"])
    each = [
        _of_replica(
            replace(whole, verdicts=replica_verdicts(told, group, groups[group]), replica=group[1]),
            groups[group],
            prediction=_predicted(groups[group], changes, is_alone=len(shown) == 1) if changes else None,
            matrix=matrix,
            request=request,
        )
        for group in shown
    ]
    if request and all(found.requests is None or found.requests.asked is None for found in each):
        raise NoSuchRequest(f"no request {request!r} in this run")
    return replace(each[0], siblings=tuple(each[1:]))


def _of_run(
    store: Store,
    groups: Mapping[Group, dict[str, pa.Table]],
    of_run: Sequence[Group],
    told: Sequence[Verdict],
    sources: pa.Table,
) -> Stalls:
    """Return what is said of the run, whichever replica is shown; the first's timeline stands in."""
    run, first = of_run[0][0], groups[of_run[0]]
    empty = schema_of("health").empty_table()
    health = pa.concat_tables([groups[group].get("health", empty) for group in of_run])
    stored, hidden = stored_rows(store, run, sources)
    return Stalls(
        store=store.name,
        run=run,
        others=sorted({name for name, _ in groups} - {run}),
        verdicts=[],
        ledger=None,
        timeline=timeline_of(first["sources"], first.get("clocks")),
        missing=missing_rows({"health": health}, store.table("gaps")),
        stored=stored,
        expired=gone_rows(store, run, sources, EXPIRED),
        erased=dict(Counter(gone_rows(store, run, sources, ERASED)) + hidden),
        revised=num_revised(told, run),
        replicas=tuple(number for _, number in of_run),
        num_damaged=store.num_damaged,  # every segment was read by now
    )


def _of_replica(whole: Stalls, tables: Tables, *, prediction: Asked | str | None, matrix: bool, request: str) -> Stalls:
    clock = timeline_of(tables["sources"], tables.get("clocks"))
    window = traffic_window(tables)
    ledger = delays = None
    waited: tuple[Bubble, ...] = ()
    if window is not None:
        intervals, health = (tables.get(name, schema_of(name).empty_table()) for name in ("intervals", "health"))
        ledger = rank_ledger(intervals, health, tables["sources"], *window, clocks=tables.get("clocks"))
        waited = bubble.bubbles(ledger, bubble.mean_in_flight(intervals, clock, *window))
        delays = delay_words.matrix_of(intervals, tables["sources"], *window) if matrix else None
    return replace(
        whole,
        ledger=ledger,
        timeline=clock,
        prediction=prediction,
        delays=delays,
        bubbles=waited,
        requests=_requests(tables, request),
    )


def _requests(tables: Tables, request: str) -> RequestReport | None:
    records = records_of_tables(tables)
    try:
        return request_report(records, request)
    except NoSuchRequest:  # another replica may know it
        return request_report(records)


def _predicted(tables: Tables, changes: Sequence[str], *, is_alone: bool) -> Asked | str:
    try:
        return ask(tables, changes)
    except Unrecorded as error:
        return str(error)
    except NoPrediction as error:
        if is_alone:
            raise
        return f"nothing can be predicted: {error}"


@click.command()
@click.argument("store", type=StorePath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (insitu.stalls/1).")
@click.option("--run", default="", help="The run whose name begins so. [default: the one that began last]")
@click.option("--replica", type=click.IntRange(0), metavar="N", help="This replica of it alone. [default: each]")
@click.option(
    "--if",
    "changes",
    multiple=True,
    metavar="CHANGE",
    help="Predict a change: split=5,3, in-flight=3, speed=STAGE:FACTOR, speed=STAGE:-5ms or replace=RANK; "
    "several together.",
)
@click.option("--matrix", is_flag=True, help="Add the delay matrix: who delays whom, rank by rank.")
@click.option("--request", default="", metavar="ID", help="Say where this request's time went.")
@click.pass_context
def stalls(
    ctx: click.Context,
    store: Path,
    as_json: bool,
    run: str,
    replica: int | None,
    changes: tuple[str, ...],
    matrix: bool,
    request: str,
) -> None:
    """Say what limits the latest run in STORE, where ranks' and requests' time went, and what a change would do.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/query.md).

    \b
    insitu stalls ./insitu-store
    insitu stalls ./insitu-store --json | python -m json.tool
    insitu stalls ./insitu-store --if split=5,3 --if in-flight=3
    insitu stalls ./insitu-store --matrix
    insitu stalls ./insitu-store --replica 0
    """
    try:
        parse_changes(changes)
        with opened(store) as read:
            found = stalls_of(read, run, changes, matrix=matrix, request=request, replica=replica)
    except NoPrediction as error:
        raise click.UsageError(f"--if: {error}") from None
    except (NoSuchRequest, NothingFound) as error:
        raise click.ClickException(str(error)) from None
    if found is None and run:
        raise click.ClickException(f"the store {read.name} has no run {run!r}...; leave --run out to see which")
    if found is None:
        raise click.ClickException(
            f"the store {read.name} holds no record of any rank; attach a probe to a model first"
        )
    click.echo(json.dumps(to_json(found), indent=1) if as_json else to_text(found))
    if found.missing or found.num_damaged:
        ctx.exit(ExitCode.PARTIAL)
