"""Who sends bombs or sends slowly takes no more memory than a request may, and keeps nobody else out."""

from __future__ import annotations

import contextlib
import gzip
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import httpx
import pytest
from otlp_in_kit import Collector, normal, port_of, spans

from insitu_collector.otlp.bodies import MAX_JSON_VALUES
from insitu_collector.otlp.http_server import Patience
from insitu_collector.otlp.limits import MAX_RECORD_BYTES, MAX_REQUEST_BYTES
from insitu_collector.otlp.ports import listener
from insitu_collector.otlp.signals import TRACES
from insitu_collector.otlp.wire import entry
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

pytestmark = pytest.mark.matrix

MIB: Final = 1 << 20
CHUNK: Final = bytes(16 * MIB)
PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}
GZIP: Final = {"Content-Encoding": "gzip"}


def bomb(num_chunks: int) -> bytes:
    """Return gzip, in one member, of so many times 16 MiB of zeros."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = squeeze.compress(CHUNK) + squeeze.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(num_chunks):
        crc = zlib.crc32(CHUNK, crc)
    head = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    return head + block * num_chunks + squeeze.flush() + struct.pack("<II", crc, num_chunks * len(CHUNK))


def test_the_bomb_is_gzip() -> None:
    assert gzip.decompress(bomb(2)) == CHUNK * 2


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    running = Collector(tmp_path / "store")
    try:
        yield running
    finally:
        running.close()


def over_grpc(address: str, body: bytes, compression: grpc.Compression | None = None) -> grpc.StatusCode:
    """Send one request; return how it was answered."""
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(address, options=options, compression=compression) as channel:
        try:
            channel.unary_unary(f"/{TRACES.service}/Export", None, None)(body, timeout=60)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


IN_JSON: Final = {"Content-Type": "application/json"}
OK: Final = spans(3).SerializeToString()


def warm(collector: Collector) -> int:
    """Send a request each way; return the most memory until then."""
    assert over_grpc(collector.grpc, OK) is grpc.StatusCode.OK
    assert post(collector, OK, PROTOBUF) == 200
    return collector.peak_bytes()


def post(collector: Collector, body: bytes, headers: dict[str, str]) -> int:
    return httpx.post(f"{collector.http}/v1/traces", content=body, headers=headers, timeout=60).status_code


def ends_well(collector: Collector, before: int, most: int, store: Path) -> None:
    """Say that no more memory was taken than `most`, and that others are served."""
    grown = collector.peak_bytes() - before
    assert grown <= most, f"{grown >> 20} MiB more than before"
    assert over_grpc(collector.grpc, OK) is grpc.StatusCode.OK
    assert collector.end() == 0
    found = [normal(each) for each in open_store(store).otlp("spans")]
    assert found == [normal(spans(3))] * 3


def test_row_18_bombs_are_refused_within_the_memory_of_a_request(collector: Collector, tmp_path: Path) -> None:
    before = warm(collector)
    gib = bomb(64)
    assert post(collector, gib, PROTOBUF | GZIP) == 413
    assert post(collector, gib, IN_JSON | GZIP) == 413
    assert post(collector, gzip.compress(CHUNK) * 64, PROTOBUF | GZIP) == 413
    assert over_grpc(collector.grpc, gib) is grpc.StatusCode.RESOURCE_EXHAUSTED
    unpacked = bytes(192 * MIB)  # gRPC's own gzip: what it sends is small
    assert over_grpc(collector.grpc, unpacked, grpc.Compression.Gzip) is grpc.StatusCode.RESOURCE_EXHAUSTED
    ends_well(collector, before, MAX_REQUEST_BYTES + 64 * MIB, tmp_path / "store")


def test_messages_whose_objects_would_be_a_hundred_times_their_bytes_take_a_few_times_as_much(
    collector: Collector, tmp_path: Path
) -> None:
    before = warm(collector)
    for num, status in ((MAX_JSON_VALUES // 2 - 9, 200), (MAX_JSON_VALUES, 400), (4 * MIB, 400)):
        assert post(collector, b'{"resourceSpans":[' + b"{}," * num + b"{}]}", IN_JSON) == status
    spans_of_nothing = entry(1, entry(2, b"\x12\x00" * (7 * MIB)))
    assert over_grpc(collector.grpc, spans_of_nothing) is grpc.StatusCode.INVALID_ARGUMENT
    attributes_of_nothing = entry(1, entry(2, entry(2, b"\x4a\x00" * (MAX_RECORD_BYTES // 2 - 4)) * 14))
    assert over_grpc(collector.grpc, attributes_of_nothing) is grpc.StatusCode.OK, "in part: each is rejected"
    ends_well(collector, before, 9 * MAX_REQUEST_BYTES, tmp_path / "store")


def slow_heads(num: int, address: tuple[str, int]) -> list[socket.socket]:
    """Return connections that have begun to send a head, and no more."""
    return [begun(address, b"POST /v1/traces HTTP/1.1\r\nHost: x\r\n") for _ in range(num)]


def slow_bodies(num: int, address: tuple[str, int]) -> list[socket.socket]:
    """Return connections that have sent a head and the first byte of a body."""
    head = b"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n"
    return [begun(address, head + b"Content-Length: 1000000\r\n\r\n\n") for _ in range(num)]


def begun(address: tuple[str, int], data: bytes) -> socket.socket:
    connection = socket.create_connection(address)
    connection.sendall(data)
    return connection


def drip(connections: list[socket.socket], within_s: float) -> int:
    """Send one byte after the other on each until the collector has ended all; return how many it has not by then."""
    deadline = time.monotonic() + within_s
    open_ones = set(connections)
    while open_ones and time.monotonic() < deadline:
        for connection in list(open_ones):
            try:
                connection.send(b"a")
            except OSError:
                open_ones.discard(connection)
        ended, _, _ = select.select(list(open_ones), [], [], 0.2)
        for connection in ended:
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass
            open_ones.discard(connection)
    for connection in connections:
        connection.close()
    return len(open_ones)


@contextlib.contextmanager
def patient(store: Path, patience: Patience) -> Iterator[tuple[str, int]]:
    """A collector whose HTTP port bears so much; yields its address."""
    http = listener("127.0.0.1", 0)
    with CollectorServer(store, port=0) as server:
        assert server.otlp is not None
        server.otlp.listen(http, patience)
        yield "127.0.0.1", port_of(http)


def is_served(address: tuple[str, int]) -> bool:
    url = f"http://{address[0]}:{address[1]}/v1/traces"
    return httpx.post(url, content=spans(2).SerializeToString(), headers=PROTOBUF, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("num", "patience"),
    [
        pytest.param(60, Patience(head_s=1.0, body_s=1.0, max_connections=40), id="60"),
        pytest.param(450, Patience(), id="450", marks=pytest.mark.soak),
    ],
)
def test_row_19_clients_that_send_a_byte_at_a_time_keep_nobody_out_and_are_ended(
    tmp_path: Path, num: int, patience: Patience
) -> None:
    with patient(tmp_path / "store", patience) as address:
        num_threads = threading.active_count()
        slow = slow_heads(num // 2, address) + slow_bodies(num // 2, address)
        assert is_served(address), "more clients than connections, all of them slow: one that is not is served"
        assert threading.active_count() <= num_threads + 4, "no thread for each"
        assert drip(slow, within_s=60) == 0
        assert is_served(address)
    assert open_store(tmp_path / "store").table("spans").num_rows == 4


def test_row_19_a_body_that_does_not_come_in_time_is_told_so(tmp_path: Path) -> None:
    with patient(tmp_path / "store", Patience(body_s=0.3)) as address:
        (connection,) = slow_bodies(1, address)
        with connection:
            connection.settimeout(30)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
        assert b"the body had not come after 0.3 s" in answer
