"""`insitu dashboard STORE`: the pages of a store, in a process of its own that only reads."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final

import click

from insitu.cli import StorePath
from insitu_collector.opening import opened

NICENESS: Final = 10
DEFAULT_PORT: Final = 8501


@click.command()
@click.argument("store", type=StorePath())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free one.")
def dashboard(store: Path, host: str, port: int) -> None:
    """Show STORE in a browser, live while it is written; reads only, at low priority, until Ctrl-C.

    STORE is a folder, or grpc://HOST:PORT of a collector (docs/dashboard.md).

    \b
    insitu dashboard ./insitu-store
    insitu dashboard ./insitu-store --port 0
    """
    with opened(store) as read:
        read.check()
    listener = bind(host, port)
    with contextlib.suppress(OSError):
        os.nice(max(0, NICENESS - os.nice(0)))
    from insitu_dashboard.application import serve

    with listener:
        serve(read.name, listener, host)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Raises ClickException, one line, when that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} is in use; choose another with --port, or --port 0 for any free one"
        else:
            text = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise click.ClickException(text) from None
    return listener
