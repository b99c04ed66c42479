"""The limits of a collector over real gRPC: what is beyond them is refused and counted, and all others are served."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from slow_kit import IdleStreams, Trickle
from wait_kit import until
from wire_kit import STREAM, Client, events, frame, hello, row_seqs, ship

from insitu.credentials import Credentials
from insitu.exporters import Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.intake import Intake, IntakeLimits, Quota, Quotas
from insitu.vocabulary import DropReason, FrameDefect, HangUp
from insitu.wire.insitu_pb2 import DURABLE, Hello, ToCollector, ToProbe
from insitu_collector.access.gate import Access, Role
from insitu_collector.access.token_file import append_entry
from insitu_collector.access.tokens import Entry, digest_of, new_token
from insitu_collector.admission.admission import WINDOW_BYTES
from insitu_collector.service.listening import SPARE_CALLS
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

pytestmark = pytest.mark.matrix

MIB: Final = 1 << 20
INVALID: Final = str(DropReason.REFUSED_INVALID)


@contextmanager
def collector(
    store: Path, limits: IntakeLimits | None = None, quotas: Quotas | None = None, access: Access | None = None
) -> Iterator[CollectorServer]:
    intake = Intake(limits or IntakeLimits(), quotas or Quotas())
    with CollectorServer(store, port=0, intake=intake, access=access) as server:
        yield server


def status_of(client: Client) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends; it is not the client that ends it."""
    with pytest.raises(grpc.RpcError) as error:
        list(client.replies)
    status: Any = error.value  # what a call raises is itself the call
    return status.code(), status.details()


# -- row 16: wrong frames ------------------------------------------------------------------------------------------


def changed(**fields: int) -> ToCollector:
    message = frame(events(0))
    for name, value in fields.items():
        setattr(message.frame, name, value)
    return message


def with_body(body: bytes) -> ToCollector:
    message = frame(events(0))
    message.frame.body, message.frame.crc32 = body, zlib.crc32(body)
    return message


WRONG: Final[dict[FrameDefect, Callable[[], ToCollector]]] = {
    FrameDefect.TOO_LONG: lambda: with_body(bytes(65 << 10)),
    FrameDefect.CHECKSUM: lambda: changed(crc32=1),
    FrameDefect.UNKNOWN_SCHEMA: lambda: changed(schema=1),
    FrameDefect.SEQ: lambda: changed(seq=1 << 63),
    FrameDefect.NOT_A_BATCH: lambda: with_body(b"x" * 100),
    FrameDefect.NUM_ROWS: lambda: changed(num_rows=9),
    FrameDefect.IDENTITY: lambda: frame(events(0, epoch=8)),
    FrameDefect.UNKNOWN_KIND: lambda: ToCollector.FromString(b"\x7a\x01x"),
}


@pytest.mark.parametrize("defect", WRONG)
def test_row_16_a_wrong_frame_is_refused_for_good_and_counted_and_its_stream_lives(
    tmp_path: Path, defect: FrameDefect
) -> None:
    with collector(tmp_path, IntakeLimits(frame=64 << 10)) as server:
        client = Client(server)
        client.send(hello(), WRONG[defect](), frame(events(1)))
        replies = client.until_durable(1)
        refusals = [reply.refusal for reply in replies if reply.WhichOneof("m") == "refusal"]
        if defect is FrameDefect.UNKNOWN_KIND:  # it has no number that could be refused
            assert refusals == []
        else:
            assert [(refusal.reason, refusal.retry) for refusal in refusals] == [(INVALID, False)]
        counted = server.health.report().totals.refused
        assert {key: taken.frames for key, taken in counted.items()} == {(INVALID, str(defect)): 1}
        client.close()
    assert row_seqs(tmp_path) == [1]


def test_row_16_a_frame_that_came_before_or_left_a_hole_is_no_mistake(tmp_path: Path) -> None:
    with collector(tmp_path) as server:
        client = Client(server)
        client.send(hello(), frame(events(0)), frame(events(0)), frame(events(5)))
        client.until_durable(5)
        totals = server.health.report().totals
        assert (totals.refused, totals.num_repeated) == ({}, 1)
        client.close()
    assert row_seqs(tmp_path) == [0, 5]


def test_row_16_a_newer_protocol_is_told_so_and_others_go_on(tmp_path: Path) -> None:
    with collector(tmp_path) as server:
        newer, client = Client(server), Client(server)
        newer.send(hello(protocol=2))
        code, text = status_of(newer)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "update the older one" in text
        client.send(hello(), frame(events(0)))
        client.until_durable(0)
        assert server.health.report().totals.hung_up == {str(HangUp.PROTOCOL): 1}
        for each in (newer, client):
            each.close()


def test_labels_are_bounded_in_number_and_length(tmp_path: Path) -> None:
    with collector(tmp_path) as server:
        for labels in ({f"l{number}": "" for number in range(129)}, {"l": "x" * 4097}, {"x" * 4097: ""}):
            client = Client(server)
            client.send(ToCollector(hello=Hello(protocol=1, epoch=7, source=labels)))
            code, text = status_of(client)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "at most 128 of 4096 bytes" in text
            client.close()
        client = Client(server)
        labels = {f"l{number}": "x" * 4096 for number in range(128)}
        client.send(ToCollector(hello=Hello(protocol=1, epoch=7, source=labels)), frame(events(0)))
        client.until_durable(0)
        client.close()
        assert server.health.report().totals.hung_up == {str(HangUp.LABELS): 3}


