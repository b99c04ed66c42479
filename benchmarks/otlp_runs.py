"""The part of `make bench-collector` that sends spans: to the collector, and to Phoenix, the same way.

Of what takes OTLP and can be installed from a Python package index, Phoenix is the one that stores spans by itself.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

from collector_results import SpansResult
from collector_rig import collecting
from foreign import Foreign
from overhead_rig import cpu_of
from phoenix_rig import phoenix
from workers import Worker, WorkerError

from insitu_collector.store import open_store
from insitu_engine.processes import ChildFailed

INSITU, PHOENIX = "insitu collect", "Arize Phoenix, SQLite"
SPANS: Final = 512
"""Of a request."""
REQUESTS: Final = {INSITU: 2000, PHOENIX: 40}
QUICK_REQUESTS: Final = {INSITU: 200, PHOENIX: 8}
STORED_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Receiver:
    """A process that takes OTLP/gRPC."""

    name: str
    address: str
    pid: int
    stored: Callable[[], int]
    """How many spans its store holds, as another process sees it."""
    durable_when_answered: bool
    """Otherwise the clock goes on until its store has all."""


def spans(quick: bool, phoenix_python: Path, folder: Path) -> list[SpansResult]:
    """Send spans to each receiver in turn; one that cannot run says why."""
    count = QUICK_REQUESTS if quick else REQUESTS
    ways: dict[str, Callable[[], AbstractContextManager[Receiver]]] = {
        INSITU: lambda: _insitu(folder / "store"),
        PHOENIX: lambda: _phoenix(phoenix_python, folder / "phoenix"),
    }
    found: list[SpansResult] = []
    for name, receiving in ways.items():
        try:
            with receiving() as receiver:
                found.append(_send(receiver, count[name], folder / f"load-{len(found)}"))
        except (WorkerError, ChildFailed, OSError, TimeoutError) as error:
            reason = str(error).removeprefix("RuntimeError: ")
            found.append(SpansResult(name, SPANS, 0, unable=reason))
    return found


def _send(receiver: Receiver, num_requests: int, folder: Path) -> SpansResult:
    job = {"address": receiver.address, "num_requests": num_requests, "num_spans": SPANS}
    num_spans = num_requests * SPANS
    with Worker(sys.executable, job, folder, script="otlp_load.py") as load, Foreign() as foreign:
        load.ask("ready")
        began_s, began = cpu_of(receiver.pid), time.perf_counter()
        answered = load.ask("send")
        seconds = answered["seconds"]
        if not receiver.durable_when_answered:
            _wait_stored(receiver, num_spans)
            seconds = time.perf_counter() - began
        used_s = cpu_of(receiver.pid) - began_s
    return SpansResult(
        receiver=receiver.name,
        spans_per_request=SPANS,
        num_spans=num_spans,
        seconds=seconds,
        num_found=receiver.stored(),
        cpu_us_per_span={
            "receiver": used_s / num_spans * 1e6,
            "load generator": answered["cpu_s"] / num_spans * 1e6,
        },
        foreign_share=foreign.share,
    )


def _wait_stored(receiver: Receiver, num_spans: int) -> None:
    """Wait until the receiver's store has all spans. Raises TimeoutError."""
    pause, deadline = Event(), time.monotonic() + STORED_S
    while receiver.stored() < num_spans:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{receiver.stored()} of {num_spans} spans are stored after {STORED_S:.0f} s")
        pause.wait(0.02)


@contextmanager
def _insitu(store: Path) -> Iterator[Receiver]:
    with collecting(store) as collector:
        yield Receiver(INSITU, collector.address, collector.pid, lambda: _rows(store), durable_when_answered=True)


def _rows(store: Path) -> int:
    return sum(batch.num_rows for batch in open_store(store).scan("spans"))


@contextmanager
def _phoenix(python: Path, folder: Path) -> Iterator[Receiver]:
    with phoenix(python, folder) as running:
        database = running.database
        yield Receiver(PHOENIX, running.address, running.pid, lambda: _rows_in(database), durable_when_answered=False)


def _rows_in(database: Path) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30.0)) as connection:
        return int(connection.execute("select count(*) from spans").fetchone()[0])
