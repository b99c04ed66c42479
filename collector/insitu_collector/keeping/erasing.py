"""`insitu store erase`: an order is written down, copies go, and, if asked for, the files are rewritten at once."""

from __future__ import annotations

import getpass
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from insitu.cli import ExitCode
from insitu.segments.erased_file import ErasedFile
from insitu.segments.erasure import Erased, Erasure, Kind
from insitu.segments.retention import parse_age
from insitu_collector.keeping.letters import erase_letters, num_in_letters
from insitu_collector.keeping.orders import NothingKnown, order_for, remove_copies, rows_of, still_there
from insitu_collector.keeping.passes import Clean, erase_shard, write_twins
from insitu_collector.keeping.recorder import Recorder
from insitu_collector.keeping.rewriting import Rewritten
from insitu_collector.keeping.shards import shards_of
from insitu_collector.keeping.twins import missing_twins, sweep_twins
from insitu_collector.keeping.words import STORE, json_option, opened, refresh_catalog, say

LOOK_AGAIN_S: Final = 0.5
FOREVER_S: Final = 1e9


@dataclass
class Outcome:
    """What an order takes away."""

    order: Erasure
    gone: dict[str, int]
    """Rows by table."""
    changed: dict[str, int]
    """Rows by table that lose a name."""
    num_in_letters: int = 0
    """Items of dead letters."""
    num_quarantined: int = 0
    still_in: list[str] = field(default_factory=list)
    """Files that hold some of it, and belong to writers that are at work."""


def would_erase(store: Path, kind: Kind, name: str) -> Outcome:
    """Return what an order would take away. Changes nothing. Raises NothingKnown, OSError."""
    salt = ErasedFile(store).read().salt or secrets.token_bytes(16)
    order = order_for(store, kind, name, by="", within_s=0.0, salt=salt)
    return Outcome(order, *rows_of(store, salt, order), num_in_letters(store, Erased(salt, [order])))


def erase_from(store: Path, kind: Kind, name: str, recorder: Recorder, *, within_s: float) -> Outcome:
    """Give the order: from its return on nobody reads what is erased. Raises NothingKnown, OSError."""
    file = ErasedFile(store)
    salt = file.salt()
    order = order_for(store, kind, name, by=f"{_user()}@{socket.gethostname()}", within_s=within_s, salt=salt)
    done = Outcome(order, *rows_of(store, salt, order))
    erased = file.add(order)
    done.num_in_letters = erase_letters(store, erased)
    done.num_quarantined = remove_copies(store, order)
    recorder.event("erased", sentence(done))
    return done


def rewrite_now(store: Path, recorder: Recorder, timeout_s: float) -> list[str]:
    """Take what is erased out of the files: of shards whose writers have gone here, of a collector's by itself.

    Return the files that still hold some of it when the time is over. Raises OSError, NotWhole.
    """
    erased, clean = ErasedFile(store).read(), Clean()
    in_use = []
    for shard in shards_of(store):
        with recorder.hold(shard) as held:
            if held is None:
                in_use.append(shard)
            else:
                erase_shard(store, held, erased, recorder.tell, clean, Rewritten())
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while (left := still_there(store, erased, in_use)) and time.monotonic() < deadline:
        pause.wait(LOOK_AGAIN_S)
    write_twins(store, missing_twins(store), erased)
    sweep_twins(store)
    return [name.file for name in left]


def sentence(done: Outcome) -> str:
    """Return what the row of `events` says: who, what by its digest, how much."""
    order = done.order
    what = f"{order.kind} {order.digest} by {order.by}: {_rows(done.gone)} hidden"
    if done.changed:
        what += f", its name taken out of {_rows(done.changed)}"
    what += f", {done.num_in_letters} items of dead letters removed" if done.num_in_letters else ""
    return f"{what}, {done.num_quarantined} quarantined files removed; bytes gone by {order.due_unix_ns}"


