"""`insitu incidents STORE [ID]`: what flight recorders shipped, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import pyarrow as pa

from insitu.cli import ExitCode, StorePath
from insitu_collector.flight.records import Answer, FlightIncident, incidents_of
from insitu_collector.opening import opened
from insitu_collector.rows.selection import Selection, as_time

if TYPE_CHECKING:
    from insitu_collector.store import Store

SCHEMA: Final = "insitu.incidents/1"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds of one site and rank in the window of an incident, whoever asked for it."""

    table: str
    rank: int
    site: str
    num_rows: int
    first_step_id: int
    last_step_id: int

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def incidents_in(store: Store, run: str = "") -> list[FlightIncident]:
    """Return the incidents of a store, of the runs whose name begins with `run`, the first trigger first."""
    found = incidents_of(store.table("incidents"), store.table("sources"))
    return [incident for incident in found if incident.run.startswith(run)]


def stored_of(store: Store, incident: FlightIncident) -> list[Stored]:
    """Return what the store holds of an incident's window, by table, rank and site."""
    begin, end = incident.window_unix_ns
    chosen = Selection(store, incident.run, (begin, end + 1))
    names = {(r["epoch"], r["site"]): r["name"] for r in store.table("sites").select(_NAMES).to_pylist()}
    found = []
    for table in ("captures", "summaries"):
        rows = chosen.rows(table)
        for group in _by_site(rows).to_pylist():
            site = names.get((group["epoch"], group["site"]), f"site {group['site']}")
            steps = group["step_id_min"], group["step_id_max"]
            found.append((group["site"], Stored(table, group["rank"], site, group["step_id_count"], *steps)))
    return [stored for _, stored in sorted(found, key=lambda each: (each[1].table, each[1].rank, each[0]))]


_NAMES: Final = ["epoch", "site", "name"]


def _by_site(rows: pa.Table) -> pa.Table:
    return rows.group_by(["epoch", "rank", "site"]).aggregate(
        [("step_id", "count"), ("step_id", "min"), ("step_id", "max")]
    )


def to_json(store: Store, incidents: list[FlightIncident], stored: list[Stored] | None = None) -> dict[str, Any]:
    """Return the document `insitu.incidents/1`."""
    document = {
        "schema": SCHEMA,
        "store": store.name,
        "incidents": [incident.to_json() for incident in incidents],
    }
    return document if stored is None else document | {"stored": [each.to_json() for each in stored]}


def to_text(store: Store, incidents: list[FlightIncident]) -> str:
    """Return the list for people."""
    if not incidents:
        return f"no incident in {store.name}: no flight recorder was triggered (docs/probe.md)"
    return "\n".join(f"{each.incident}  {as_time(each.trigger_unix_ns)}  {each.sentence()}" for each in incidents)


def one_to_text(store: Store, incident: FlightIncident, stored: list[Stored]) -> str:
    """Return one incident for people."""
    begin, end = incident.window_unix_ns
    lines = [f"incident {incident.incident}, run {incident.run}", incident.sentence(), ""]
    lines.append(f"window   {as_time(begin)} to {as_time(end)}, triggered {as_time(incident.trigger_unix_ns)}")
    lines += [f"rank {answer.rank:<4}{_answer_text(answer)}" for answer in incident.answers]
    lines += [f"rank {rank:<4}of replica {replica} has not answered" for replica, rank in incident.missing]
    if incident.parts:
        lines.append(f"other ranks opened {', '.join(incident.parts)} in the same stretch: part of this one")
    if incident.num_suppressed:
        lines.append(f"{incident.num_suppressed} triggers of this kind opened no incident before it")
    lines += ["", f"insitu export {store.name} --to perfetto --from {as_time(begin)} --until {as_time(end)}"]
    if stored:
        lines += ["", "in the store, of steps that began in the window:"]
        width = max(len(each.site) for each in stored)
        lines += [
            f"  {each.table:<10} rank {each.rank:<3} {each.site:<{width}} {each.num_rows:>9} rows, "
            f"steps {each.first_step_id} to {each.last_step_id}"
            for each in stored
        ]
    return "\n".join(lines)


def _answer_text(answer: Answer) -> str:
    if answer.since_unix_ns is None:
        said = "held nothing of it"
    else:
        said = f"steps {answer.first_step_id} to {answer.last_step_id}, {answer.num_summaries} canaries"
    if answer.num_full_steps:
        said += f", {answer.num_captures} rows of {answer.num_full_steps} steps"
        if answer.rows_since_unix_ns is not None:
            said += f" from {as_time(answer.rows_since_unix_ns)}"
    if answer.num_steps_without_rows:
        said += f"; of {answer.num_steps_without_rows} steps no rows were held"
    if answer.num_further:
        more = f"{'; ...' if answer.num_further > len(answer.further) else ''}"
        said += f"; meanwhile also {'; '.join(answer.further)}{more}"
    return said


@click.command()
@click.argument("store", type=StorePath())
@click.argument("incident", required=False, metavar="[ID]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (insitu.incidents/1).")
@click.option("--run", default="", help="Only of runs whose name begins so.")
@click.pass_context
def incidents(ctx: click.Context, store: Path, incident: str | None, as_json: bool, run: str) -> None:
    """List what flight recorders shipped into STORE, or show the incident whose id begins with ID.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/query.md).
    Exit status 5 where a rank of the incident that is shown has not answered.

    \b
    insitu incidents ./insitu-store
    insitu incidents ./insitu-store --json | python -m json.tool
    """
    with opened(store) as read:
        found = incidents_in(read, run)
        if incident is None:
            click.echo(json.dumps(to_json(read, found), indent=1) if as_json else to_text(read, found))
            return
        chosen = _one(found, incident)
        stored = stored_of(read, chosen)
        if as_json:
            click.echo(json.dumps(to_json(read, [chosen], stored), indent=1))
        else:
            click.echo(one_to_text(read, chosen, stored))
    if chosen.missing:
        ctx.exit(ExitCode.PARTIAL)


def _one(found: list[FlightIncident], name: str) -> FlightIncident:
    chosen = [each for each in found if each.incident.startswith(name) or name in each.parts]
    if len(chosen) == 1:
        return chosen[0]
    known = ", ".join(each.incident for each in found[-5:]) or "none"
    how = "no incident" if not chosen else f"{len(chosen)} incidents"
    raise click.ClickException(f"{how} {name!r}...; there are {known}")
