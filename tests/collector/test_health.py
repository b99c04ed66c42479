"""A collector says of itself whether it can store, over gRPC and HTTP; and with a disk that fails it says the truth."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import urlopen

import click
import grpc
import pyarrow as pa
import pytest
from disk_kit import fill, read_only, small_disk
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client.parser import text_string_to_metric_families
from wait_kit import until
from wire_kit import Client, events, frame, hello, row_seqs, ship

from insitu.exporters import Batch, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.recovery import Recovery, recover_store
from insitu.vocabulary import DropReason, HangUp
from insitu.wire.insitu_pb2 import HealthQuery
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu_collector.health.health import Health
from insitu_collector.health.pages import HealthPages
from insitu_collector.health.readiness import Trouble
from insitu_collector.health.service import COLLECTOR, MAX_WATCHERS
from insitu_collector.service.listening import bind
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
LABELS: Final = {"tenant", "table", "reason", "defect", "state", "le"}


class Watched:
    """A collector, and how its health looks from outside."""

    def __init__(self, store: Path) -> None:
        self.health = Health(store)
        self.pages = HealthPages(0, self.health)
        self.server = CollectorServer(store, port=0, health=self.health)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub: Any = HealthStub(self.channel)

    def status(self, service: str = "") -> int:
        return int(self.stub.Check(HealthCheckRequest(service=service), timeout=20).status)

    def page(self, path: str) -> tuple[int, str]:
        try:
            with urlopen(f"http://127.0.0.1:{self.pages.port}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return each sample by its name and the values of its labels, in order of their names, which are few."""
        found = {}
        for family in text_string_to_metric_families(self.page("/metrics")[1]):
            for sample in family.samples:
                assert set(sample.labels) <= LABELS
                place = (value for _, value in sorted(sample.labels.items()))
                found[sample.name.removeprefix("insitu_collector_"), *place] = sample.value
        return found

    def troubled_by(self, trouble: Trouble) -> None:
        """Wait until it says that it has this trouble, and check that it says so everywhere."""
        until(lambda: self.health.readiness.state.trouble is trouble, f"trouble {trouble}")
        assert [self.status(), self.status(COLLECTOR)] == [NOT_SERVING] * 2
        status, text = self.page("/readyz")
        assert (status, json.loads(text)["reason"], json.loads(text)["ready"]) == (503, str(trouble), False)
        assert self.page("/healthz") == (200, "ok\n"), "it lives"
        metrics = self.metrics()
        assert (metrics["ready",], metrics["trouble", str(trouble)]) == (0, 1)
        answer = CollectorStub(self.channel).Health(HealthQuery(), timeout=20)
        assert (answer.ready, answer.reason) == (False, str(trouble))

    def well_again(self) -> None:
        """Wait until it says that it is ready, without any traffic."""
        until(lambda: self.status() == SERVING, "ready again")
        assert self.page("/readyz")[0] == 200

    def close(self) -> None:
        self.channel.close()
        self.server.stop()
        self.pages.close()


@contextmanager
def watched(store: Path) -> Iterator[Watched]:
    with closing(Watched(store)) as found:
        yield found


@contextmanager
def exporter_to(server: CollectorServer) -> Iterator[CollectorExporter]:
    exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7))
    yield exporter
    exporter.close(5)


def put_off_for(exporter: CollectorExporter, batch: Batch) -> DropReason | None:
    """Return why a batch is not taken now; None: it was."""
    try:
        exporter.export(batch)
    except Retry as retry:
        return retry.reason
    return None


# -- ready or not --------------------------------------------------------------------------------------------------


def test_it_is_not_ready_while_it_recovers_and_takes_no_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovering, go_on = threading.Event(), threading.Event()
    made: list[CollectorServer] = []

    def slow(store: Path) -> Recovery:
        recovering.set()
        assert go_on.wait(60)
        return recover_store(store)

    monkeypatch.setattr("insitu_collector.service.server.recover_store", slow)
    bound: list[int] = []

    def noting_the_port(server: grpc.Server, host: str, port: int, credentials: Any) -> int:
        bound.append(bind(server, host, port, credentials))
        return bound[0]

    monkeypatch.setattr("insitu_collector.service.server.bind", noting_the_port)
    health = Health(tmp_path)
    starting = threading.Thread(target=lambda: made.append(CollectorServer(tmp_path, port=0, health=health)))
    starting.start()
    assert recovering.wait(30)
    with grpc.insecure_channel(f"127.0.0.1:{bound[0]}") as channel:
        stub: Any = HealthStub(channel)
        assert stub.Check(HealthCheckRequest(), timeout=20).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            list(CollectorStub(channel).Ship(iter([hello()]), timeout=20))
        status: Any = error.value
        assert (status.code(), status.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "this collector recovers its store; it takes records in a moment",
        )
        assert health.report().totals.hung_up == {str(HangUp.STARTING): 1}
        go_on.set()
        starting.join()
        assert stub.Check(HealthCheckRequest(), timeout=20).status == SERVING
    made[0].stop()


