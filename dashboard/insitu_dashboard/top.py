"""`insitu top STORE`: the Live page's answer in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import click

from insitu.cli import StorePath
from insitu_collector.opening import opened
from insitu_dashboard import top_text
from insitu_dashboard.dashboard import NICENESS
from insitu_dashboard.hub import Hub
from insitu_dashboard.notices import State
from insitu_dashboard.picture import DEFAULT_WINDOW_S

WIDTH: Final = 120
"""Of a line where no terminal says how wide it is."""


@click.command()
@click.argument("store", type=StorePath())
@click.option("--run", help="The run whose name begins so.  [default: the one with the newest record]")
@click.option("--replica", type=click.IntRange(0), metavar="N", help="This replica of it.  [default: its first]")
@click.option("--once", is_flag=True, help="Print it once, and end: what happens anyway where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print the picture as one JSON document (insitu.picture/1).")
def top(store: Path, run: str | None, replica: int | None, once: bool, as_json: bool) -> None:
    """Show in a terminal what limits STORE's newest run, and what each rank does, each second until q; reads only.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/dashboard.md).

    \b
    insitu top ./insitu-store
    insitu top ./insitu-store --once
    """
    with opened(store) as read:
        read.check()
    with contextlib.suppress(OSError):
        os.nice(max(0, NICENESS - os.nice(0)))
    shown = run if replica is None else f"{run or ''}.{replica}"
    hub = Hub(read.name)
    try:
        if once or as_json or not sys.stdout.isatty():
            hub.poll()
            text = hub.picture(shown, DEFAULT_WINDOW_S)
            width = shutil.get_terminal_size((WIDTH, 40)).columns
            picture = json.loads(text)
            if picture["header"]["state"] == State.ERROR and not as_json:
                raise click.ClickException(f"{picture['notice']['text']} {picture['notice']['remedy']}")
            click.echo(text if as_json else top_text.plain(picture, width))
            if picture["header"]["state"] == State.ERROR:
                raise SystemExit(1)
        else:
            from insitu_dashboard.top_screen import Top

            Top(hub.start(), shown).run()
    finally:
        hub.close()
