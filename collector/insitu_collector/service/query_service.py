"""Reading the store through the collector's port: who may, how much at once, and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pyarrow as pa

from insitu.segments.erased_file import ErasedUnreadable
from insitu.wire.insitu_pb2 import Part, RowsQuery, SqlQuery, TablesAnswer, TablesQuery
from insitu.wire.insitu_pb2_grpc import QueryServicer
from insitu_collector.access.gate import Gate, Role
from insitu_collector.query import rows, sql
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import end_of, parts_of
from insitu_collector.query.wire_form import from_message
from insitu_collector.rows.selection import NothingFound
from insitu_collector.store import Store, open_store

MOST_AT_ONCE: Final = 4
"""Questions that are answered at the same time; whoever comes meanwhile is told to try again."""
LONGEST_S: Final = 300.0
"""An answer that takes longer is ended, however slowly it is read."""
REMEDY: Final = "who reads the store needs the role `read`; callers on the collector's own host have it"


class QueryService(QueryServicer):  # type: ignore[misc]  # the generated base has no types
    """Answers questions about one store. Memory is bounded: an answer is made as fast as it is taken."""

    def __init__(self, store: Path, gate: Gate, limits: sql.Limits | None = None) -> None:
        self.limits = limits or sql.Limits()
        self._path = store
        self._gate = gate
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(MOST_AT_ONCE)

    def Tables(self, query: TablesQuery, context: Any) -> TablesAnswer:
        """Say which tables have segments."""
        self._gate.require(context, Role.READ, REMEDY)
        return TablesAnswer(tables=self._opened().tables())

    def Rows(self, query: RowsQuery, context: Any) -> Iterator[Part]:
        """Send rows of a table that are meant."""
        with self._turn(context) as reading:
            yield from self._answer(context, *_rows(reading, query))

    def Sql(self, query: SqlQuery, context: Any) -> Iterator[Part]:
        """Send the rows of one SELECT."""
        with self._turn(context) as reading:
            batches = sql.stream(reading, query.query, self.limits, _when_over(context))
            yield from self._answer(context, next(batches).schema, batches)

    @contextmanager
    def _turn(self, context: Any) -> Iterator[rows.Rows]:
        """Give what the caller may see; end the call, in one line, where that cannot be."""
        caller = self._gate.require(context, Role.READ, REMEDY)
        if not self._turns.acquire(blocking=False):
            busy = f"{MOST_AT_ONCE} questions are being answered here; ask again when one of them is done"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, busy)
        try:
            yield self._opened().reading(caller.tenant)
        except sql.QueryTooLarge as error:
            context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error))
        except BadQuestion as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ErasedUnreadable as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except LookupError as error:
            text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
            code = grpc.StatusCode.NOT_FOUND if isinstance(error, NothingFound) else grpc.StatusCode.INVALID_ARGUMENT
            context.abort(code, text)
        finally:
            self._turns.release()

    def _answer(self, context: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[Part]:
        counted = _Counted(batches)
        late_s = time.monotonic() + LONGEST_S
        for part in parts_of(schema, counted):
            if time.monotonic() > late_s:
                raise sql.QueryTooLarge(f"the answer took more than {LONGEST_S:g} s; ask for less at a time")
            if not context.is_active():
                return
            yield part
        yield end_of(counted.num_rows, len(self._opened().all_damage))

    def _opened(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = open_store(self._path)
            return self._store


class _Counted:
    """Batches, and how many rows they had."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.num_rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.num_rows += batch.num_rows
            yield batch


def _rows(reading: rows.Rows, query: RowsQuery) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if query.as_stored:
        since = query.begin_unix_ns if query.HasField("begin_unix_ns") else None
        return reading.stored_schema(query.table), reading.stored(query.table, since)
    asked = from_message(query)
    return rows.Question(reading, query.table, asked).schema, reading.batches(query.table, asked)


def _when_over(context: Any) -> Callable[[Callable[[], None]], None]:
    """Return what registers a function to be called when the call is over, given up or out of time."""

    def register(end: Callable[[], None]) -> None:
        if not context.add_callback(end):
            end()

    return register