# -- row 18: bombs -------------------------------------------------------------------------------------------------

SERVER: Final = """
import sys
from pathlib import Path
from insitu_collector.service.server import CollectorServer
with CollectorServer(sys.argv[1], port=0) as server:
    print(server.port, flush=True)
    for _ in sys.stdin:
        (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(peak.split()[1], flush=True)
"""
LIMIT_KIB: Final = (32 + 64) << 10


def test_row_18_a_bomb_in_a_compressed_message_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = server.stdin, server.stdout
    assert stdin is not None and stdout is not None

    def peak_kib() -> int:
        stdin.write("\n")
        stdin.flush()
        return int(stdout.readline())

    port = int(stdout.readline())
    before = peak_kib()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]) as channel:
        ship_bytes = channel.stream_stream("/insitu.v1.Collector/Ship", bytes, bytes)
        bomb = bytes(256 * MIB)  # 255 KiB on the wire
        with pytest.raises(grpc.RpcError) as error:
            list(ship_bytes(iter([bomb]), compression=grpc.Compression.Gzip, timeout=60))
    status: Any = error.value
    assert (status.code(), status.details()) == (grpc.StatusCode.INTERNAL, "Exception deserializing request!")
    assert peak_kib() - before <= LIMIT_KIB
    stdin.close()
    assert server.wait(30) == 0
    stdout.close()


# -- row 19: slow and idle peers -----------------------------------------------------------------------------------


ENDS: Final = ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


def served(server: CollectorServer, epoch: int) -> None:
    """Ship as a probe does, until all is durable."""
    exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=epoch))
    ship(exporter, *(events(seq, epoch=epoch) for seq in range(20)))
    assert exporter.flush(30)
    exporter.close(5)


def test_row_19_a_thousand_streams_that_never_say_hello_hold_nobody_up(tmp_path: Path) -> None:
    limits, most = IntakeLimits(streams=32, handshake=0.5), [0, 0]
    over = threading.Event()
    with collector(tmp_path, limits) as server:
        before = threading.active_count()

        def watch() -> None:
            while not over.wait(0.01):
                most[0] = max(most[0], server.health.load().num_streams)
                most[1] = max(most[1], threading.active_count() - before)

        watching = threading.Thread(target=watch)
        watching.start()
        with IdleStreams(server.port, 1000) as idle:
            served(server, 7)
            until(lambda: idle.ends.total() == 1000, "an end of every stream")
        over.set()
        watching.join()
        # UNAVAILABLE: more calls at once over one connection than it may have.
        assert set(idle.ends) <= {getattr(grpc.StatusCode, name) for name in ENDS}
        hung_up = server.health.report().totals.hung_up
        assert set(hung_up) <= {HangUp.HANDSHAKE, HangUp.NUM_STREAMS}
        assert hung_up[HangUp.HANDSHAKE] >= 32
        assert 0 < most[0] <= limits.streams
        # A call has a worker, and a stream that was let in a reader beside it.
        assert most[1] <= 2 * (limits.streams + SPARE_CALLS)
        until(lambda: server.health.load().num_streams == 0, "places given back")


def test_row_19_streams_that_fell_silent_make_room_for_who_has_something_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("insitu_collector.admission.admission.SILENT_S", 0.2)
    with collector(tmp_path, IntakeLimits(streams=8)) as server, IdleStreams(server.port, 40, hello(epoch=9)) as idle:
        until(lambda: server.health.load().num_streams >= 8, "every place taken")
        served(server, 7)
        assert server.health.report().totals.hung_up[HangUp.MADE_ROOM] >= 1
    assert idle.ends.total() == 40
    assert row_seqs(tmp_path) == list(range(20))


def test_row_19_a_stream_that_says_nothing_for_long_is_ended(tmp_path: Path) -> None:
    with collector(tmp_path, IntakeLimits(idle=0.5, handshake=0.5)) as server:
        silent = Client(server)
        silent.send(hello(), frame(events(0)))
        got: list[ToProbe] = []
        with pytest.raises(grpc.RpcError) as error:
            got.extend(silent.until_durable(1))
        status: Any = error.value
        assert status.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing came for 0.5 s" in status.details()
        silent.close()
        assert server.health.report().totals.hung_up == {str(HangUp.IDLE): 1}
    assert row_seqs(tmp_path) == [0]


def test_row_19_a_message_that_comes_a_byte_at_a_time_is_no_sign_of_life(tmp_path: Path) -> None:
    with collector(tmp_path, IntakeLimits(handshake=0.5)) as server:
        trickle = Trickle(server.port)
        sent = 0
        while not trickle.is_ended(within_s=0.05):
            trickle.send_byte()
            sent += 1
            assert sent < 500
        trickle.close()
        assert sent > 1, "it went on sending"
        assert server.health.report().totals.hung_up == {str(HangUp.HANDSHAKE): 1}
        served(server, 7)


