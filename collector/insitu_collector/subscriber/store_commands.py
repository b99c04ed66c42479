"""`insitu store cursors | dead | replay`: what was sent on, what nobody would take, and sending it again."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from insitu.cli import ExitCode
from insitu.forwarding.cursor import Cursor, folder_of
from insitu.records import TABLES as ALL_TABLES
from insitu_collector.rows.selection import time_of
from insitu_collector.stopping import be_nice, stopping
from insitu_collector.store import open_store
from insitu_collector.subscriber.options import check_target, rate_of

if TYPE_CHECKING:
    from insitu_collector.subscriber.replay import Window

CURSORS: Final = "insitu.cursors/1"
LETTERS: Final = "insitu.letters/1"
LETTER: Final = "insitu.letter/1"
REPLAY: Final = "insitu.replay/1"
REPLAY_RATE: Final = "1MiB"
GIVE_UP_S: Final = 60.0
_ITEMS: Final[Mapping[str, str]] = {"traces": "spans", "metrics": "data points", "logs": "log records"}
"""What a signal's items are called; rows are counted by reason, which is its own name."""

_STORE = click.argument("store", type=click.Path(path_type=Path), callback=lambda _, __, path: _checked(path))
_OF = click.option("--of", metavar="URL", help="Those of this destination alone.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def _checked(path: Path) -> Path:
    try:
        return open_store(path).path
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from None


@click.group()
def store() -> None:
    """Look after a store: what was sent on from it, and what is to be sent again.

    \b
    insitu store cursors ./insitu-store
    insitu store dead ls ./insitu-store
    """


# -- cursors ---------------------------------------------------------------------------------------------------------


@store.command()
@_STORE
@_JSON
def cursors(store: Path, as_json: bool) -> None:
    """Say what each destination has of STORE, how far it is behind, and what was lost or refused on the way.

    \b
    insitu store cursors ./insitu-store
    insitu store cursors ./insitu-store --json
    """
    found = [_cursor(store, path) for path in sorted(folder_of(store).glob("*.json"))]
    if as_json:
        click.echo(json.dumps({"schema": CURSORS, "store": str(store), "cursors": found}))
        return
    for cursor in found:
        click.echo(_cursor_line(cursor))
    if not found:
        click.echo(f"nothing of {store} was sent on")


def _cursor(store: Path, path: Path) -> dict[str, Any]:
    from insitu_collector.subscriber.backlog import backlog
    from insitu_collector.subscriber.subscriber import is_live

    try:
        to = json.loads(path.read_text())["to"]
    except (OSError, ValueError, KeyError, TypeError):
        return {"to": None, "file": path.name, "readable": False}
    cursor = Cursor(store, to)
    waiting = backlog(store, cursor, _tables_of(cursor.account))
    return {
        "to": to,
        "file": path.name,
        "readable": True,
        "live": is_live(store, to),
        "behind_s": round(waiting.behind_s(time.time_ns()), 3),
        "rows": waiting.num_rows,
        "account": cursor.account or None,
    }


def _tables_of(account: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a destination is sent: a collector (`insitu forward`), which has no account, gets all."""
    if not account:
        return ALL_TABLES
    from insitu_collector.subscriber.mapping import TABLES

    return TABLES


def _cursor_line(cursor: Mapping[str, Any]) -> str:
    if not cursor["readable"]:
        return f"{cursor['file']} cannot be read; what it is for is sent again"
    text = f"{cursor['to']}: {cursor['rows']} rows wait"
    if cursor["rows"]:
        text += f", {cursor['behind_s']:.0f} s behind"
    account = cursor["account"]
    if account is None:
        return text
    text += f"; {_counts(account['sent'])} sent"
    for what, counts in (("rejected", account["rejected"]), ("dead", account["dead"]), ("lost", account["rows"])):
        if counts:
            text += f", {_counts(counts)} {what}"
    if account["retried"]:
        text += f", {account['retried']} attempts failed"
    if account["text"]:
        text += f"; {account['text']}"
    return text if cursor["live"] else f"{text}; nobody sends now"


def _counts(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{number} {_ITEMS.get(name, name)}" for name, number in counts.items()) or "nothing"


# -- dead letters ----------------------------------------------------------------------------------------------------


@store.group()
def dead() -> None:
    """Look at dead letters: requests that a receiver of OTLP would not take, kept as they were.

    \b
    insitu store dead ls ./insitu-store
    insitu store dead show ./insitu-store
    """


@dead.command()
@_STORE
@_OF
@_JSON
def ls(store: Path, of: str | None, as_json: bool) -> None:
    """List the dead letters of STORE, oldest first of each destination.

    \b
    insitu store dead ls ./insitu-store
    insitu store dead ls ./insitu-store --json
    """
    from insitu_collector.subscriber.dead import letters

    found = [letter for _, letter in letters(store, of)]
    if as_json:
        click.echo(json.dumps({"schema": LETTERS, "letters": [asdict(letter) for letter in found]}))
        return
    for letter in found:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.unix_ns / 1e9))
        what = f"{_counts({letter.signal: letter.num_items})} ({letter.num_bytes} B)"
        click.echo(f"{letter.name}  {at}  {what} for {letter.to}: {letter.reason} {letter.text}".rstrip())
    if not found:
        click.echo(f"{store} has no dead letters")


@dead.command()
@_STORE
@click.argument("letter", required=False)
@click.option("--raw", is_flag=True, help="The bytes of the request, as they are.")
def show(store: Path, letter: str | None, raw: bool) -> None:
    """Print one dead LETTER of STORE as JSON: why it is one, and its request. The oldest, if none is named.

    \b
    insitu store dead show ./insitu-store
    insitu store dead show ./insitu-store --raw
    """
    from google.protobuf.json_format import MessageToDict

    from insitu_collector.subscriber.dead import BadLetter, letters, read
    from insitu_collector.subscriber.payloads import REQUESTS

    paths = [path for path, found in letters(store) if letter in (None, found.name)]
    if not paths:
        if letter is not None:
            raise click.ClickException(
                f"{store} has no dead letter {letter}; `insitu store dead ls {store}` lists them"
            )
        click.echo(f"{store} has no dead letters")
        return
    try:
        found, payload = read(paths[0])
    except BadLetter as error:
        raise click.ClickException(str(error)) from None
    if raw:
        click.echo(payload.body, nl=False)
        return
    request = MessageToDict(REQUESTS[payload.signal].FromString(payload.body))
    click.echo(json.dumps({"schema": LETTER, **asdict(found), "request": request}, indent=2))


@dead.command()
@_STORE
@click.argument("letter", nargs=-1)
@click.option("--all", "all_of_them", is_flag=True, help="All of them.")
@_OF
def drop(store: Path, letter: tuple[str, ...], all_of_them: bool, of: str | None) -> None:
    """Remove dead LETTERs of STORE for good.

    \b
    insitu store dead drop ./insitu-store --all
    insitu store dead drop ./insitu-store --all --of http://127.0.0.1:4318
    """
    from insitu_collector.subscriber.dead import letters

    if bool(letter) == all_of_them:
        raise click.UsageError("name letters, or give --all")
    found = {each.name: path for path, each in letters(store, of)}
    unknown = [name for name in letter if name not in found]
    if unknown:
        raise click.ClickException(f"{store} has no dead letter {unknown[0]}; nothing was removed")
    for name in found if all_of_them else letter:
        found[name].unlink(missing_ok=True)
    click.echo(f"{len(found) if all_of_them else len(letter)} dead letters were removed")


# -- replay ----------------------------------------------------------------------------------------------------------


@store.command()
@_STORE
@click.option(
    "--to", required=True, metavar="URL", help="The receiver: http://HOST:4318, grpc://HOST:4317, https, grpcs."
)
@click.option("--from", "since", metavar="TIME", help="Rows from here on: ISO 8601 (UTC) or Unix seconds.")
@click.option("--until", metavar="TIME", help="Rows before this.")
@click.option("--tables", metavar="NAME,...", help="Rows of these alone.  [default: all that have a form in OTLP]")
@click.option("--dead", "of_dead", is_flag=True, help="Dead letters instead; those that are taken go.")
@click.option("--of", metavar="URL", help="With --dead: those of this destination.  [default: of --to]")
@click.option(
    "--rate", metavar="SIZE", default=REPLAY_RATE, show_default=True, help="Most that leaves a second, or none."
)
@click.option("--dry-run", is_flag=True, help="Send nothing; say what it would be.")
@_JSON
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

    Exit codes: 0 all was taken, 4 the receiver takes nothing, 5 some of it was refused or could not be read.
    """
    from insitu_collector.subscriber.delivery import GaveUp

    check_target(to, "--to")
    if of_dead and (since or until or tables):
        raise click.UsageError("--dead sends dead letters as they are: no --from, --until or --tables with it")
    if of and not of_dead:
        raise click.UsageError("--of says whose dead letters; add --dead")
    window, chosen, bytes_per_s = _window(since, until), _tables(tables), rate_of(rate, "--rate")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    be_nice()
    with stopping() as stop:
        try:
            told = _replay(store, to, (of or to) if of_dead else None, window, chosen, bytes_per_s, stop.wait, dry_run)
        except GaveUp as error:
            click.echo(f"insitu store replay: {to} takes nothing ({error})", err=True)
            ctx.exit(ExitCode.UNREACHABLE)
    click.echo(json.dumps(told) if as_json else _replay_line(told, to))
    is_partial = told["unreadable"] or told["account"]["dead"] or told["account"]["rejected"] or not told["whole"]
    ctx.exit(ExitCode.PARTIAL if is_partial else ExitCode.OK)


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


def _replay(
    store: Path,
    to: str,
    letters_of: str | None,
    window: Window,
    tables: tuple[str, ...],
    bytes_per_s: int | None,
    wait: Any,
    dry_run: bool,
) -> dict[str, Any]:
    from insitu_collector.subscriber.account import Account
    from insitu_collector.subscriber.answers import Answer, Outcome
    from insitu_collector.subscriber.dead import DeadLetters
    from insitu_collector.subscriber.delivery import Delivery
    from insitu_collector.subscriber.ends import End, open_end
    from insitu_collector.subscriber.pace import Pace
    from insitu_collector.subscriber.payloads import Payload
    from insitu_collector.subscriber.replay import Replay
    from insitu_collector.subscriber.target import parse_target

    class Nowhere:
        """Takes everything: a dry run maps all there is, and counts it."""

        def send(self, payload: Payload) -> Answer:
            return Answer(Outcome.TAKEN)

        def close(self) -> None:
            pass

    account = Account()
    end: End = Nowhere() if dry_run else open_end(parse_target(to, os.environ))
    with closing(end):
        delivery = Delivery(
            to,
            end,
            DeadLetters(store, to),
            account,
            pace=Pace(None if dry_run else bytes_per_s),
            wait=wait,
            tell=lambda _, text: click.echo(text, err=True),
            give_up_s=GIVE_UP_S,
        )
        replay = Replay(store, to, delivery, wait)
        if letters_of is None:
            replay.rows(window, tables)
        else:
            replay.letters(letters_of)
    result = replay.result
    return {
        "schema": REPLAY,
        "store": str(store),
        "to": to,
        "dry_run": dry_run,
        "whole": result.is_whole,
        "rows": result.num_rows,
        "letters": result.num_letters,
        "unreadable": result.num_unreadable,
        "account": account.to_json(),
    }


def _replay_line(told: Mapping[str, Any], to: str) -> str:
    account = told["account"]
    done = f"would be sent ({account['bytes']} B) to" if told["dry_run"] else "taken by"
    text = f"{_counts(account['sent'])} {done} {to}"
    for what in ("rejected", "dead"):
        if account[what]:
            text += f", {_counts(account[what])} {what}"
    if told["unreadable"]:
        text += f", {told['unreadable']} stretches or letters could not be read"
    return text if told["whole"] else f"{text}; it was stopped before its end"
