"""One query of a stranger, in the process that was forked for it: confined, answered, over."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import socket
import sqlite3
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import duckdb

from insitu.segments.erased_file import ErasedUnreadable
from insitu_collector.query import rows, scan
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import Counted, parts_of
from insitu_collector.query.sql import STORE_AWAY, TOO_MUCH_MEMORY, Limits, QueryFailed, QueryTooLarge, stream
from insitu_collector.query.sql_frames import Kind, receive, send, send_json
from insitu_collector.store import Store, open_store

LOADED: Final = (duckdb, sqlite3, rows, scan)
"""What a query needs and would import at its first use: a fork has it already."""
HEADROOM_BYTES: Final = 256 << 20
"""Beside what DuckDB may have: batches as they are read, filtered and sent, and what functions make by themselves."""
CPU_MARGIN_S: Final = 5
MOST_PART_BYTES: Final = 4 << 20
"""A reader's gRPC takes no larger message. Pieces are smaller; a schema is as large as a query says."""
ANSWERED: Final = (QueryTooLarge, BadQuestion, ErasedUnreadable, QueryFailed)
"""What is told to who asked, by its class's name and its text."""


class Said(logging.Handler):
    """Keeps what is logged for the collector, which says each line once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def answer(collector: socket.socket) -> None:
    """Take one question and answer it. Raises BrokenPipeError where nobody waits any more."""
    frame = receive(collector)
    if frame is None:
        return
    said, log = Said(), logging.getLogger("insitu")
    log.addHandler(said)
    log.propagate = False
    kind, body = frame
    assert kind is Kind.QUESTION, "a collector asks"
    try:
        store, num_rows = _answered(collector, body)
    except ANSWERED as error:
        send_json(collector, Kind.FAILED, raised=type(error).__name__, text=str(error), said=said.lines)
    except MemoryError:
        send_json(collector, Kind.FAILED, raised=QueryTooLarge.__name__, text=TOO_MUCH_MEMORY, said=said.lines)
    except BrokenPipeError:
        raise
    except Exception as error:
        said.lines.append(f"insitu: a query failed in its process: {traceback.format_exc()}")
        why = f"the query failed here ({type(error).__name__}); the collector's log has more"
        send_json(collector, Kind.FAILED, raised=QueryFailed.__name__, text=why, said=said.lines)
    else:
        damage = [asdict(each) for each in store.all_damage]
        send_json(collector, Kind.DONE, num_rows=num_rows, damage=damage, said=said.lines)


def _answered(collector: socket.socket, question: bytes) -> tuple[Store, int]:
    """Send what a question asks for; return the store it was read from, and the number of rows."""
    asked: dict[str, Any] = json.loads(question)
    limits = Limits(**asked["limits"])
    try:
        store = open_store(Path(asked["store"]))
    except FileNotFoundError:
        raise QueryFailed(STORE_AWAY) from None

    def begins() -> None:
        confine(limits)
        send(collector, Kind.BEGUN)

    batches = stream(store.reading(asked["tenant"]), asked["query"], limits, begins)
    counted = Counted(batches)
    for part in parts_of(next(batches).schema, counted):
        if part.ByteSize() > MOST_PART_BYTES:
            raise BadQuestion("the answer's columns are more than one message can name; ask for fewer")
        send(collector, Kind.PART, part.SerializeToString())
    return store, counted.num_rows


def confine(limits: Limits) -> None:
    """Let this process have no more from now on than a query may: memory, time of a processor, and nothing on disk."""
    mapped = _mapped_bytes()
    if mapped is not None:
        _lower(resource.RLIMIT_AS, mapped + limits.memory_bytes + HEADROOM_BYTES)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + limits.threads * limits.seconds
    _lower(resource.RLIMIT_CPU, math.ceil(seconds) + CPU_MARGIN_S, more=1)
    _lower(resource.RLIMIT_FSIZE, 0)


def _lower(limit: int, most: int, more: int = 0) -> None:
    """more: up to the hard limit, at which a process that took its time of a processor is killed unnamed."""
    _, hard = resource.getrlimit(limit)
    end = most + more if hard == resource.RLIM_INFINITY else min(most + more, hard)
    resource.setrlimit(limit, (min(most, end), end))


def _mapped_bytes() -> int | None:
    """Return how much address space this process has by now; None where only Linux would say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return None