# -- row 20: a tenant that floods ----------------------------------------------------------------------------------

RATE: Final = 512 << 10
BIG: Final = "x" * (64 << 10)


def flood(exporter: CollectorExporter, until_over: threading.Event, reasons: set[DropReason]) -> int:
    """Export as fast as it is taken; return how many were."""
    seq = 0
    while not until_over.is_set():
        try:
            exporter.export(events(seq, text=BIG))
            seq += 1
        except Retry as retry:
            reasons.add(retry.reason)
            until_over.wait(0.002)  # ten times the quota and more
    return seq


def token_of(tenant: str, tokens: Path) -> str:
    """Return a token of somebody who may ship for a tenant; the file of tokens has it from then on."""
    token = new_token()
    append_entry(tokens, Entry(tenant, frozenset({Role.SHIP}), tenant=tenant, sha256=digest_of(token)))
    return token


def pings(client: Client, first: int, count: int) -> list[float]:
    """Ship frames one after another; return how long each took to be durable (s)."""
    took = []
    for seq in range(first, first + count):
        began = time.monotonic()
        client.send(frame(events(seq, epoch=9)))
        replies = client.until_durable(seq)
        assert {reply.ack.window_bytes for reply in replies} == {WINDOW_BYTES}
        took.append(time.monotonic() - began)
    return took


def test_row_20_a_tenant_at_ten_times_its_quota_is_slowed_and_another_is_served_as_before(tmp_path: Path) -> None:
    quotas, tokens = Quotas(Quota(bytes_per_s=RATE), {"calm": Quota()}), tmp_path / "tokens.toml"
    over, reasons, sent = threading.Event(), set[DropReason](), [0]
    told = Credentials(token_file=str(tmp_path / "flooding"))
    (tmp_path / "flooding").write_text(token_of("flooding", tokens))
    calm_token = token_of("calm", tokens)
    with collector(tmp_path / "store", quotas=quotas, access=Access(tokens=tokens)) as server:
        calm = Client(server, calm_token)
        calm.send(hello(epoch=9))
        alone = pings(calm, 0, 30)
        exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7), credentials=told)
        flooding = threading.Thread(target=lambda: sent.append(flood(exporter, over, reasons)))
        began = time.monotonic()
        flooding.start()
        until(lambda: exporter.durable(STREAM) >= 8, "a flood that is beyond its first second")
        beside = pings(calm, 30, 30)
        passed = time.monotonic() - began
        taken = server.health.report().totals.taken
        unacknowledged = exporter.num_unacknowledged
        over.set()
        flooding.join()
        assert taken["calm", "events"].frames == 60, "each was stored"
        assert taken["flooding", "events"].bytes <= RATE * (passed + 1) + len(BIG) * 2
        assert unacknowledged > 0, "the flood waited all the while"
        assert DropReason.QUEUE_FULL in reasons, "its window is what slows it"
        # Measured: the other is no slower but for what the machine makes of it.
        assert sorted(beside)[28] <= max(4 * sorted(alone)[28], 1.0), (sorted(alone), sorted(beside))
        assert exporter.flush(60), "what was taken is stored in the end"
        exporter.close(5)
        calm.close()
    stored = open_store(tmp_path / "store").table("events")
    of_flood = [
        seq for epoch, seq in zip(stored["epoch"].to_pylist(), stored["row_seq"].to_pylist(), strict=True) if epoch == 7
    ]
    assert of_flood == list(range(sent[-1])), "each once, in order"


def test_row_20_past_a_grace_frames_are_refused_to_come_again_and_none_is_lost(tmp_path: Path) -> None:
    quotas, limits = Quotas(Quota(bytes_per_s=4 * RATE)), IntakeLimits(grace=0.01)
    with collector(tmp_path, limits, quotas) as server:
        exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7), window_bytes=4 * MIB)
        over, reasons, sent = threading.Event(), set[DropReason](), [0]
        flooding = threading.Thread(target=lambda: sent.append(flood(exporter, over, reasons)))
        flooding.start()
        until(lambda: DropReason.REFUSED_QUOTA in reasons, "a reason that what is dropped meanwhile is counted under")
        over.set()
        flooding.join()
        assert exporter.flush(60)
        assert exporter.refused() == [], "none for good"
        exporter.close(5)
        assert set(server.health.report().totals.refused) == {(str(DropReason.REFUSED_QUOTA), "")}
    assert row_seqs(tmp_path) == list(range(sent[-1]))


def test_a_stream_that_is_held_up_by_its_quota_still_gets_its_acknowledgements(tmp_path: Path) -> None:
    with collector(tmp_path, quotas=Quotas(Quota(rows_per_s=1))) as server:
        client = Client(server)
        client.send(hello(), *(frame(events(seq)) for seq in range(3)))
        replies = client.until_durable(1)
        assert [reply.ack.seq for reply in replies if reply.ack.level == DURABLE][-1] == 1
        client.close()
