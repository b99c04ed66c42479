"""`insitu forward`: a store's records to a collector."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from insitu.cli import ExitCode
from insitu.config_show import load_for_command
from insitu.segments.retention import parse_age
from insitu.wire.address import Address

if TYPE_CHECKING:
    from insitu.forwarding.forwarder import Forwarded, Forwarder

SCHEMA: Final = "insitu.forward/1"
COLLECTORS: Final = ("grpc://", "grpcs://")
FOLLOW_S: Final = 5.0
"""How often `--follow` looks for what was sealed since."""


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", required=True, metavar="URL", help="The collector: grpc://HOST:PORT, with TLS grpcs://.")
@click.option("--remove", is_flag=True, help="Unlink what the collector has on its disk; for a spool, not for a store.")
@click.option("--follow", is_flag=True, help="Go on: look every 5 s for what was sealed since, until Ctrl-C.")
@click.option(
    "--timeout", default="30s", metavar="AGE", show_default=True, help="How long the collector may say nothing."
)
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
@click.pass_context
def forward(ctx: click.Context, store: Path, to: str, remove: bool, follow: bool, timeout: str, as_json: bool) -> None:
    """Send what the STORE of a machine without a connection holds to a collector, each row once.

    Sealed segments are sent, those of dead processes as far as they are whole. It may be stopped or killed at any time,
    and goes on where it was: what the collector has, it keeps once.

    \b
    insitu forward ./insitu-store --to grpc://127.0.0.1:4317
    insitu forward ./insitu-store --to grpc://127.0.0.1:4317 --remove --json

    Exit codes: 0 all is there, 4 the collector takes nothing, 5 some of it could not be read or was refused.
    """
    forwarder = _forwarder(store, to, remove, timeout)
    while True:
        result = _run(forwarder, store, to, follow)
        if result is not None and (not follow or result.num_batches):
            click.echo(json.dumps(document(result, store, to)) if as_json else sentence(result, to))
        if not follow:
            assert result is not None, "only --follow goes on without a result"
            ctx.exit(ExitCode.PARTIAL if result.refused or result.num_unreadable else ExitCode.OK)
        time.sleep(FOLLOW_S)


def _forwarder(store: Path, to: str, remove: bool, timeout: str) -> Forwarder:
    if not to.startswith(COLLECTORS):
        raise click.UsageError(f"--to {to}: a collector is written like grpc://127.0.0.1:4317")
    try:
        Address.of(to)
    except ValueError as error:
        raise click.UsageError(f"--to {to}: {error}") from None
    try:
        timeout_s = parse_age(timeout)
    except ValueError as error:
        raise click.UsageError(f"--timeout: {error}") from None
    if not (store / "v1").is_dir():
        raise click.ClickException(f"{store} is no store: it has no folder v1")
    from insitu.forwarding.forwarder import Forwarder

    credentials = load_for_command().credentials
    waits_s = float("inf") if timeout_s is None else timeout_s
    return Forwarder(store, to, remove=remove, timeout_s=waits_s, credentials=credentials)


def _run(forwarder: Forwarder, store: Path, to: str, follow: bool) -> Forwarded | None:
    """Send what there is; None where the collector takes nothing now and it is tried again."""
    from insitu.forwarding.forwarder import Unreachable

    try:
        return forwarder.run()
    except Unreachable as unreachable:
        if follow:
            return None
        why = str(unreachable) or f"{to} takes nothing"
        click.echo(f"insitu forward: {why}; what it has taken is remembered in {store}", err=True)
        raise SystemExit(ExitCode.UNREACHABLE) from None
    except OSError as error:
        raise click.ClickException(f"{store}: {error}") from None


def sentence(result: Forwarded, to: str) -> str:
    """Return what became of a store, in a line."""
    if not result.num_batches and not result.num_unreadable:
        return f"{to} has all of it already"
    text = f"{result.num_rows} rows of {len(result.epochs)} processes are on the disk of {to}"
    if result.num_removed:
        text += f"; {result.num_removed} segments were removed here"
    if result.refused:
        reasons = ", ".join(f"{rows} ({reason})" for reason, rows in sorted(result.refused.items()))
        text += f"; rows refused there: {reasons}"
    if result.num_unreadable:
        text += f"; {result.num_unreadable} stretches could not be read here"
    return text


def document(result: Forwarded, store: Path, to: str) -> dict[str, Any]:
    """Return the same as JSON."""
    return {
        "schema": SCHEMA,
        "store": str(store),
        "to": to,
        "segments": result.num_segments,
        "batches": result.num_batches,
        "rows": result.num_rows,
        "processes": len(result.epochs),
        "removed": result.num_removed,
        "refused": dict(result.refused),
        "unreadable": result.num_unreadable,
    }
