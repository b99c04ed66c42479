"""`insitu store replay`: rows or dead letters once more."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from insitu.cli import ExitCode
from insitu_collector.keeping.words import STORE, json_option, opened, say
from insitu_collector.rows.selection import time_of
from insitu_collector.stopping import be_nice, stopping
from insitu_collector.subscriber.options import check_target, rate_of
from insitu_collector.subscriber.words import counts_text

if TYPE_CHECKING:
    from insitu_collector.subscriber.account import Account
    from insitu_collector.subscriber.answers import Answer
    from insitu_collector.subscriber.delivery import Delivery, Wait
    from insitu_collector.subscriber.ends import End
    from insitu_collector.subscriber.payloads import Payload
    from insitu_collector.subscriber.replay import Replayed, Window

RATE: Final = "1MiB"
GIVE_UP_S: Final = 60.0


@click.command()
@STORE
@click.option("--to", required=True, metavar="URL", help="The receiver: http://HOST:4318, grpc://HOST:4317, ...")
@click.option("--from", "since", metavar="TIME", help="Rows from here on: ISO 8601 (UTC) or Unix seconds.")
@click.option("--until", metavar="TIME", help="Rows before this.")
@click.option("--tables", metavar="NAME,...", help="Rows of these alone.  [default: all that have a form in OTLP]")
@click.option("--dead", "of_dead", is_flag=True, help="Dead letters instead; those that are taken go.")
@click.option("--of", metavar="URL", help="With --dead: those of this destination.  [default: of --to]")
@click.option("--rate", metavar="SIZE", default=RATE, show_default=True, help="Most that leaves a second, or none.")
@click.option("--dry-run", is_flag=True, help="Send nothing; say what it would be.")
@json_option("replay")
@click.pass_context
def replay(
    ctx: click.Context,
    store: Path,
    to: str,
    since: str | None,
    until: str | None,
    tables: str | None,
    of_dead: bool,
    of: str | None,
    rate: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send rows of STORE, or its dead letters, to a receiver of OTLP once more.

    Live data goes first: it waits while the subscriber of the same receiver is behind. Spans and log records have the
    ids and times they had; counters count from the beginning of the window.

    \b
    insitu store replay ./insitu-store --to http://127.0.0.1:4318 --dry-run
    insitu store replay ./insitu-store --to grpc://127.0.0.1:4317 --tables intervals,requests --dry-run --json

    Exit codes: 0 all was taken, 4 the receiver takes nothing, 5 some of it was refused, or could not be read or sent.
    """
    check_target(to, "--to")
    from insitu_collector.subscriber.account import Account
    from insitu_collector.subscriber.delivery import GaveUp
    from insitu_collector.subscriber.replay import Replay

    if of_dead and (since or until or tables):
        raise click.UsageError("--dead sends dead letters as they are: no --from, --until or --tables with it")
    if of and not of_dead:
        raise click.UsageError("--of says whose dead letters; add --dead")
    window, chosen, bytes_per_s = _window(since, until), _tables(tables), rate_of(rate, "--rate")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    be_nice()
    account = Account()
    with opened(store) as path, stopping() as stop, closing(_end(to, dry_run)) as end:
        delivery = _delivery(path, to, end, account, None if dry_run else bytes_per_s, stop.wait)
        replay = Replay(path, to, account, delivery, stop.wait)
        try:
            if of_dead:
                replay.letters(of or to)
            else:
                replay.rows(window, chosen)
        except GaveUp as error:
            click.echo(f"insitu store replay: {to} takes nothing ({error})", err=True)
            ctx.exit(ExitCode.UNREACHABLE)
    result = replay.result
    say("replay", store, _document(to, dry_run, result, account), [_line(to, dry_run, result, account)], as_json)
    left = (result.num_unreadable, account.dead, account.rejected_items, account.rows)
    ctx.exit(ExitCode.OK if result.is_whole and not any(left) else ExitCode.PARTIAL)


def _window(since: str | None, until: str | None) -> Window:
    from insitu_collector.subscriber.replay import Window
    from insitu_collector.subscriber.times import FOR_EVER

    bounds = []
    for option, text, default in (("--from", since, -FOR_EVER), ("--until", until, FOR_EVER)):
        try:
            bounds.append(default if text is None else time_of(text))
        except ValueError:
            raise click.UsageError(f"{option} {text}: write a time like 2026-08-01T12:00:00, or Unix seconds") from None
    if bounds[0] >= bounds[1]:
        raise click.UsageError("--from is not before --until")
    return Window(bounds[0], bounds[1])


def _tables(text: str | None) -> tuple[str, ...]:
    from insitu_collector.subscriber.mapping import TABLES

    chosen = TABLES if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    for name in chosen:
        if name not in TABLES:
            raise click.UsageError(f"--tables: {name!r} has no form in OTLP; those that have are {', '.join(TABLES)}")
    return chosen


class Nowhere:
    """Takes everything: a dry run maps all there is, and counts it."""

    def send(self, payload: Payload) -> Answer:
        from insitu_collector.subscriber.answers import Answer, Outcome

        return Answer(Outcome.TAKEN)

    def close(self) -> None:
        pass


def _end(to: str, dry_run: bool) -> End:
    from insitu_collector.subscriber.ends import open_end
    from insitu_collector.subscriber.target import parse_target

    return Nowhere() if dry_run else open_end(parse_target(to, os.environ))


def _delivery(store: Path, to: str, end: End, account: Account, bytes_per_s: int | None, wait: Wait) -> Delivery:
    from insitu.exporters.otlp.ends import unwanted
    from insitu_collector.subscriber.dead import DeadLetters
    from insitu_collector.subscriber.delivery import Delivery
    from insitu_collector.subscriber.pace import Pace

    def tell(_: str, __: str) -> None:
        """The log has said it."""

    letters = DeadLetters(store, to)
    pace, left_out = Pace(bytes_per_s), unwanted(os.environ)
    return Delivery(to, end, letters, account, pace=pace, wait=wait, tell=tell, give_up_s=GIVE_UP_S, unwanted=left_out)


def _document(to: str, dry_run: bool, result: Replayed, account: Account) -> dict[str, Any]:
    return {
        "to": to,
        "dry_run": dry_run,
        "whole": result.is_whole,
        "rows": result.num_rows,
        "letters": result.num_letters,
        "unreadable": result.num_unreadable,
        "account": account.to_json(),
    }


def _line(to: str, dry_run: bool, result: Replayed, account: Account) -> str:
    done = f"would be sent ({account.num_bytes} B) to" if dry_run else "taken by"
    text = f"{counts_text(account.sent)} {done} {to}"
    left: tuple[tuple[str, Mapping[str, int]], ...] = (
        ("rejected", account.rejected_items),
        ("dead", account.dead),
        ("lost", account.rows),
    )
    for what, counts in left:
        text += f", {counts_text(counts)} {what}" if counts else ""
    if result.num_unreadable:
        text += f", {result.num_unreadable} stretches or letters could not be read"
    return text if result.is_whole else f"{text}; it was stopped before its end"
