"""`insitu store cursors`: who has what of a store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from insitu.forwarding.cursor import Cursor, folder_of
from insitu.records import TABLES as ALL_TABLES
from insitu_collector.keeping.words import STORE, json_option, opened, say
from insitu_collector.subscriber.words import counts_text


@click.command()
@STORE
@json_option("cursors")
def cursors(store: Path, as_json: bool) -> None:
    """Say what each destination has of STORE, how far it is behind, and what was lost or refused on the way.

    \b
    insitu store cursors ./insitu-store
    insitu store cursors ./insitu-store --json
    """
    with opened(store) as path:
        found = [_cursor(path, each) for each in sorted(folder_of(path).glob("*.json"))]
    lines = [_cursor_line(cursor) for cursor in found] or [f"nothing of {store} was sent on"]
    say("cursors", store, {"cursors": found}, lines, as_json)


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
    text += f"; {counts_text(account['sent'])} sent"
    not_sent = {"rejected": "rejected", "dead": "dead", "lost": "rows", "left out": "left_out"}
    for what, key in not_sent.items():
        if counts := account.get(key):  # an account of an earlier version has no `left_out`
            text += f", {counts_text(counts)} {what}"
    if account.get("unlinked"):
        text += f", {account['unlinked']} rows of intervals without links"
    if account["retried"]:
        text += f", {account['retried']} attempts failed"
    if account["text"]:
        text += f"; {account['text']}"
    return text if cursor["live"] else f"{text}; nobody sends now"
