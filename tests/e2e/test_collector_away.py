"""A real collector that is not there yet, dies, or is there: no row is lost or doubled, and one tap is soon seen."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import pytest
import torch
from live_system import collecting, free_port
from test_processes import CHILDREN, kinds, run
from torch import nn
from wait_kit import until

import insitu
from insitu.session.live import Session
from insitu.vocabulary import DropReason
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

pytestmark = [pytest.mark.timeout(240), pytest.mark.matrix]


def assert_stored_once(session: Session, store: Path) -> None:
    """Every row the session produced and did not count as dropped is stored, once."""
    stats, found = session.stats(), open_store(store)
    assert stats.produced["steps"] > 0
    for table, produced in stats.produced.items():
        stored = found.table(table)
        mine = [
            seq
            for epoch, seq in zip(stored["epoch"].to_pylist(), stored["row_seq"].to_pylist(), strict=True)
            if epoch == session.source.epoch
        ]
        assert len(mine) == len(set(mine)), f"rows of {table} are stored twice"
        assert produced == len(mine) + sum(stats.dropped.get(table, {}).values()), table


@pytest.mark.e2e  # timed
def test_one_tiny_tap_can_be_asked_for_within_a_second(tmp_path: Path) -> None:
    port, store, waits = free_port(), tmp_path / "store", []
    net, x = nn.Linear(4, 4), torch.zeros(1, 4)
    with collecting(store, port), torch.no_grad():
        session = insitu.attach(net, to=f"grpc://127.0.0.1:{port}")
        net(x)
        assert session.flush(30).pending == 0
        for number in (1, 2, 3):
            threading.Event().wait(1.5)  # low volume: nothing happens for longer than a heartbeat
            net(x)
            done = time.monotonic()
            while number not in open_store(store).table("summaries")["step_id"].to_pylist():
                assert time.monotonic() - done < 20
                threading.Event().wait(0.01)
            waits.append(time.monotonic() - done)
        session.close()
    print(f"seconds from the end of the step to the answer of the store: {waits}")
    assert sorted(waits)[1] < 1.0


def test_a_collector_that_comes_later_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port, store, net, x = free_port(), tmp_path / "store", nn.Linear(4, 4), torch.zeros(1, 4)
    began = time.monotonic()
    session = insitu.attach(net, to=f"grpc://127.0.0.1:{port}")
    with torch.no_grad():
        for _ in range(50):
            net(x)
    assert time.monotonic() - began < 10, "nobody waits for a collector"
    report = session.flush(1.0)
    assert (report.durable, report.dropped) == (0, 0)
    assert report.pending > 100
    assert [message for message in caplog.messages if "no collector at" in message]
    with collecting(store, port):
        assert session.flush(60).pending == 0
        session.close(30)
    assert session.stats().dropped == {}
    assert_stored_once(session, store)


def test_row_12_a_collector_that_is_killed_and_started_again_has_every_row_once(tmp_path: Path) -> None:
    port, store, net, x = free_port(), tmp_path / "store", nn.Linear(4, 4), torch.zeros(1, 4)
    over = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not over.wait(0.001):
                net(x)

    session = insitu.attach(net, to=f"grpc://127.0.0.1:{port}")
    serving = threading.Thread(target=serve)
    serving.start()
    try:
        for _ in range(2):
            with collecting(store, port) as collect:
                assert session.flush(60).durable > 0
                os.kill(collect.process.pid, signal.SIGKILL)
                collect.process.wait()
            before = session.stats().num_steps
            session.flush(0.5)
            assert session.stats().num_steps > before, "steps go on"
        with collecting(store, port):
            session.flush(60)
            over.set()
            serving.join()
            assert session.close(60).pending == 0
    finally:
        over.set()
    assert session.stats().dropped == {}
    assert_stored_once(session, store)


def test_row_10_while_no_collector_is_there_a_bounded_queue_drops_and_counts_and_steps_cost_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour in seconds: the queue is as small as it may be, and many times what it holds is made."""
    port, store, net, x = free_port(), tmp_path / "store", nn.Linear(256, 256), torch.zeros(64, 256)
    monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", "1MiB")
    session = insitu.attach(net, to=f"grpc://127.0.0.1:{port}")
    took: dict[bool, list[float]] = {False: [], True: []}
    deadline = time.monotonic() + 60
    with torch.no_grad():
        while not (took[True] and session.stats().dropped.get("events", {})) or len(took[True]) < 300:
            assert time.monotonic() < deadline, session.stats()
            is_full = bool(session.stats().dropped)
            began = time.thread_time()
            net(x)
            took[is_full].append(time.thread_time() - began)
            session.event("filler", "x" * 4000)
            threading.Event().wait(0.0005)  # the drain shares the interpreter
    stats = session.stats()
    assert stats.queue_bytes <= stats.max_queue_bytes == 1 << 20
    assert set(stats.dropped["events"]) <= {DropReason.COLLECTOR_UNREACHABLE, DropReason.RING_FULL}
    assert stats.dropped["events"][DropReason.COLLECTOR_UNREACHABLE] > 0
    medians = {is_full: statistics.median(times) for is_full, times in took.items()}
    assert medians[True] < 2 * medians[False], f"CPU time of a step, with room and without: {medians}"
    with collecting(store, port):
        assert session.flush(60).pending == 0
        session.close(30)
    assert_stored_once(session, store)