def _rows(counts: Mapping[str, int]) -> str:
    counted = ", ".join(f"{num:,} of {table}" for table, num in sorted(counts.items()))
    return f"{sum(counts.values()):,} rows{f' ({counted})' if counted else ''}"


def _user() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "unknown"


@click.command("erase")
@STORE
@click.option("--request", metavar="ID", help="Everything of this request.")
@click.option("--tenant", metavar="T", help="Everything that the processes of this tenant wrote, and go on to write.")
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be erased.")
@click.option("--now", is_flag=True, help="Rewrite the files at once, not with the next compaction.")
@click.option("--within", default="24h", show_default=True, metavar="TIME", help="By when the bytes are to be gone.")
@click.option("--timeout", default="60s", show_default=True, metavar="TIME", help="With --now: how long to wait.")
@json_option("erase")
@click.pass_context
def erase(
    ctx: click.Context,
    store: Path,
    request: str | None,
    tenant: str | None,
    yes: bool,
    now: bool,
    within: str,
    timeout: str,
    as_json: bool,
) -> None:
    """Erase what STORE holds of a request or a tenant: hidden from readers at once, gone from its files in time.

    Without --yes nothing is changed. Copies that were made before (exports, forwarded rows) are not reached:
    docs/store.md.

    \b
    insitu store erase ./insitu-store --request req-1
    insitu store erase ./insitu-store --request req-1 --yes --now --json

    Exit codes: 0 done (with --now: gone), 5 hidden, and with --now still in files of a shard that is being written.
    """
    if (request is None) == (tenant is None):
        raise click.UsageError("give --request ID or --tenant T: one of them")
    kind, name = (Kind.TENANT, tenant) if request is None else (Kind.REQUEST, request)
    assert name is not None, "one of the two was given"
    _check_name(f"--{kind}", name)
    within_s, timeout_s = (0.0 if now else _seconds("--within", within)), _seconds("--timeout", timeout)
    with opened(store) as path:
        try:
            if yes:
                with Recorder(path) as recorder:
                    done = erase_from(path, kind, name, recorder, within_s=within_s)
                    if now:
                        done.still_in = rewrite_now(path, recorder, timeout_s)
                    refresh_catalog(path)
            else:
                done = would_erase(path, kind, name)
        except NothingKnown as error:
            raise click.ClickException(str(error)) from None
    document = {
        "done": yes,
        "kind": str(kind),
        "digest": done.order.digest if yes else None,
        "rows": done.gone,
        "names_taken_out": done.changed,
        "dead_letter_items": done.num_in_letters,
        "quarantined": done.num_quarantined,
        "due_unix_ns": done.order.due_unix_ns if yes else None,
        "still_in": done.still_in,
    }
    say("erase", store, document, _lines(done, yes=yes, when="now" if now else f"within {within}"), as_json)
    if not yes:
        click.echo("nothing was erased: add --yes", err=True)
    if done.still_in:
        ctx.exit(ExitCode.PARTIAL)


def _lines(done: Outcome, *, yes: bool, when: str) -> list[str]:
    would = "" if yes else "would be "
    lines = [f"{_rows(done.gone)}: {would}hidden at once, {would}gone from the files {when}"]
    if done.changed:
        lines.append(f"{_rows(done.changed)}: {would}without the name")
    if done.num_in_letters:
        lines.append(f"{done.num_in_letters:,} items of dead letters: {would}gone at once")
    lines += [f"{file}: still holds some of it until its writer ends or it expires" for file in done.still_in]
    return lines


def _check_name(option: str, name: str) -> None:
    """Refuse what nobody is called: an unset variable of a shell would match every empty name."""
    if not name.strip():
        raise click.UsageError(f"{option} is empty: give the name of the one to erase")
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes of the command line that are no text
        raise click.UsageError(f"{option} is not UTF-8: names in a store are")


def _seconds(option: str, text: str) -> float:
    try:
        found = parse_age(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None
    return FOREVER_S if found is None else found
