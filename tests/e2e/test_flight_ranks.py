"""Two ranks as real processes and a real collector: one incident of both, and of the one that is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from live_system import Process
from wait_kit import until

from insitu_collector.flight.command import incidents_in
from insitu_collector.flight.records import FlightIncident
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

pytestmark = pytest.mark.e2e

RANK: Final = """
import sys, threading, torch, insitu
from insitu.testing import oracle_model

rank, to = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
model, orders, going = oracle_model(num_layers=3, width=4), [], threading.Event()
flight = insitu.Flight(rows="L*.mlp_out", pre_s=5, post_s=0.5, again_after_s=0)
session = insitu.attach(model, to=to, rank=rank, stage=rank, flight=flight)

def listen():
    for line in sys.stdin:
        orders.append(line.strip())
        if line.strip() == "go":
            going.set()

def poison(module, args, output):
    return torch.full_like(output, float("nan"))

def hang(module, args):
    going.wait()

threading.Thread(target=listen, daemon=True).start()
hooked = model.model.layers[1].self_attn

pause, num_steps = threading.Event(), 0
with torch.no_grad():
    while "end" not in orders:
        handle = None
        if "nan" in orders:
            orders.remove("nan")
            handle = hooked.register_forward_hook(poison)
        if "hang" in orders:
            orders.remove("hang")
            handle = hooked.register_forward_pre_hook(hang)
        if "dump" in orders:
            orders.remove("dump")
            session.dump("again")
        model.say_next(0)
        model(torch.zeros(3, 4))
        if handle is not None:
            handle.remove()
        num_steps += 1
        if num_steps == 20:
            assert session.flush(20).pending == 0
            print("ready", flush=True)
        pause.wait(0.02)
session.close()
"""


class Rank:
    """A rank that steps until it is told to end."""

    def __init__(self, number: int, to: str) -> None:
        variables = os.environ | {"INSITU_RUN": "00112233445566ff"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(number), to],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def order(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process.poll() is None:
            self.order("go")
            self.order("end")
            self.process.wait(60)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CollectorServer]:
    monkeypatch.setattr("insitu_collector.flight.relay.ANSWER_S", 4.0)
    with CollectorServer(tmp_path / "store", port=0) as running:
        yield running


@contextmanager
def two_ranks(to: str) -> Iterator[list[Rank]]:
    started = [Rank(number, to) for number in range(2)]
    try:
        for rank in started:
            rank.wait_until_ready()
        yield started
    finally:
        for rank in started:
            rank.end()


def closed(store: Path, count: int) -> list[FlightIncident] | None:
    """Return the incidents once there are so many and the collector has closed them all."""
    found = incidents_in(open_store(store))
    return found if len(found) == count and all(incident.asked is not None for incident in found) else None


@pytest.mark.matrix
def test_a_run_that_is_stuck_ships_what_every_rank_holds(tmp_path: Path) -> None:
    store = tmp_path / "store"
    collect = Process(["-m", "insitu", "collect", "--store", str(store), "--port", "0", "--judge"])
    try:
        with two_ranks(collect.wait_for(r"collecting on (grpc://\S+)")[1]) as ranks:
            ranks[1].order("hang")
            (found,) = until(lambda: closed(store, 1), "an incident", 60.0)
            ranks[1].order("go")
    finally:
        collect.stop()
    assert (found.reason, found.on_rank, found.asked, found.missing) == ("verdict", 1, [(0, 0), (0, 1)], [])
    assert "stuck" in found.text
    for answer in found.answers:
        assert answer.num_captures > 0
        assert answer.since_unix_ns is not None
        assert answer.since_unix_ns < found.trigger_unix_ns - 2 * 10**9, "from before it was seen"


def test_one_trigger_is_one_incident_of_every_rank_and_the_dead_are_missing(server: CollectorServer) -> None:
    with two_ranks(server.address) as ranks:
        _trigger_and_kill(server, ranks)


def _trigger_and_kill(server: CollectorServer, ranks: list[Rank]) -> None:
    ranks[1].order("nan")
    (found,) = until(lambda: closed(server.store, 1), "an incident", 60.0)
    assert (found.reason, found.site, found.on_rank, found.on_stage) == ("nonfinite", "L1.mlp_out", 1, 1)
    assert (found.asked, found.missing) == ([(0, 0), (0, 1)], [])
    assert [answer.rank for answer in found.answers] == [0, 1]
    begin, end = found.window_unix_ns
    for answer in found.answers:
        assert answer.num_captures == answer.num_full_steps * 3 * 3
        assert answer.rows_since_unix_ns is not None
        assert begin <= answer.rows_since_unix_ns < found.trigger_unix_ns - 10**8, "from before the trigger"
    store = open_store(server.store)
    stored = store.table("captures").to_pylist()
    for answer in found.answers:
        assert sum(row["epoch"] == answer.epoch for row in stored) == answer.num_captures

    os.kill(ranks[0].process.pid, signal.SIGKILL)
    ranks[0].process.wait(20)
    ranks[1].order("dump")
    after = until(lambda: closed(server.store, 2), "an incident", 60.0)[1]
    assert (after.reason, after.text, after.asked, after.missing) == ("asked", "again", [(0, 0), (0, 1)], [(0, 0)])
    assert [answer.rank for answer in after.answers] == [1]
    assert after.sentence().endswith("1 of 2 ranks answered, rank 0 did not.")
    assert found.window_unix_ns[1] < end + 10**9
