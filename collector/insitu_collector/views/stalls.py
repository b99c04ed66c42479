"""`insitu stalls STORE`: what was judged, and where each rank's time went, for people and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.cli import ExitCode, StorePath
from insitu.records import schema_of
from insitu.segments.gaps import standing
from insitu.segments.layout import SEALED, list_segments
from insitu.vocabulary import ERASED, EXPIRED, NOT_LOST, DropReason
from insitu_collector.clocks.timeline import Timeline, numbers, timeline_of
from insitu_collector.evidence import Tables
from insitu_collector.judge.runs import final_verdicts
from insitu_collector.ledger import bubble
from insitu_collector.ledger import words as ledger_words
from insitu_collector.ledger.bubble import Bubble
from insitu_collector.ledger.window import Ledger, rank_ledger
from insitu_collector.opening import opened
from insitu_collector.requests import report as request_report
from insitu_collector.requests.records import records_of_tables
from insitu_collector.requests.report import NoSuchRequest, RequestReport
from insitu_collector.rows.row_maps import entries
from insitu_collector.rows.slices import JUDGED, Groups, latest
from insitu_collector.steps import delay_words
from insitu_collector.steps.delay_matrix import DelayMatrix
from insitu_collector.verdicts.finding import Verdict, num_revised
from insitu_collector.whatif.changes import NoPrediction, parse_changes
from insitu_collector.whatif.report import Asked, Unrecorded, ask

if TYPE_CHECKING:
    from insitu_collector.store import Store

SCHEMA: Final = "insitu.stalls/1"


@dataclass(frozen=True, slots=True)
class Stalls:
    """What a store says of its latest run."""

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

    def _repr_html_(self) -> str:
        from insitu_collector.views.card import card

        return card(self)

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
    store: Store, run: str = "", changes: Sequence[str] = (), *, matrix: bool = False, request: str = ""
) -> Stalls | None:
    """Return what a store says of its latest run (of those whose name begins with `run`), or None when it has none.

    changes: what is to be predicted, as `insitu_collector.whatif.changes.parse_changes` reads it; raises NoPrediction.
    matrix: work out the delay matrix too. request: report on it in particular; raises NoSuchRequest.
    """
    read = {name: store.table(name) for name in JUDGED}
    found = Groups().sort(read)
    group = latest(found, run)
    if group is None:
        return None
    tables = found[group]
    window = traffic_window(tables)
    ledger = delays = None
    waited: tuple[Bubble, ...] = ()
    if window is not None:
        intervals, health = (tables.get(name, schema_of(name).empty_table()) for name in ("intervals", "health"))
        ledger = rank_ledger(intervals, health, tables["sources"], *window, clocks=tables.get("clocks"))
        clock = timeline_of(tables["sources"], tables.get("clocks"))
        waited = bubble.bubbles(ledger, bubble.mean_in_flight(intervals, clock, *window))
        delays = delay_words.matrix_of(intervals, tables["sources"], *window) if matrix else None
    stored, hidden = stored_rows(store, group[0], read["sources"])
    erased = Counter(gone_rows(store, group[0], read["sources"], ERASED)) + hidden
    return Stalls(
        store=store.name,
        run=group[0],
        others=sorted({name for name, _ in found} - {group[0]}),
        verdicts=final_verdicts(store, group[0]),
        ledger=ledger,
        bubbles=waited,
        timeline=timeline_of(tables["sources"], tables.get("clocks")),
        missing=missing_rows(tables, store.table("gaps")),
        stored=stored,
        expired=gone_rows(store, group[0], read["sources"], EXPIRED),
        erased=dict(erased),
        revised=num_revised([Verdict.from_row(row) for row in store.table("verdicts").to_pylist()], group[0]),
        prediction=_predicted(tables, changes) if changes else None,
        delays=delays,
        requests=request_report.request_report(records_of_tables(tables), request),
        num_damaged=store.num_damaged,  # every segment was read by now
    )


def _predicted(tables: Tables, changes: Sequence[str]) -> Asked | str:
    try:
        return ask(tables, changes)
    except Unrecorded as error:
        return str(error)


def stored_rows(store: Store, run: str, sources: pa.Table) -> tuple[dict[str, int], Counter[str]]:
    """Return the rows of a run by table, read from every segment, and those of them that are erased and still there.

    Rows of no known run count too.
    """
    others = sources.filter(pc.not_equal(sources["run"], run))["epoch"]
    strangers = set(others.to_pylist())
    counted, hidden = {}, Counter[str]()
    for name in store.tables():
        rows = store.table(name)
        counted[name] = rows.num_rows - (pc.sum(pc.is_in(rows["epoch"], others)).as_py() or 0)
        hidden[name] += sum(num for (_, epoch), num in store.hidden.items() if epoch not in strangers)
    return counted, hidden


def gone_rows(store: Store, run: str, sources: pa.Table, why: str) -> dict[str, int]:
    """Return the rows of a run by table that have expired, or were erased (`why`).

    A file told to have gone may still be there: not counted.
    """
    epochs = set(sources.filter(pc.equal(sources["run"], run))["epoch"].to_pylist())
    there = {name.file for name in list_segments(store.path, SEALED)}
    gone: dict[tuple[str, int], tuple[str, int]] = {}
    for row in store.table("gaps").to_pylist():
        if row["reason"] == why and row["source_epoch"] in epochs and row["file"] not in there:
            gone[row["file"], row["source_epoch"]] = row["table"], row["num_rows"] or 0
    counted: dict[str, int] = {}
    for table, num_rows in gone.values():
        counted[table] = counted.get(table, 0) + num_rows
    return counted


def missing_rows(tables: Tables, gaps: pa.Table) -> dict[str, int]:
    """Return how many rows are known to be missing, by reason: dropped at a probe, or lost in the store."""
    missing: dict[str, int] = {}
    last: dict[int, dict[str, Any]] = {}
    health = tables.get("health", schema_of("health").empty_table())
    for row in health.select(["epoch", "t_ns", "dropped"]).to_pylist():
        if row["epoch"] not in last or row["t_ns"] >= last[row["epoch"]]["t_ns"]:
            last[row["epoch"]] = row
    drops = [(drop["reason"], drop["rows"]) for row in last.values() for drop in row["dropped"] or ()]
    lost = standing(gaps.to_pylist())
    drops += [(row["reason"] or str(DropReason.TORN_TAIL), row["num_rows"] or 0) for row in lost]
    for reason, num_rows in drops:
        if num_rows and reason not in NOT_LOST:
            missing[reason] = missing.get(reason, 0) + num_rows
    return missing


def to_json(found: Stalls) -> dict[str, Any]:
    """Return the document `insitu.stalls/1`."""
    rows = found.ledger.rows if found.ledger else ()
    return {
        "schema": SCHEMA,
        "store": found.store,
        "run": found.run,
        "other_runs": found.others,
        "verdicts": [{**verdict.to_json(), "state": verdict.state} for verdict in found.verdicts],
        "ledger_window_unix_ns": found.window_unix_ns,
        "ledger": [
            {"stage": r.stage, "rank": r.rank, "class": str(r.cls), "seconds": r.seconds, "on_rank": r.on_rank}
            for r in rows
        ],
        "overlap_ns": {str(rank): ns for rank, ns in found.ledger.overlap_ns.items()} if found.ledger else {},
        "unattributed_ns": {str(rank): ns for rank, ns in found.ledger.unattributed_ns.items()} if found.ledger else {},
        "bubble": [each.to_json() for each in found.bubbles],
        "missing": found.missing,
        "num_damaged": found.num_damaged,
        "records": {"stored": found.stored, "expired": found.expired, "erased": found.erased},
        "revised": found.revised,
        "prediction": found.prediction.to_json() if isinstance(found.prediction, Asked) else None,
        "no_prediction": found.prediction if isinstance(found.prediction, str) else None,
        "requests": None if found.requests is None else request_report.to_json(found.requests, found.timeline),
        **({} if found.delays is None else {"delay_matrix": delay_words.to_json(found.delays)}),
    }


def to_text(found: Stalls) -> str:
    """Return the same for people."""
    lines = [f"{found.store}, run {found.run}"]
    if found.others:
        lines.append(f"Other runs are in it too (--run): {', '.join(found.others[-5:])}")
    lines.append("")
    for verdict in found.verdicts:
        ended = " (it is over)" if verdict.state == "closed" else ""
        many = "request" if verdict.num_requests == 1 else "requests"
        requests = f" {verdict.num_requests} {many} affected." if verdict.num_requests else ""
        lines += [f"- {verdict.text}{ended}{requests}", f"  What helps: {verdict.remedy}"]
    if not found.verdicts:
        lines.append("No verdict: nothing was judged yet.")
    if found.prediction is not None:
        lines += ["", *(found.prediction.to_text() if isinstance(found.prediction, Asked) else [found.prediction])]
    if found.ledger is not None:
        lines += ["", *ledger_words.to_lines(found.ledger)]
    if words := bubble.to_lines(found.bubbles):
        lines += ["", *words]
    if found.requests is not None:
        lines += ["", *request_report.to_lines(found.requests)]
    if found.delays is not None:
        lines += ["", *delay_words.to_lines(found.delays)]
    if found.expired:
        lines += [
            "",
            f"{sum(found.expired.values())} older rows of this run have expired; what is said is of the rest.",
        ]
    if found.erased:
        lines += ["", f"{sum(found.erased.values())} rows of this run have been erased on demand."]
    if found.missing:
        counted = ", ".join(f"{rows} ({reason})" for reason, rows in sorted(found.missing.items()))
        lines += ["", f"The record is partial: rows missing: {counted}."]
    if found.num_damaged:
        stretches = "stretch" if found.num_damaged == 1 else "stretches"
        lines += ["", f"The record is partial: {found.num_damaged} {stretches} of the store's files cannot be read."]
    return "\n".join(lines)


@click.command()
@click.argument("store", type=StorePath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (insitu.stalls/1).")
@click.option("--run", default="", help="The run whose name begins so. [default: the one that began last]")
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
    ctx: click.Context, store: Path, as_json: bool, run: str, changes: tuple[str, ...], matrix: bool, request: str
) -> None:
    """Say what limits the latest run in STORE, where ranks' and requests' time went, and what a change would do.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/query.md).

    \b
    insitu stalls ./insitu-store
    insitu stalls ./insitu-store --json | python -m json.tool
    insitu stalls ./insitu-store --if split=5,3 --if in-flight=3
    insitu stalls ./insitu-store --matrix
    """
    try:
        parse_changes(changes)
        with opened(store) as read:
            found = stalls_of(read, run, changes, matrix=matrix, request=request)
    except NoPrediction as error:
        raise click.UsageError(f"--if: {error}") from None
    except NoSuchRequest as error:
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
