"""`insitu export STORE`: a run, or a window of it, in formats other programs read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from insitu.cli import ExitCode, StorePath
from insitu.records import TABLES
from insitu_collector.export.captured import ARRAYS, missing_of, write_arrays
from insitu_collector.export.outputs import whole
from insitu_collector.opening import opened
from insitu_collector.rows.selection import TIMED, NothingFound, Selection, as_time, select, time_of
from insitu_collector.views.row_counts import missing_rows

if TYPE_CHECKING:
    from insitu_collector.export.trace import Trace

SCHEMA: Final = "insitu.export/1"
TRACES: Final = {"perfetto": ".pftrace", "chrome": ".json"}
"""Formats that hold one trace, and how its file is called."""
FILES: Final = ("csv", "arrow", "parquet")
"""Formats that hold a file a table."""
FORMATS: Final = (*TRACES, *FILES, *ARRAYS)
EASY_SLICES: Final = 200_000
"""Perfetto's page is at ease with this many slices."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    run: str
    to: str
    out: Path
    window_unix_ns: tuple[int | None, int | None]
    files: list[dict[str, Any]] = field(default_factory=list)
    """`path`, `bytes`, and of tables `table` and `rows`, of traces `slices` and `flows`, of arrays `arrays`."""
    notes: list[str] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    """Rows of the run that are known to be missing, by reason."""

    def to_json(self, store: str) -> dict[str, Any]:
        """Return the document `insitu.export/1`."""
        return {
            "schema": SCHEMA,
            "store": store,
            "run": self.run,
            "to": self.to,
            "out": str(self.out),
            "window_unix_ns": self.window_unix_ns,
            "files": self.files,
            "notes": self.notes,
            "missing": self.missing,
        }


def export_trace(chosen: Selection, to: str, out: Path, *, force: bool = False) -> Exported:
    """Write a trace (`perfetto` or `chrome`) to a file.

    Raises NothingFound when the window holds nothing, OSError when the file cannot be written, ModuleNotFoundError
    without the package a format needs.
    """
    from insitu_collector.export.build import trace_of

    if to == "perfetto":
        from insitu_collector.export.perfetto import write_perfetto as write
    else:
        from insitu_collector.export.chrome import write_chrome as write
    with whole(out, force=force) as part, part.open("wb") as file:
        trace = trace_of(chosen)
        if not trace.processes or not any(process.tracks for process in trace.processes):
            raise _nothing(chosen)
        write(trace, file)
    size = out.stat().st_size
    told = [{"path": str(out), "bytes": size, "slices": trace.num_slices, "flows": trace.num_flows}]
    return _exported(chosen, to, out, told, _notes(chosen, trace))


def export_tables(chosen: Selection, to: str, out: Path, tables: list[str], *, force: bool = False) -> Exported:
    """Write tables into a folder, a file each (`csv`, `arrow`, `parquet`). Raises as `export_trace` does."""
    from insitu_collector.export.tables import write_table

    files: list[dict[str, Any]] = []
    with whole(out, folder=True, force=force) as part:
        for table in tables:
            path = part / f"{table}.{to}"
            rows = write_table(chosen, table, path, to)
            told = {"path": str(out / path.name), "bytes": path.stat().st_size, "table": table, "rows": rows}
            files.append(told)
        timed = [told for told in files if told["table"] in TIMED] or files
        if not any(told["rows"] for told in timed):
            raise _nothing(chosen)
    return _exported(chosen, to, out, files, [])


def export_arrays(
    chosen: Selection, to: str, out: Path, request: str, site: str = "*", *, force: bool = False
) -> Exported:
    """Write the captured rows of a request (`safetensors` or `npz`) to a file, an array a site.

    Raises NothingFound without any such row, ValueError for what cannot be written, and as `export_trace` does.
    """
    found = chosen.store.tensors(request, site, run=chosen.run, torch=to == "safetensors")
    with whole(out, force=force) as part:
        num_arrays = write_arrays(found, request, chosen.run, part, to)
    told = [{"path": str(out), "bytes": out.stat().st_size, "arrays": num_arrays}]
    missing, notes = missing_of(found)
    return Exported(chosen.run, to, out, (None, None), told, notes, missing)


def _exported(chosen: Selection, to: str, out: Path, files: list[dict[str, Any]], notes: list[str]) -> Exported:
    whole_run = chosen.whole()
    missing = missing_rows({"health": whole_run.rows("health")}, whole_run.rows("gaps"))
    if chosen.damage:
        count = len(chosen.damage)
        notes = [*notes, f"{count} damaged {'stretch' if count == 1 else 'stretches'} of the store could not be read"]
    window = (chosen.begin_unix_ns, chosen.end_unix_ns)
    return Exported(chosen.run, to, out, window, files, notes, missing)


def _nothing(chosen: Selection) -> NothingFound:
    where = ""
    if chosen.has_window:
        begin, end = chosen.begin_unix_ns, chosen.end_unix_ns
        where = f" from {as_time(begin) if begin else 'its begin'} to {as_time(end) if end else 'its end'}"
    return NothingFound(f"run {chosen.run} in {chosen.store.name} has no rows{where}; nothing was written")


