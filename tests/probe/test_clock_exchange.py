"""How far two clocks are apart, from a few short exchanges: right within the error it states, whatever the way does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.exporters.clock_exchange import NUM_EXCHANGES, Exchange, best, measure
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source, boot_id
from insitu.vocabulary import Role
from insitu.wire.insitu_pb2 import ClockQuery, ClockReading
from insitu.wire.insitu_pb2_grpc import CollectorServicer
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

WAYS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**6), st.integers(0, 10**7)), min_size=1, max_size=8)


@given(offset=st.integers(-(10**15), 10**15), ways=WAYS)
def test_the_offset_is_within_the_error_of_the_truth(offset: int, ways: list[tuple[int, int, int]]) -> None:
    exchanges, now = [], 10**16
    for there, inside, back in ways:
        sent, came = now, now + there
        left, got = came + inside, came + inside + back
        exchanges.append(Exchange(sent, came - offset, left - offset, got))
        now = got + 1
    found = best(exchanges)
    assert found is not None
    assert abs(found.ahead_ns - offset) <= found.error_ns
    assert found.error_ns == -(-min(there + back for there, _, back in ways) // 2)


def test_exchanges_that_contradict_themselves_are_left_out() -> None:
    assert best([Exchange(10, 5, 40, 20), Exchange(10, 7, 5, 30)]) is None
    assert best([]) is None


class Host:
    """Another host's clock, so far ahead, behind a network that takes its time."""

    def __init__(self, ahead_ns: int, name: str) -> None:
        self.now_ns, self.ahead_ns, self.name, self.num_asked = 10**12, ahead_ns, name, 0

    def clock(self) -> int:
        return self.now_ns

    def ask(self) -> Any:
        self.num_asked += 1
        self.now_ns += 1_000 * self.num_asked
        came = self.now_ns + self.ahead_ns
        self.now_ns += 3_000 * self.num_asked
        return ClockReading(boot_id=self.name, came_ns=came, left_ns=came)


def test_a_row_says_how_far_this_host_is_ahead_of_the_other() -> None:
    host = Host(5_000_000, "theirs")
    row = measure(host.ask, "ours", host.clock)
    assert row is not None
    assert (row["host_a"], row["host_b"], row["error_ns"]) == ("theirs", "ours", 2_000)
    assert abs(row["offset_ns"] + 5_000_000) <= 2_000
    assert host.num_asked == NUM_EXCHANGES


def test_on_one_host_there_is_one_clock_and_nothing_to_say() -> None:
    host = Host(0, "ours")
    assert measure(host.ask, "ours", host.clock) is None
    assert host.num_asked == 1


def test_exchanges_that_all_contradict_themselves_are_a_row_without_an_offset() -> None:
    now = iter(range(0, 10_000, 10))
    row = measure(lambda: ClockReading(boot_id="theirs", came_ns=500, left_ns=400), "ours", lambda: next(now))
    assert row == {"host_a": "theirs", "host_b": "ours", "offset_ns": None, "error_ns": None, "t_ns": 150}


@pytest.mark.parametrize("ahead_s", [-3600, 0.25])
def test_a_probe_on_another_host_measures_a_real_collector(tmp_path: Path, ahead_s: float) -> None:
    ahead_ns = int(ahead_s * 1e9)
    told: list[dict[str, Any]] = []
    heard = threading.Event()

    def tell(rows: Any) -> None:
        told.extend(rows)
        heard.set()

    source = Source(role=Role.RANK, boot_id="another-host")
    with CollectorServer(tmp_path, port=0) as server:
        exporter = CollectorExporter(
            server.address.removeprefix("grpc://"),
            source,
            tell=tell,
            clock=lambda: time.monotonic_ns() + ahead_ns,
        )
        connect(exporter, source)
        assert heard.wait(20)
        exporter.close(5.0)
    [row] = told
    assert (row["host_a"], row["host_b"]) == (boot_id(), "another-host")
    assert abs(row["offset_ns"] - ahead_ns) <= row["error_ns"] < 50_000_000
    assert open_store(tmp_path).table("events").num_rows == 1