def test_who_watches_is_told_that_it_stops(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = HealthStub(channel)
        seen = stub.Watch(HealthCheckRequest(service=COLLECTOR), timeout=60)
        assert next(seen).status == SERVING
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert next(seen).status == NOT_SERVING
        seen.cancel()
        stopping.join()


def test_watchers_have_a_number_and_give_their_places_back(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = HealthStub(channel)
        watchers = [stub.Watch(HealthCheckRequest(), timeout=60) for _ in range(MAX_WATCHERS)]
        for watcher in watchers:
            assert next(watcher).status == SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(stub.Watch(HealthCheckRequest(), timeout=60))
        status: Any = error.value
        assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Check(HealthCheckRequest(), timeout=20).status == SERVING
        for watcher in watchers:
            watcher.cancel()

        def is_let_in() -> bool:
            try:
                return bool(next(stub.Watch(HealthCheckRequest(), timeout=20)).status == SERVING)
            except grpc.RpcError:
                return False

        until(is_let_in, "a place")


def test_a_service_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with watched(tmp_path) as found, pytest.raises(grpc.RpcError) as error:
        found.status("another")
    status: Any = error.value
    assert status.code() is grpc.StatusCode.NOT_FOUND


# -- rows 5, 6, 7: disks that fail -----------------------------------------------------------------------------------


def test_row_05_on_a_full_disk_it_is_not_ready_and_comes_back_by_itself(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk, watched(disk / "store") as found:
        with exporter_to(found.server) as exporter:
            exporter.export(events(0))
            assert exporter.flush(20)
            ballast = fill(disk)
            found.troubled_by(Trouble.DISK_FULL)  # by its own look: nothing was sent
            exporter.export(events(1))
            until(lambda: put_off_for(exporter, events(2)) is DropReason.DISK_FULL, "a frame that is put off")
            assert exporter.durable(events(0).stream) == 0, "no false acknowledgement"
            ballast.unlink()
            found.well_again()
            ship(exporter, events(2))
            assert exporter.flush(30)
        assert found.health.report().totals.refused[str(DropReason.DISK_FULL), ""].frames >= 1
        found.close()
        assert sorted(row_seqs(disk / "store")) == [0, 1, 2], "each once"


SHORT: Final = """
import resource, sys
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store
with CollectorServer(sys.argv[1], port=0) as server:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, resource.RLIM_INFINITY))
    print(server.port, flush=True)
    sys.stdin.readline()
    print(sum(taken.frames for taken in server.health.report().totals.refused.values()), flush=True)
"""


def test_row_05_a_write_that_ends_short_is_not_acknowledged_and_its_frame_comes_again(tmp_path: Path) -> None:
    """A limit on the size of files: each holds a few frames, and the next is cut in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", SHORT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    exporter = CollectorExporter(f"127.0.0.1:{int(process.stdout.readline())}", Source(epoch=7))
    ship(exporter, *(events(seq, text="x" * 1_300_000) for seq in range(10)))
    assert exporter.flush(60)
    assert exporter.refused() == []
    exporter.close(5)
    process.stdin.close()
    num_refused = int(process.stdout.read())
    assert process.wait(30) == 0
    process.stdout.close()
    assert num_refused >= 2
    assert sorted(row_seqs(tmp_path)) == list(range(10)), "each once"


def test_row_06_a_sync_that_fails_once_costs_a_file_and_again_and_again_is_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken, sync = threading.Event(), os.fdatasync

    def fails(fd: int) -> None:  # a disk that fails cannot be had here
        if is_broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fails)
    with watched(tmp_path) as found, exporter_to(found.server) as exporter:
        exporter.export(events(0))
        assert exporter.flush(20)
        is_broken.set()
        exporter.export(events(1))
        found.troubled_by(Trouble.SYNC_FAILS)
        assert exporter.durable(events(0).stream) == 0, "no false acknowledgement"
        is_broken.clear()
        found.well_again()
        assert exporter.flush(30), "it was sent again"
        assert exporter.refused() == []
        assert found.metrics()["sync_failures_total",] >= 2
        found.close()
    assert sorted(row_seqs(tmp_path)) == [0, 1], "each once"


def test_row_07_a_store_that_became_read_only_takes_nothing_and_is_still_read(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with watched(store) as found, exporter_to(found.server) as exporter:
        exporter.export(events(0))
        assert exporter.flush(20)
        with read_only(store):
            found.troubled_by(Trouble.READ_ONLY)
            exporter.export(events(1))
            until(lambda: put_off_for(exporter, events(2)) is DropReason.STORE_FAILED, "a frame that is put off")
            assert row_seqs(store) == [0], "queries are served"
            assert exporter.durable(events(0).stream) == 0
        found.well_again()
        ship(exporter, events(2))
        assert exporter.flush(30)
        found.close()
    assert sorted(row_seqs(store)) == [0, 1, 2], "each once"


def test_row_31_a_store_that_was_removed_is_not_made_anew_and_goes_on_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    with watched(store) as found, exporter_to(found.server) as exporter:
        exporter.export(events(0))
        assert exporter.flush(20)
        store.rename(away)
        found.troubled_by(Trouble.STORE_GONE)
        exporter.export(events(1))
        until(lambda: put_off_for(exporter, events(2)) is DropReason.STORE_FAILED, "a frame that is put off")
        assert exporter.durable(events(0).stream) == 0
        assert not store.exists()
        away.rename(store)
        found.well_again()
        ship(exporter, events(2))
        assert exporter.flush(30)
        found.close()
    assert sorted(row_seqs(store)) == [0, 1, 2], "each once"
    assert [text for text in caplog.messages if "gone" in text] == [
        f"insitu: store {store} has gone while it was written, and its rows with it; nothing more is taken: "
        "put it back, or start again what writes it and what that observes",
        "insitu: not ready: the store has gone; put it back, or start again this collector and what it records",
    ]


# -- what is counted -------------------------------------------------------------------------------------------------


def test_a_scrape_shows_what_was_taken_and_refused_and_no_value_or_request(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        rows = [
            {"epoch": 7, "rank": 0, "stage": 0, "row_seq": 0, "request": "secret-request", "event": 0,
             "t_ns": time.monotonic_ns()}
        ]  # fmt: skip
        arrived = Batch(7, 0, pa.RecordBatch.from_pylist(rows, schema=schema_of("requests")), "requests")
        with exporter_to(found.server) as exporter:
            exporter.export(arrived)
            assert exporter.flush(20)
            bad, client = frame(events(0)), Client(found.server)
            bad.frame.crc32 ^= 1
            client.send(hello(), bad, frame(events(1)))
            client.until_durable(1)
            metrics = found.metrics()
            client.close()
        assert metrics["ready",] == 1
        assert metrics["connections",] == 2
        assert metrics["frames_total", "requests", ""] == metrics["rows_total", "requests", ""] == 1
        assert metrics["bytes_total", "requests", ""] == len(arrived.body)
        assert metrics["refused_frames_total", "checksum", "refused_invalid"] == 1
        assert metrics["commit_seconds_count",] >= 2
        assert metrics["capture_to_durable_seconds_count",] == 1, "of the process on this host that told a time"
        assert 0 < metrics["capture_to_durable_seconds_sum",] < 30
        assert metrics["segments", "open"] >= 2
        assert metrics["disk_free_bytes",] > 0
        assert (metrics["keep_bytes",], metrics["keep_seconds",]) == (2 << 30, 24 * 3600)
        assert "secret" not in found.page("/metrics")[1]
        assert found.page("/other")[0] == 404


def test_gaps_that_recovery_found_are_counted(tmp_path: Path) -> None:
    with CollectorServer(tmp_path / "scratch", port=0) as scratch:
        client = Client(scratch)
        client.send(hello(), frame(events(0)), frame(events(1)))
        client.until_durable(1)
        (written,) = (tmp_path / "scratch/v1/open/events").iterdir()
        torn = tmp_path / "store/v1/open/events/h-1-0000000000.arrow"
        torn.parent.mkdir(parents=True)
        torn.write_bytes(written.read_bytes()[:-1])
        client.close()
    with watched(tmp_path / "store") as found:
        assert found.metrics()["gap_rows_total", "torn_tail"] == 1


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    words = pytest.raises(click.ClickException, match="choose another --metrics-port")
    with closing(HealthPages(0, Health(tmp_path))) as pages, words:
        HealthPages(pages.port, Health(tmp_path))


def test_collect_and_its_judge_have_metrics_of_their_own(tmp_path: Path) -> None:
    options = ["--store", str(tmp_path / "store"), "--port", "0", "--judge", "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "insitu", "collect", *options, "--judge-metrics-port", "0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        ports = {}
        for line in process.stderr:
            if line.startswith(("health on http", "metrics on http")):
                ports[line.partition(" ")[0]] = int(line.split(":")[2].partition("/")[0])
            if len(ports) == 2:
                break
        pages = {who: urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) for who, port in ports.items()}
        texts = {who: page.read().decode() for who, page in pages.items()}
        for page in pages.values():
            page.close()
        assert "insitu_collector_ready 1.0" in texts["health"]
        assert "insitu_judge_look_seconds" in texts["metrics"]
        assert "insitu_judge" not in texts["health"]
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert open_store(tmp_path / "store").table("sources").num_rows >= 1
