"""A forked child's call is made by a program of its own: same replies, same errors, and it ends with either."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wait_kit import until

from insitu.credentials import NONE, CredentialError, Credentials
from insitu.exporters import Batch
from insitu.exporters.relay import RelayedCall
from insitu.exporters.relay_frames import Kind, read_frame, write_frame
from insitu.exporters.window import Pending
from insitu.identity import Source
from insitu.records import TABLES, schema_of, table_spec
from insitu.wire.address import Address
from insitu.wire.insitu_pb2 import DURABLE, Hello, ToCollector
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

SOURCE = Source(epoch=7, rank=0)


def messages(over: threading.Event) -> Iterator[ToCollector]:
    """Say hello, ship one row, and stay until it is over."""
    digests = [table_spec(table).digest.to_bytes(8, "big") for table in TABLES]
    yield ToCollector(hello=Hello(protocol=1, epoch=7, source=SOURCE.labels(), schemas=digests))
    row = {"epoch": 7, "rank": 0, "stage": 0, "row_seq": 0, "t_ns": 0, "kind": "incident", "text": ""}
    rows = pa.RecordBatch.from_pylist([row], schema=schema_of("events"))
    yield ToCollector(frame=Pending.of(Batch(7, 0, rows, "events")).frame())
    assert over.wait(30)


def call_of(address: str, over: threading.Event, credentials: Credentials = NONE) -> RelayedCall:
    return RelayedCall(Address.of(address), credentials, (), messages(over))


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=100))), st.integers(0, 200))
def test_frames_are_read_as_they_were_written_and_a_torn_one_is_the_end(
    frames: list[tuple[Kind, bytes]], cut: int
) -> None:
    file = io.BytesIO()
    ends = [0]
    for kind, body in frames:
        write_frame(file, kind, body)
        ends.append(file.tell())
    whole = file.getvalue()[: len(file.getvalue()) - cut] if cut < len(file.getvalue()) else b""
    file = io.BytesIO(whole)
    found = []
    while (frame := read_frame(file)) is not None:
        found.append(frame)
    assert found == frames[: sum(end <= len(whole) for end in ends[1:])]


def test_what_is_shipped_is_stored_and_acknowledged_and_a_call_that_is_over_ends_well(tmp_path: Path) -> None:
    over = threading.Event()
    with CollectorServer(tmp_path / "store", port=0) as server:
        call = call_of(server.address, over)
        replies = iter(call)
        while (reply := next(replies)).ack.level != DURABLE:
            pass
        assert (reply.ack.stream, reply.ack.seq) == (table_spec("events").stream, 0)
        over.set()
        assert [reply.WhichOneof("m") for reply in replies] == []
        call.cancel()
        call.cancel()
        until(lambda: server.health.load().num_streams == 0, "its place is free")
    assert open_store(tmp_path / "store").table("events")["kind"].to_pylist() == ["incident"]


def test_a_call_that_is_cancelled_ends_at_the_collector_too(tmp_path: Path) -> None:
    over = threading.Event()
    with CollectorServer(tmp_path / "store", port=0) as server:
        call = call_of(server.address, over)
        replies = iter(call)
        next(replies)
        call.cancel()
        with pytest.raises(grpc.RpcError, match="has ended"):
            list(replies)
        until(lambda: server.health.load().num_streams == 0, "its place is free")
    over.set()


def test_a_status_comes_back_with_what_it_says() -> None:
    over = threading.Event()
    call = call_of("grpc://127.0.0.1:9", over)
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    over.set()
    call.cancel()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:9" in (raised.value.details() or "")


def test_it_does_not_outlive_the_child_where_the_collector_ends_nothing() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        call = call_of(f"grpc://127.0.0.1:{deaf.getsockname()[1]}", over)
        over.set()  # nothing more comes, as where the child has died
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    call.cancel()
    assert raised.value.code() is grpc.StatusCode.CANCELLED


def test_what_a_site_prints_at_every_start_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('x' * 100, flush=True); sys.stderr.write('y')")
    monkeypatch.syspath_prepend(str(tmp_path))
    test_a_status_comes_back_with_what_it_says()


def test_credentials_that_cannot_be_used_are_said_as_ever(tmp_path: Path) -> None:
    over = threading.Event()
    call = call_of("grpc://127.0.0.1:9", over, Credentials(token_file=str(tmp_path / "none")))
    with pytest.raises(CredentialError, match=r"^token_file .*none cannot be read: .*; see INSITU_TOKEN_FILE$"):
        list(call)
    over.set()
    call.cancel()
