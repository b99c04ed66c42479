"""The store of a collector, read through its port: what `Store` answers, without a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import pyarrow as pa

from insitu.credentials import NONE, Credentials
from insitu.records import TABLES, schema_of, with_todays_columns
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.insitu_pb2 import Look, Part, RowsQuery, SqlQuery, TablesAnswer, TablesQuery
from insitu.wire.insitu_pb2_grpc import QueryStub
from insitu.wire.refusals import why_refused
from insitu_collector.query.asked import EVERY_RUN, Asked, BadQuestion, checked_query
from insitu_collector.query.directory import Directory
from insitu_collector.query.parts import Answer
from insitu_collector.query.payloads import Piece, RowGone, held_of
from insitu_collector.query.remote_tail import RemoteTail
from insitu_collector.query.sql import QueryTooLarge
from insitu_collector.query.tensors import Tensors
from insitu_collector.rows.selection import NothingFound
from insitu_collector.store import Store

if TYPE_CHECKING:
    from insitu_collector.query.asked import Time

TIMEOUT_S: Final = 300.0
"""Of one answer; a collector ends it by then."""
CONNECT_S: Final = 5.0
"""Longest that one attempt to connect takes: 20 s otherwise."""
MOST_ROWS_AT_ONCE: Final = 4096
"""Of rows whose values are asked for by number."""
_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries anew, and not when the last one would have
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_S * 1000)),
    ("grpc.keepalive_time_ms", 10_000),  # a collector that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
)
_REFUSED: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
_PIECE_COLUMNS: Final = ("epoch", "row_seq", "data")


class RemoteStore(Store):
    """A collector's store. Raises as `Store` does; ConnectionError, PermissionError and TimeoutError, one line each,
    where the collector cannot be reached, does not let the caller read, or does not answer in time.

    Values are copies.
    """

    def __init__(self, url: str, credentials: Credentials = NONE, timeout_s: float = TIMEOUT_S) -> None:
        """url: `grpc://host:port`, or with TLS `grpcs://host:port`. Raises ValueError, one line, where it is neither,
        and CredentialError."""
        super().__init__(Path(url))
        self.url = self.name = url
        self._rows = RemoteRows(Address.of(url), credentials, timeout_s)

    def check(self) -> None:
        """Raise where the collector cannot be asked now."""
        self.tables()

    def tables(self) -> list[str]:
        """Return the tables that have segments."""
        found = set(self._rows.tables().tables)
        return [table for table in TABLES if table in found]

    def last_written_ns(self) -> int:
        """Return when a segment was last written, on the collector's clock; 0 where none is there."""
        return int(self._rows.tables().last_written_unix_ns)

    def table(self, name: str) -> pa.Table:
        """Return every row of a table as it is now, with today's columns."""
        return pa.Table.from_batches(self.scan(name), schema=schema_of(name))

    def scan(self, name: str, since_unix_ns: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a table as they are now, as `Store.scan` does."""
        hidden = Counter[tuple[str, int]]()
        yield from self._rows.stored(name, since_unix_ns, hidden)
        self.hidden = hidden

    def sql(self, query: str) -> pa.Table:
        """Run one SELECT there, within the collector's bounds, and return its rows."""
        return self._rows.sql(checked_query(query))

    def rows(
        self, table: str, t0: Time | None = None, t1: Time | None = None, run: str = "", **asked: Any
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows of any table, as `Store.rows` does."""
        return self._rows.batches(table, Asked(t0=t0, t1=t1, run=run, **asked))

    def reading(self, tenant: str = "") -> Any:
        """Return what answers questions: the collector, which knows whose rows are shown."""
        return self._rows

    def tail(
        self, tables: Iterable[str] | None = None, since_unix_ns: int | None = None, skip: object = None
    ) -> RemoteTail:
        """Return a reader of what is new, as `Store.tail` does; skip: not used, only the collector sees segments."""
        return RemoteTail(self._rows, TABLES if tables is None else tables, since_unix_ns)

    @property
    def bytes_read(self) -> int:
        """Bytes of answers so far, as they came over the network but for gRPC's own."""
        return self._rows.bytes_read

    @property
    def num_damaged(self) -> int:
        """How many stretches of its files the collector could not read, as the last whole answer says."""
        return self._rows.num_damaged

    def close(self) -> None:
        """Let go of the connection, from any thread: a question that waits for its answer fails."""
        self._rows.close()

    def _tensors(self) -> Tensors:
        return Tensors(self.reading, _RemotePayloads(self._rows))


class RemoteRows:
    """Asks a collector."""

    def __init__(self, address: Address, credentials: Credentials, timeout_s: float) -> None:
        self._address = address
        self._credentials = credentials
        self._channel = self._open()
        self._is_refused = self._is_closed = False
        self._timeout_s = timeout_s
        self.num_damaged = 0
        self.bytes_read = 0

    @property
    def directory(self) -> Directory:
        """Who wrote what, as the collector knows it now."""
        sources, clocks, sites = (
            pa.Table.from_batches(self.stored(name), schema=schema_of(name)) for name in ("sources", "clocks", "sites")
        )
        return Directory(str(self._address), sources, clocks, sites)

    def tables(self) -> TablesAnswer:
        with self._told():
            found: TablesAnswer = self._stub.Tables(TablesQuery(), timeout=self._timeout_s)
        return found

    def batches(self, table: str, asked: Asked) -> Iterator[pa.RecordBatch]:
        return self._ask(_question(table, asked)).batches()

    def table(self, table: str, asked: Asked) -> pa.Table:
        answer = self._ask(_question(table, asked))
        return pa.Table.from_batches(answer.batches(), schema=answer.schema)

    def stored(
        self, table: str, since_unix_ns: int | None = None, hidden: Counter[tuple[str, int]] | None = None
    ) -> Iterator[pa.RecordBatch]:
        schema = schema_of(table)
        query = RowsQuery(table=table, as_stored=True)
        if since_unix_ns is not None:
            query.begin_unix_ns = since_unix_ns
        answer = self._ask(query)
        for batch in answer.batches():
            yield with_todays_columns(batch, schema)
        if hidden is not None:
            hidden.update({(table, each.epoch): each.num_rows for each in answer.end.hidden})

    def sql(self, query: str) -> pa.Table:
        with self._told():
            answer = Answer(self._parts(self._stub.Sql(SqlQuery(query=query), timeout=self._timeout_s)))
            return pa.Table.from_batches(answer.batches(), schema=answer.schema)

    def follow(self, looks: Iterator[Look]) -> Generator[Part]:
        """Yield what answers the looks, in their order; to close it ends the call."""
        return self._parts(self._stub.Follow(looks))

    def close(self) -> None:
        self._is_closed = True
        self._channel.close()

    def _open(self) -> grpc.Channel:
        return open_channel(self._address, self._credentials, _OPTIONS)

    @property
    def _stub(self) -> Any:
        """What calls the collector: with what the files of the credentials hold now, where the last call failed."""
        if self._is_closed:
            raise ConnectionError(f"{self._address} was let go of; open it again")
        if self._is_refused:
            self._channel.close()
            self._channel, self._is_refused = self._open(), False
        return QueryStub(self._channel)

    def _ask(self, query: RowsQuery) -> Answer:
        return Answer(self._parts(self._stub.Rows(query, timeout=self._timeout_s)))

    def _parts(self, call: Any) -> Generator[Part]:
        """Yield what comes; whoever stops listening ends the call."""
        try:
            with self._told():
                for part in call:
                    self.bytes_read += part.ByteSize()
                    if part.HasField("end"):
                        self.num_damaged = part.end.num_damaged
                    yield part
        finally:
            call.cancel()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            self._is_refused = error.code() in _REFUSED
            raise _error(self._address, error) from None


class _RemotePayloads:
    """Fetches values of rows by their numbers."""

    def __init__(self, rows: RemoteRows) -> None:
        self._rows = rows

    def pieces(self, rows: Sequence[tuple[int, int]]) -> list[Piece]:
        found: dict[tuple[int, int], Piece] = {}
        for epoch in dict.fromkeys(epoch for epoch, _ in rows):
            numbers = [row_seq for each, row_seq in rows if each == epoch]
            for at in range(0, len(numbers), MOST_ROWS_AT_ONCE):
                found |= self._fetch(epoch, numbers[at : at + MOST_ROWS_AT_ONCE])
        missing = [row for row in rows if row not in found]
        if missing:
            raise RowGone(f"no captured row {missing[0][1]} of epoch {missing[0][0]}; it has expired meanwhile")
        return [found[row] for row in rows]

    def row(self, epoch: int, row_seq: int) -> tuple[dict[str, Any], Piece]:
        columns = (*_PIECE_COLUMNS, "dtype", "shape")
        for batch in self._rows.batches("captures", _numbered(epoch, [row_seq], columns)):
            (row,) = batch.drop_columns(["data"]).to_pylist()
            return row, Piece(held_of(batch, epoch), 0, len(batch["data"][0].as_buffer()))
        raise RowGone(f"no captured row {row_seq} of epoch {epoch}; it was never stored, or has expired")

    def _fetch(self, epoch: int, row_seqs: Sequence[int]) -> dict[tuple[int, int], Piece]:
        found: dict[tuple[int, int], Piece] = {}
        for batch in self._rows.batches("captures", _numbered(epoch, row_seqs, _PIECE_COLUMNS)):
            held = held_of(batch, epoch)
            numbers = np.asarray(batch["row_seq"]).tolist()
            found |= {(epoch, number): Piece(held, *held.stretch(place)) for place, number in enumerate(numbers)}
        return found


def _numbered(epoch: int, row_seqs: Sequence[int], columns: Sequence[str]) -> Asked:
    return Asked(run=EVERY_RUN, epoch=epoch, row_seqs=row_seqs, columns=columns)


def _question(table: str, asked: Asked) -> RowsQuery:
    from insitu_collector.query.rows import asked_schema
    from insitu_collector.query.wire_form import to_message

    asked.check(table)
    asked_schema(table, asked)  # raises where a column is not there
    return to_message(table, replace(asked, columns=None if asked.columns is None else tuple(asked.columns)))


def _error(url: Address, error: Any) -> Exception:
    code, text = error.code(), error.details() or ""
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return BadQuestion(text)
    if code == grpc.StatusCode.OUT_OF_RANGE:
        return QueryTooLarge(text)
    if code == grpc.StatusCode.NOT_FOUND:
        return NothingFound(text)
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return PermissionError(why_refused(url, code, text) or text)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(f"{url} did not answer in time; ask for less at a time")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ConnectionError(f"{url} answers no questions: an older collector, or none of ours; update it")
    if code == grpc.StatusCode.UNAVAILABLE:
        if (why := why_refused(url, code, text, CONNECT_S)) is not None:
            return ConnectionError(why)
        return ConnectionError(f"no collector answers at {url}; start one with insitu collect, or open its folder")
    return ConnectionError(f"{url}: {text or code.name.lower()}")
