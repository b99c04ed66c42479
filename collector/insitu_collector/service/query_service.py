"""Reading the store through the collector's port: who may, how much at once, and for how long."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pyarrow as pa

from insitu.segments.erased_file import ErasedUnreadable
from insitu.segments.layout import GONE, StoreGone
from insitu.wire.insitu_pb2 import Look, Part, RowsQuery, SqlQuery, TablesAnswer, TablesQuery
from insitu.wire.insitu_pb2_grpc import QueryServicer
from insitu_collector.access.gate import Gate, Role
from insitu_collector.health.readiness import REMEDIES, Trouble
from insitu_collector.query import rows, sql
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import Counted, end_of, parts_of
from insitu_collector.query.sql_process import SqlProcesses
from insitu_collector.query.wire_form import from_message
from insitu_collector.rows.selection import NothingFound
from insitu_collector.service.following import Following
from insitu_collector.store import Store, open_store

MOST_AT_ONCE: Final = 4
"""Questions that are answered at the same time; whoever comes meanwhile is told to try again."""
MOST_FOLLOWERS: Final = 16
"""Calls that follow the store at the same time: one a dashboard, however many look at that."""
LONGEST_S: Final = 300.0
"""An answer that takes longer is ended, however slowly it is read."""
REMEDY: Final = "who reads the store needs the role `read`; callers on the collector's own host have it"


class QueryService(QueryServicer):  # type: ignore[misc]  # the generated base has no types
    """Answers questions about one store. Memory is bounded: an answer is made as fast as it is taken."""

    def __init__(
        self,
        store: Path,
        gate: Gate,
        limits: sql.Limits | None = None,
        has_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """has_gone: whether the store was removed or replaced since it is written; what is there then is no answer."""
        self.limits = limits or sql.Limits()
        self._path = store
        self._has_gone = has_gone
        self._gate = gate
        self._store: Store | None = None
        self._processes = SqlProcesses()
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._places = threading.BoundedSemaphore(MOST_FOLLOWERS)
        self._followers: set[Any] = set()
        """Calls that last until somebody ends them."""
        self._is_closed = False

    def Tables(self, query: TablesQuery, context: Any) -> TablesAnswer:
        """Say which tables have segments, and when one was last written."""
        self._gate.require(context, Role.READ, REMEDY)
        with self._told(context):
            store = self._opened()
            answer = TablesAnswer(tables=store.tables(), last_written_unix_ns=store.last_written_ns())
            self._check_there()
        return answer

    def Rows(self, query: RowsQuery, context: Any) -> Iterator[Part]:
        """Send rows of a table that are meant."""
        with self._turn(context) as tenant:
            hidden, reading = Counter[int](), self._opened().reading(tenant)
            yield from self._answer(context, *_rows(reading, query, hidden), hidden)

    def Sql(self, query: SqlQuery, context: Any) -> Iterator[Part]:
        """Send the rows of one SELECT, which runs in a process of its own."""
        with self._turn(context) as tenant:
            over = _when_over(context)
            parts = self._processes.parts(self._opened(), tenant, query.query, self.limits, over)
            with closing(parts):
                yield from self._sent(context, parts)

    def Follow(self, looks: Iterator[Look], context: Any) -> Iterator[Part]:
        """Answer look after look by what is new."""
        caller = self._gate.require(context, Role.READ, REMEDY)
        with (
            _place(self._places, context, f"{MOST_FOLLOWERS} readers follow this store, and no more can"),
            self._gate.watched(caller, context.cancel),
            self._following(context),
            self._told(context),
            closing(Following(self._opened(), caller.tenant)) as following,
        ):
            for look in looks:
                yield from self._sent(context, following.answer(look))

    def end_followers(self) -> None:
        """End the calls that would last; who follows may come again."""
        with self._lock:
            self._is_closed = True
            followers = list(self._followers)
        for context in followers:
            context.cancel()

    def close(self) -> None:
        """End those too, and the processes of queries."""
        self.end_followers()
        self._processes.close()

    @contextmanager
    def _following(self, context: Any) -> Iterator[None]:
        with self._lock:
            self._followers.add(context)
            is_closed = self._is_closed
        try:
            if is_closed:
                context.cancel()
            yield
        finally:
            with self._lock:
                self._followers.discard(context)

    @contextmanager
    def _turn(self, context: Any) -> Iterator[str]:
        """Give whose rows the caller sees; end the call, in one line, where it cannot be answered."""
        caller = self._gate.require(context, Role.READ, REMEDY)
        busy = f"{MOST_AT_ONCE} questions are being answered here"
        with _place(self._turns, context, busy), self._told(context):
            yield caller.tenant

    def _answer(
        self, context: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch], hidden: Counter[int]
    ) -> Iterator[Part]:
        counted = Counted(batches)
        yield from self._sent(context, parts_of(schema, counted))
        yield end_of(counted.num_rows, self._opened().num_damaged, hidden)

    def _sent(self, context: Any, parts: Iterator[Part]) -> Iterator[Part]:
        """Yield the messages of an answer as long as they are of the store. Raises as `_in_time`, and StoreGone."""
        for part in _in_time(context, parts):
            self._check_there()  # after it was read: files that have gone would be taken for none
            yield part

    def _check_there(self) -> None:
        if self._has_gone():
            raise StoreGone(REMEDIES[Trouble.STORE_GONE])

    @contextmanager
    def _told(self, context: Any) -> Iterator[None]:
        """End the call, in one line, where what was asked cannot be answered."""
        try:
            yield
        except (BadQuestion, sql.QueryFailed, LookupError, ErasedUnreadable, StoreGone, *GONE) as error:
            why = StoreGone(REMEDIES[Trouble.STORE_GONE]) if self._has_gone() else error  # whatever was found of it
            if isinstance(why, GONE):
                raise
            context.abort(*_refusal(why))

    def _opened(self) -> Store:
        """Return the store. Raises StoreGone, and QueryFailed where there is none yet."""
        self._check_there()
        try:
            with self._lock:
                if self._store is None:
                    self._store = open_store(self._path)
                return self._store
        except FileNotFoundError:
            raise sql.QueryFailed(sql.STORE_AWAY) from None


@contextmanager
def _place(places: threading.BoundedSemaphore, context: Any, full: str) -> Iterator[None]:
    """Hold one of some places; end the call where none is left."""
    if not places.acquire(blocking=False):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{full}; ask again when one of them is done")
    try:
        yield
    finally:
        places.release()


def _refusal(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends that cannot be answered, and its one line."""
    if isinstance(error, sql.QueryTooLarge):
        return grpc.StatusCode.OUT_OF_RANGE, str(error)
    if isinstance(error, BadQuestion):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, ErasedUnreadable | StoreGone):
        return grpc.StatusCode.FAILED_PRECONDITION, str(error)
    if isinstance(error, sql.QueryFailed):
        return grpc.StatusCode.INTERNAL, str(error)
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return grpc.StatusCode.NOT_FOUND if isinstance(error, NothingFound) else grpc.StatusCode.INVALID_ARGUMENT, text


def _in_time(context: Any, parts: Iterator[Part]) -> Iterator[Part]:
    """Yield the messages of one answer as far as somebody takes them. Raises QueryTooLarge when it takes too long."""
    late_s = time.monotonic() + LONGEST_S
    for part in parts:
        if time.monotonic() > late_s:
            raise sql.QueryTooLarge(f"the answer took more than {LONGEST_S:g} s; ask for less at a time")
        if not context.is_active():
            return
        yield part


def _rows(reading: rows.Rows, query: RowsQuery, hidden: Counter[int]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if query.as_stored:
        since = query.begin_unix_ns if query.HasField("begin_unix_ns") else None
        return reading.stored_schema(query.table), reading.stored(query.table, since, hidden)
    asked = from_message(query)
    return rows.Question(reading, query.table, asked).schema, reading.batches(query.table, asked)


def _when_over(context: Any) -> Callable[[Callable[[], None]], None]:
    """Return what registers a function to be called when the call is over, given up or out of time."""

    def register(end: Callable[[], None]) -> None:
        if not context.add_callback(end):
            end()

    return register