def test_a_probe_on_the_collectors_host_says_nothing(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    source = Source(role=Role.RANK)
    with CollectorServer(tmp_path, port=0) as server:
        exporter = CollectorExporter(server.address.removeprefix("grpc://"), source, tell=told.extend)
        connect(exporter, source)
        for thread in threading.enumerate():
            if thread.name == "insitu-clock":
                thread.join(20)
        exporter.close(5.0)
    assert told == []


class Busy(CollectorServer):
    """A collector that has no worker left for the first question."""

    num_asked = 0

    def Clock(self, query: ClockQuery, context: Any) -> ClockReading:
        self.num_asked += 1
        if self.num_asked == 1:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        return super().Clock(query, context)


class Jumping(CollectorServer):
    """A collector whose clock goes back within each of the first answers."""

    num_asked = 0

    def Clock(self, query: ClockQuery, context: Any) -> ClockReading:
        self.num_asked += 1
        reading = super().Clock(query, context)
        return (
            reading if self.num_asked > NUM_EXCHANGES else ClockReading(boot_id="c", came_ns=reading.came_ns, left_ns=1)
        )


class Old(CollectorServer):
    """A collector of a version that knew no clocks."""

    num_asked = 0

    def Clock(self, query: ClockQuery, context: Any) -> ClockReading:
        self.num_asked += 1
        return CollectorServicer.Clock(self, query, context)  # type: ignore[no-any-return]


def test_a_collector_that_was_busy_is_asked_again(tmp_path: Path) -> None:
    heard = threading.Event()
    source = Source(role=Role.RANK, boot_id="another-host")
    with Busy(tmp_path, port=0) as server:
        exporter = CollectorExporter(
            server.address.removeprefix("grpc://"), source, tell=lambda rows: heard.set(), clock_every_s=0.01
        )
        connect(exporter, source)
        assert heard.wait(20)
        exporter.close(5.0)
    assert server.num_asked > NUM_EXCHANGES


def test_a_clock_that_contradicts_itself_is_said_and_asked_again(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    measured = threading.Event()

    def tell(rows: Any) -> None:
        told.extend(rows)
        if rows[0]["offset_ns"] is not None:
            measured.set()

    source = Source(role=Role.RANK, boot_id="another-host")
    with Jumping(tmp_path, port=0) as server:
        exporter = CollectorExporter(server.address.removeprefix("grpc://"), source, tell=tell, clock_every_s=0.01)
        connect(exporter, source)
        assert measured.wait(20)
        exporter.close(5.0)
    assert (told[0]["host_a"], told[0]["offset_ns"], told[0]["error_ns"]) == ("c", None, None)
    assert told[0]["t_ns"] > 0


def test_a_collector_that_knows_no_clocks_is_asked_once_and_takes_records_as_ever(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    source = Source(role=Role.RANK, boot_id="another-host")
    with Old(tmp_path, port=0) as server:
        exporter = CollectorExporter(
            server.address.removeprefix("grpc://"), source, tell=told.extend, clock_every_s=0.01
        )
        connect(exporter, source)
        for thread in threading.enumerate():
            if thread.name == "insitu-clock":
                thread.join(20)
                assert not thread.is_alive()
        exporter.close(5.0)
    assert told == [] and server.num_asked == 1
    assert open_store(tmp_path).table("events").num_rows == 1


def connect(exporter: CollectorExporter, source: Source) -> None:
    """Ship one row, and wait until it is durable: the connection stands."""
    from insitu.drain import builders
    from insitu.exporters import Batch

    rows = builders.from_rows("events", source, range(1), [{"t_ns": 1, "kind": "test", "step_id": -1, "text": ""}])
    exporter.export(Batch(source.epoch, 0, rows, "events"))
    assert exporter.flush(20)