@pytest.mark.parametrize(("method", "num_children"), [("fork", 3), ("spawn", 1), ("forkserver", 1)])
def test_row_14_children_ship_over_connections_of_their_own_and_the_parent_goes_on(
    tmp_path: Path, method: str, num_children: int
) -> None:
    with CollectorServer(tmp_path / "store", port=0) as server:
        epochs = [int(line) for line in run(CHILDREN, tmp_path, server.address, method, str(num_children)).split()]
        hung_up = server.health.report().totals.hung_up
    found = kinds(tmp_path / "store")
    (parent,) = [epoch for epoch in found if found[epoch] == {"parent": 1}]
    assert len({parent, *epochs}) == num_children + 1
    assert all(found[epoch].total() == 3 for epoch in epochs)
    assert hung_up == {}


ENDS: Final = """
import os, sys, threading, torch
from torch import nn
import insitu

net, x = nn.Linear(4, 4), torch.zeros(1, 4)
session = insitu.attach(net, to=sys.argv[1])
with torch.no_grad():
    for _ in range(50):
        net(x)
    assert session.flush(30).pending == 0
    print(session.source.epoch, session.stats().durable["steps"], flush=True)
    over = threading.Event()
    while not over.wait(0.001):
        net(x)
        if sys.argv[2] == "os._exit" and session.stats().num_steps > 100:
            os._exit(7)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "os._exit"])
def test_row_15_however_a_process_ends_what_it_had_shipped_is_whole_and_its_place_is_free(
    tmp_path: Path, how: str
) -> None:
    with CollectorServer(tmp_path / "store", port=0) as server:
        with subprocess.Popen(
            [sys.executable, "-c", ENDS, server.address, how], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            epoch, num_durable = map(int, process.stdout.readline().split())
            began = time.monotonic()
            if how != "os._exit":
                process.send_signal(getattr(signal, how))
            status = process.wait(30)
        assert status == (7 if how == "os._exit" else -getattr(signal, how))
        assert time.monotonic() - began < 15, "what it still does is bounded"
        until(lambda: server.health.load().num_streams == 0, "its place")
        steps = open_store(server.store).table("steps").to_pylist()
        mine = [row["row_seq"] for row in steps if row["epoch"] == epoch]
        assert num_durable == 50
        assert mine == list(range(len(mine))), "in order, each once"
        assert len(mine) >= num_durable


@pytest.mark.parametrize("num_kills", [3, pytest.param(40, marks=pytest.mark.soak)])
def test_row_01_a_collector_killed_at_random_moments_of_a_load_has_every_row_once(
    num_kills: int, tmp_path: Path
) -> None:
    """Also prints how long a collector took to be there again, and how much the one before it had left open."""
    port, store, net, x = free_port(), tmp_path / "store", nn.Linear(64, 64), torch.zeros(16, 64)
    chance, over = random.Random(num_kills), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not over.is_set():
                net(x)

    session = insitu.attach(net, to=f"grpc://127.0.0.1:{port}")
    serving = threading.Thread(target=serve)
    serving.start()
    try:
        for kill in range(num_kills):
            left_bytes = sum(file.stat().st_size for file in (store / "v1/open").rglob("*.arrow"))
            began = time.monotonic()
            with collecting(store, port) as collect:
                print(f"start {kill}: {time.monotonic() - began:.2f} s, {left_bytes / 2**20:.1f} MiB left open")
                threading.Event().wait(chance.uniform(0.0, 1.5))
                collect.process.kill()
                collect.process.wait()
        with collecting(store, port):
            over.set()
            serving.join()
            assert session.close(60).pending == 0
    finally:
        over.set()
    assert_stored_once(session, store)
    assert open_store(store).table("steps").num_rows > 100 * num_kills, "it was killed under load"
    assert not (store / "v1/quarantine").exists(), "nothing changed once it was written"
