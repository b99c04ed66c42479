"""`insitu store`: what people do with a store beside reading what is in it."""

from __future__ import annotations

from pathlib import Path

import click

from insitu.cli import ExitCode
from insitu_collector.keeping import uploading, verifying
from insitu_collector.keeping.changing import compact, expire, repair
from insitu_collector.keeping.erasing import erase
from insitu_collector.keeping.listing import contents
from insitu_collector.keeping.remedies import remedies
from insitu_collector.keeping.words import STORE, json_option, opened, say
from insitu_collector.subscriber.cursors_command import cursors
from insitu_collector.subscriber.dead_commands import dead
from insitu_collector.subscriber.replay_command import replay


@click.group()
def store() -> None:
    """Keep a store: see what is in it, check, repair, merge, expire, copy, erase (docs/store.md).

    What was sent on from it as OTLP, and sending it again: docs/otel.md.

    \b
    insitu store ls ./insitu-store
    insitu store verify ./insitu-store
    """


@click.command("ls")
@STORE
@json_option("ls")
def ls(store: Path, as_json: bool) -> None:
    """Say what STORE holds, by table: segments, bytes, rows, times.

    Brings the catalog up to date on the way, where the store can be written.

    \b
    insitu store ls ./insitu-store
    insitu store ls ./insitu-store --json | python -m json.tool
    """
    with opened(store) as path:
        found = contents(path)
        say("ls", store, found.to_json(), found.to_lines(), as_json)


@click.command("verify")
@STORE
@json_option("verify")
@click.pass_context
def verify(ctx: click.Context, store: Path, as_json: bool) -> None:
    """Read all of STORE and compare it with its checksums, footers, catalog and twins. Changes nothing.

    \b
    insitu store verify ./insitu-store
    insitu store verify ./insitu-store --json | python -m json.tool

    Exit codes: 0 all of it is whole, 3 something is wrong, 5 some of it is of a newer format and was not looked into.
    """
    with opened(store) as path:
        found = verifying.verify(path)
    lines = [f"{problem.kind:<12} {problem.file}: {problem.text}" for problem in found.problems]
    what = f"{found.num_rows:,} rows in {found.num_segments} segments ({found.num_bytes / 1e6:.1f} MB)"
    if found.num_unreadable:
        what += f", and {found.num_unreadable:,} more that cannot be read"
    todo = remedies(found, store)
    lines.append(f"{what}: {'whole' if found.is_whole else '; '.join(['not whole', *todo])}")
    if found.in_use:
        lines.append(f"being written: {', '.join(found.in_use)}")
    document = {
        "whole": found.is_whole,
        "segments": found.num_segments,
        "rows": found.num_rows,
        "unreadable_rows": found.num_unreadable,
        "bytes": found.num_bytes,
        "twins": found.num_twins,
        "catalog": found.has_catalog,
        "in_use": found.in_use,
        "problems": [problem.to_json() for problem in found.problems],
        "remedies": todo,
    }
    say("verify", store, document, lines, as_json)
    if not found.is_whole:
        ctx.exit(ExitCode.PROBLEMS_FOUND)
    if any(problem.kind == "newer" for problem in found.problems):
        ctx.exit(ExitCode.PARTIAL)


@click.command("export")
@STORE
@click.argument("uri")
@json_option("export")
@click.pass_context
def export(ctx: click.Context, store: Path, uri: str, as_json: bool) -> None:
    """Copy sealed segments and twins of STORE to URI: file:///DIR, s3://BUCKET/PREFIX, gs://...

    Each copy is read back and compared. Stopped at any time it goes on where it was; run it again, or every minute, for
    what was sealed since. What was merged or erased here is removed there.

    \b
    insitu store export ./insitu-store "file://$PWD/copy"
    insitu store export ./insitu-store "file://$PWD/copy" --json

    Exit codes: 0 all that is sealed is there, 1 it cannot be written, 5 something was left out.
    """
    with opened(store) as path:
        try:
            done = uploading.Uploader(path, uri).run()
        except uploading.CannotExport as error:
            raise click.ClickException(str(error)) from None
    document = {
        "to": uri,
        "copied": done.copied,
        "bytes": done.num_bytes,
        "there": done.num_there,
        "removed": done.removed,
        "left_out": done.left_out,
    }
    lines = [f"{len(done.copied)} files ({done.num_bytes / 1e6:.1f} MB) copied to {uri}, {done.num_there} were there"]
    lines += [f"{len(done.removed)} copies removed: others took their place"] if done.removed else []
    lines += [f"{name}: left out: {why}" for name, why in done.left_out.items()]
    say("export", store, document, lines, as_json)
    if done.left_out:
        ctx.exit(ExitCode.PARTIAL)


for command in (ls, verify, repair, compact, expire, export, erase, cursors, dead, replay):
    store.add_command(command)
