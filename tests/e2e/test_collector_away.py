"""A real collector that is not there yet, dies, or is there: no row is lost or doubled, and one tap is soon seen."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from live_system import collecting, free_port
from torch import nn

import insitu
from insitu.session.live import Session
from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(240)


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


def test_a_collector_that_is_killed_and_started_again_has_every_row_once(tmp_path: Path) -> None:
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
