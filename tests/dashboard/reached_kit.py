"""Where a store is read: in its folder, or through the port of a collector that writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from access_kit import Rig

from insitu_collector.service.server import CollectorServer

Reached = Callable[[Path], str]
"""Folder of a store -> what a user would write to read it."""


@contextmanager
def collectors(rig: Rig) -> Iterator[Reached]:
    """Start a collector, with TLS and tokens, for each store that is reached so."""
    with ExitStack() as running:

        def address(store: Path) -> str:
            server = CollectorServer(store, port=0, access=rig.access(), compact=False)
            return running.enter_context(server).address

        yield address
