"""`insitu collect --otlp-to`: what is received leaves as OTLP beside it; receivers that fail hold nothing up."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import psutil
import pytest
from subscriber_kit import plain_environment as plain_environment
from target_kit import HANG, Receiver, Say, grpc_target, http_target
from test_collect import INSITU, Collector

import insitu
from insitu_collector.store import open_store
from insitu_collector.subscriber.delivery import HELD_EVENT
from insitu_collector.subscriber.options import check_not_own

pytestmark = pytest.mark.matrix


@pytest.fixture(autouse=True)
def _environment(plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")  # a receiver that hangs holds up the end by as much


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_target() as found:
        yield found


def shipped(port: int, text: str) -> int:
    """Ship an event to a collector; return how many rows are durable there."""
    with insitu.start(to=f"grpc://127.0.0.1:{port}", role="client") as session:
        session.event("incident", text)
        report = session.flush(30.0)
        assert (report.pending, report.dropped) == (0, 0)
        return report.durable


def told(receiver: Receiver) -> list[str]:
    return [record.body.string_value for record in receiver.records()]


def held(store: Path) -> list[str]:
    """Wait for what is said of a receiver that lets nobody in."""
    events, deadline = open_store(store).tail(["events"]), time.monotonic() + 60
    with closing(events):
        while time.monotonic() < deadline:
            rows = [row for found in events.poll().values() for row in found.to_pylist()]
            said = [row["text"] for row in rows if row["kind"] == HELD_EVENT]
            if said:
                return said
    raise AssertionError("nothing was said")


def subscribers(collector: Collector) -> list[psutil.Process]:
    return [each for each in psutil.Process(collector.process.pid).children() if "subscribe" in each.cmdline()]


def test_what_is_received_is_sent_on_and_a_subscriber_that_dies_is_started_again(
    tmp_path: Path, receiver: Receiver
) -> None:
    collector = Collector(tmp_path / "store", 0, "--otlp-to", receiver.url)
    try:
        shipped(collector.port, "first")
        receiver.wait_for(lambda: "first" in told(receiver))
        (process,) = subscribers(collector)
        assert process.nice() == 10
        process.send_signal(signal.SIGKILL)
        shipped(collector.port, "second")
        receiver.wait_for(lambda: "second" in told(receiver))
    finally:
        collector.end(signal.SIGTERM)
    assert told(receiver).count("first") <= 2, "after a kill, a second's worth may come twice"
    assert not psutil.pid_exists(process.pid)


def test_a_receiver_that_hangs_and_one_that_is_away_hold_up_neither_ingest_nor_a_third(
    tmp_path: Path, receiver: Receiver
) -> None:
    with grpc_target() as hanging:
        hanging.choose = lambda *_: HANG
        more = ("--otlp-to", hanging.url, "--otlp-to", "http://127.0.0.1:9", "--otlp-to", receiver.url)
        collector = Collector(tmp_path / "store", 0, *more)
        try:
            shipped(collector.port, "first")
            hanging.wait_for(lambda: hanging.num_asked)
            assert shipped(collector.port, "second") > 0
            receiver.wait_for(lambda: "second" in told(receiver))
            assert len(subscribers(collector)) == 3
        finally:
            collector.end(signal.SIGTERM)
    assert open_store(tmp_path / "store").table("events").num_rows >= 2


def test_a_receiver_that_lets_nobody_in_is_an_event_once_and_gets_all_of_it_later(
    tmp_path: Path, receiver: Receiver
) -> None:
    receiver.choose = lambda *_: Say(401)
    store = tmp_path / "store"
    collector = Collector(store, 0, "--otlp-to", receiver.url)
    try:
        shipped(collector.port, "kept")
        receiver.wait_for(lambda: receiver.num_asked)
        assert held(store) == [f"{receiver.url} takes nothing (401)"]
    finally:
        collector.end(signal.SIGTERM)
    receiver.choose = lambda *_: Say()
    again = Collector(store, 0, "--otlp-to", receiver.url)
    try:
        receiver.wait_for(lambda: "kept" in told(receiver))
    finally:
        again.end(signal.SIGTERM)


@pytest.mark.parametrize(
    ("url", "why"), [("ftp://host", "is no OTLP receiver"), ("http://a:b@host", "OTEL_EXPORTER_OTLP_HEADERS")]
)
def test_a_receiver_that_cannot_be_used_is_said_before_anything_starts(tmp_path: Path, url: str, why: str) -> None:
    command = [*INSITU, "collect", "--store", str(tmp_path / "store"), "--port", "0", "--otlp-to", url]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert why in ran.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(("option", "scheme"), [("--port", "grpc"), ("--otlp-http-port", "http")])
def test_a_collector_does_not_send_to_itself(tmp_path: Path, host: str, option: str, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ports = {"--port": "0", option: str(port)}
    options = ["--store", str(tmp_path / "store"), "--host", host, "--insecure", *(w for p in ports.items() for w in p)]
    command = [*INSITU, "collect", *options, "--otlp-to", f"{scheme}://localhost:{port}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr.splitlines()[-1].partition(";")[0]) == (
        2,
        f"Error: --otlp-to {scheme}://localhost:{port} is this collector itself",
    )
    assert not (tmp_path / "store").exists()


def test_another_who_has_the_same_port_elsewhere_is_not_this_collector() -> None:
    check_not_own(["grpc://127.0.0.2:4317", "grpc://192.0.2.1:4317", "http://127.0.0.1"], "127.0.0.1", [4317])
    check_not_own(["grpc://192.0.2.1:4317"], "0.0.0.0", [4317])
    with pytest.raises(click.UsageError):
        check_not_own(["https://127.0.0.1"], "127.0.0.1", [443])