def _notes(chosen: Selection, trace: Trace) -> list[str]:
    notes = []
    if trace.num_slices > EASY_SLICES:
        notes.append(f"{trace.num_slices:,} slices; viewers are at ease with {EASY_SLICES:,}: give --last, or --from")
    if trace.num_against_clock:
        notes.append(f"{trace.num_against_clock} flows left out: by the hosts' clocks, received before they were sent")
    if "verdicts" not in chosen.store.tables():
        notes.append(f"no verdicts in it: the store was never judged (insitu judge {chosen.store.name} --once)")
    return notes


def _time(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return time_of(value)
    except (ValueError, OverflowError):
        how = "write 2026-01-31T13:00:00 (UTC), Unix seconds, or Unix nanoseconds"
        raise click.BadParameter(f"{value!r} is no time: {how}") from None


def _default_out(to: str, run: str) -> Path:
    one_file = TRACES | ARRAYS
    return Path(f"insitu-{run[:8]}{one_file[to]}" if to in one_file else f"insitu-{run[:8]}-{to}")


def _say(found: Exported, store: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_json(store), indent=1))
    else:
        for told in found.files:
            click.echo(told["path"])
    of = {"perfetto": " Open it in https://ui.perfetto.dev (it stays in the browser).", "chrome": ""}.get(found.to, "")
    size = sum(told["bytes"] for told in found.files)
    what = ", ".join(
        f"{sum(told[name] for told in found.files):,} {name}"
        for name in ("rows", "slices", "flows", "arrays")
        if name in found.files[0]
    )
    click.echo(f"run {found.run}: {what}, {size / 1e6:.1f} MB.{of}", err=True)
    for note in found.notes:
        click.echo(note, err=True)
    if found.missing:
        counted = ", ".join(f"{rows} ({reason})" for reason, rows in sorted(found.missing.items()))
        click.echo(f"The record is partial: rows missing: {counted}.", err=True)


@click.command()
@click.argument("store", type=StorePath())
@click.option("--to", type=click.Choice(FORMATS), required=True, help="The format; docs/export.md has them.")
@click.option("--out", type=click.Path(path_type=Path), help="File, or folder of tables. [default: by run and format]")
@click.option("--table", "tables", multiple=True, metavar="NAME", help="Only this table; may be repeated.")
@click.option("--request", metavar="ID", help="Whose captured rows, for safetensors and npz.")
@click.option("--site", default="*", metavar="GLOB", help="Of which sites. [default: all]")
@click.option("--run", default="", metavar="HEX", help="The run whose name begins so. [default: the one begun last]")
@click.option("--from", "begin", callback=_time, metavar="T", help="What ends before is left out.")
@click.option("--until", "end", callback=_time, metavar="T", help="What begins then or later is left out.")
@click.option("--last", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Instead of --from.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (insitu.export/1).")
@click.pass_context
def export(
    ctx: click.Context,
    store: Path,
    to: str,
    out: Path | None,
    tables: tuple[str, ...],
    request: str | None,
    site: str,
    run: str,
    begin: int | None,
    end: int | None,
    last: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a run of STORE, or a window of it, for Perfetto, Chrome, or as tables; or a request's captured rows.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/query.md).
    Times: 2026-01-31T13:00:00 (UTC, or with an offset), Unix seconds, or Unix nanoseconds as in JSON.

    \b
    insitu export ./insitu-store --to perfetto --out trace.pftrace
    insitu export ./insitu-store --to csv --table steps --table intervals --last 60 --json
    insitu export ./insitu-store --to safetensors --request req-1 --out r.safetensors
    """
    _check(to, tables, begin, last)
    _check_request(to, request, site, (begin, end, last, *tables))
    with opened(store) as read:
        try:
            chosen = select(read, run, begin, end, last)
            where = out or _default_out(to, chosen.run)
            if to in TRACES:
                found = export_trace(chosen, to, where, force=force)
            elif request is not None:
                found = export_arrays(chosen, to, where, request, site, force=force)
            else:
                wanted = list(dict.fromkeys(tables)) or read.tables()
                found = export_tables(chosen, to, where, wanted, force=force)
        except (ConnectionError, TimeoutError):
            raise  # of the collector, not of the output
        except (NothingFound, ValueError, OSError) as error:
            raise click.ClickException(_one_line(error)) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("torch", "safetensors"):
                raise
            line = f"--to {to} needs {package}: pip install 'insitu[engine]', or --to npz"
            raise click.ClickException(line) from None
    _say(found, read.name, as_json)
    if found.missing or read.num_damaged:
        ctx.exit(ExitCode.PARTIAL)


def _check(to: str, tables: tuple[str, ...], begin: int | None, last: float | None) -> None:
    if tables and to in TRACES:
        raise click.UsageError(f"--table goes with {', '.join(FILES)}; a trace is made of several tables")
    if last is not None and begin is not None:
        raise click.UsageError("--last and --from both say where the window begins; give one")
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise click.UsageError(f"no table {unknown[0]!r}; the tables are {', '.join(TABLES)}")


def _check_request(to: str, request: str | None, site: str, others: tuple[object, ...]) -> None:
    if to not in ARRAYS and (request is not None or site != "*"):
        raise click.UsageError(f"--request and --site go with {', '.join(ARRAYS)}")
    if to in ARRAYS and request is None:
        raise click.UsageError(f"--to {to} is of one request: say which with --request")
    if to in ARRAYS and any(other is not None for other in others):
        raise click.UsageError("--table, --from, --until and --last go with traces and tables")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot export: {error.strerror}: {error.filename or 'the output'}"
    return str(error)
