"""Whatever the exporter does, memory stays within its bound, every row is accounted for, and steps cost the same."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import Any

import pyarrow as pa
import pytest
import torch
from exporter_kit import Hanging
from torch import nn
from wait_kit import until

import insitu
from insitu.exporters.base import Ack, Batch, Level, Retry
from insitu.guard import containing
from insitu.segments.retention import parse_bytes
from insitu.session.live import Session
from insitu.session.step import StepRecord
from insitu.taps.observer import Observer
from insitu.testing import Recording
from insitu.vocabulary import DropReason

MIB = 1 << 20


class Stalled(Recording):
    """Takes nothing while `is_away`; counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = True
        self.num_asked = 0

    def export(self, batch: Batch) -> Ack:
        self.num_asked += 1
        if self.is_away:
            raise Retry(0.05, DropReason.COLLECTOR_UNREACHABLE)
        return super().export(batch)

    def flush(self, timeout_s: float) -> bool:
        return not self.is_away


class Raising(Stalled):
    """Fails over each batch while `is_away`."""

    def export(self, batch: Batch) -> Ack:
        self.num_asked += 1
        if self.is_away:
            raise LookupError("this exporter is broken")
        return Recording.export(self, batch)


class Dripping(Stalled):
    """Takes one batch each time it is let, durable at once, and forgets it."""

    num_left = 0

    def export(self, batch: Batch) -> Ack:
        if self.is_away and not self.num_left:
            raise Retry(0.0)
        self.num_left -= 1
        self._durable[batch.stream] = batch.seq
        return Ack(batch.stream, batch.seq, Level.DURABLE)


class Swallowing(Recording):
    """Takes everything, and nothing becomes durable while `is_away`: a collector that has stopped answering."""

    is_away = True

    def export(self, batch: Batch) -> Ack:
        self.batches.append(batch)
        if not self.is_away:
            self._durable[batch.stream] = batch.seq
        return Ack(batch.stream, batch.seq, Level.PENDING)

    def flush(self, timeout_s: float) -> bool:
        if not self.is_away:
            self._durable = {batch.stream: batch.seq for batch in self.batches}
        return not self.is_away


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    """The session's bound: 8 MiB."""
    monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", "8MiB")
    return 8 * MIB


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr("insitu.drain.thread.GRACE_S", 0.2)  # it is given up sooner, and hangs no less
    exporter = Hanging()
    yield exporter
    exporter.let_go.set()


def num_drains() -> int:
    return sum(thread.name == "insitu-drain" for thread in threading.enumerate())


def wait_for_rows(recording: Recording, table: str, num_rows: int) -> None:
    """Wait until so many rows of a table have come."""
    until(lambda: len(recording.rows(table)) >= num_rows)


def unaccounted(session: Session) -> dict[str, int]:
    """Return by table the rows produced that are neither durable nor dropped, once nothing is pending."""
    stats = session.stats()
    return {
        table: left
        for table, produced in stats.produced.items()
        if (left := produced - stats.durable.get(table, 0) - sum(stats.dropped.get(table, {}).values()))
    }


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256))


@pytest.mark.parametrize("exporter", [Stalled(), Swallowing()], ids=["takes nothing", "acknowledges nothing"])
def test_a_long_stall_stays_within_the_bound_and_every_row_is_accounted_for(
    exporter: Stalled | Swallowing, bound: int
) -> None:
    rule = insitu.Rule(sites="0", take="rows", requests="all")
    net, x = wide_net(), torch.randn(64, 256)
    session = insitu.attach(net, to=exporter, rules=[rule], max_rows=64)
    assert session.stats().max_queue_bytes == bound
    most = num_bytes = 0

    def used() -> int:
        return tracemalloc.get_traced_memory()[0] + int(pa.total_allocated_bytes())

    with torch.no_grad():
        for _ in range(100):  # widths are learned, rings made, code loaded
            net(x)
        tracemalloc.start()
        before = used()
        for number in range(400):
            net(x)
            if number % 20 == 19:
                session.flush(0.0)
                num_bytes = max(num_bytes, session.stats().queue_bytes)
                most = max(most, used() - before)
    tracemalloc.stop()
    stats = session.stats()
    taken = stats.produced["captures"] * 4096
    assert taken > 10 * bound, "the run is long"
    assert 0.5 * bound < num_bytes <= bound
    assert most < 1.5 * bound, f"{most / MIB:.1f} MiB"
    wanted = DropReason.COLLECTOR_UNREACHABLE if isinstance(exporter, Stalled) else DropReason.QUEUE_FULL
    assert set(stats.dropped["captures"]) <= {str(wanted), "slab_full"}
    assert stats.dropped["captures"][str(wanted)] > 0
    exporter.is_away = False
    report = session.close()
    assert (unaccounted(session), report.pending) == ({}, 0)
    assert report.durable == sum(batch.num_rows for batch in exporter.batches)
    assert session.stats().queue_bytes == 0


def test_a_slice_in_the_queue_keeps_nothing_else_alive(bound: int) -> None:
    """Of each large batch one piece finds room where another has gone, and the rest is dropped: it must be gone too."""
    exporter = Dripping()
    session = insitu.start(to=exporter)
    before = pa.total_allocated_bytes()
    for _ in range(20):
        for _ in range(2000):
            session.event("e", "x" * 4096)
        exporter.num_left = 1
        session.flush(0.0)
        assert session.stats().queue_bytes <= bound
    assert pa.total_allocated_bytes() - before < 2 * bound
    exporter.is_away = False
    session.close()
    assert unaccounted(session) == {}


def step_ns(net: nn.Module, x: torch.Tensor) -> int:
    """Return the CPU time of the calling thread for a few steps."""
    began = time.thread_time_ns()
    for _ in range(10):
        net(x)
    return time.thread_time_ns() - began


@pytest.mark.parametrize("kind", [Stalled, Raising, Hanging])
def test_a_step_costs_the_same_whatever_the_exporter_does(kind: type[Stalled | Hanging], bound: int) -> None:
    """Paired and interleaved, by CPU time of the step thread, with a third session to tell noise by."""
    failing = kind()
    exporters: list[Recording] = [Recording(), failing, Recording()]
    nets = [nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))) for _ in exporters]
    x = torch.randn(16, 64)
    ratios: list[float] = []
    noise: list[float] = []
    sessions = [insitu.attach(net, to=to) for net, to in zip(nets, exporters, strict=True)]
    with torch.no_grad():
        for _ in range(400):
            good, bad, other = (step_ns(net, x) for net in nets)
            ratios.append(bad / good)
            noise.append(other / good)
    if isinstance(failing, Hanging):
        assert failing.is_hanging.is_set()
        failing.let_go.set()
    else:
        assert failing.num_asked > 1
        failing.is_away = False
    for session in sessions:
        session.close()
        assert unaccounted(session) == {}
    assert median(ratios) < 1.1 * max(1.0, median(noise)), f"A/A {median(noise):.3f}, A/B {median(ratios):.3f}"


def test_steps_go_on_beside_an_exporter_that_hangs_and_each_is_counted(hanging: Hanging) -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad(), insitu.attach(net, to=hanging, max_rows=8) as session:
        until(hanging.is_hanging.is_set)
        for _ in range(400):
            net(torch.zeros(2, 4))
        hanging.let_go.set()
    steps = hanging.rows("steps")
    blind = sum(step["dropped"] for step in steps)
    assert len(steps) == 400
    assert blind > 0
    assert session.stats().dropped["summaries"] == {"slab_full": blind}


def test_rows_that_are_due_in_steps_that_found_no_slab_are_counted(hanging: Hanging) -> None:
    net, rules = nn.Linear(4, 4), [insitu.Rule(sites="output", requests="all")]
    with torch.no_grad(), insitu.attach(net, to=hanging, rules=rules, max_rows=8, overhead_budget=1.0) as session:
        net(torch.zeros(2, 4))
        until(hanging.is_hanging.is_set)
        for _ in range(400):
            with session.step(rows=[insitu.Rows("a", 0, 2)]):
                net(torch.zeros(2, 4))
        hanging.let_go.set()
    stats = session.stats()
    blind = sum(step["dropped"] for step in hanging.rows("steps"))
    kept = len(hanging.rows("captures"))
    assert blind > 0
    assert stats.produced["captures"] == 2 * 400
    assert (stats.dropped["summaries"], stats.dropped["captures"]) == (
        {"slab_full": blind},
        {"slab_full": 2 * 400 - kept},
    )
    assert unaccounted(session) == {}


def test_nobody_waits_long_for_an_exporter_that_hangs(hanging: Hanging) -> None:
    net = nn.Linear(4, 4)
    session = insitu.attach(net, to=hanging)
    until(hanging.is_hanging.is_set)
    net(torch.zeros(2, 4))
    began = time.monotonic()
    assert session.flush(0.1).durable == 0
    report = session.close(0.1)
    assert time.monotonic() - began < 5, "0.1 s and the grace, twice"
    assert (report.durable, report.pending) == (0, 0)
    stats = session.stats()
    assert unaccounted(session) == {}
    assert {table: stats.dropped[table] for table in ("sources", "steps", "intervals", "summaries")} == {
        "sources": {"shutdown": 1},
        "steps": {"shutdown": 1},
        "intervals": {"shutdown": 1},
        "summaries": {"shutdown": 1},
    }


def test_what_was_given_up_is_not_counted_again_when_the_exporter_comes_back(hanging: Hanging) -> None:
    session = insitu.start(to=hanging)
    num_before = num_drains()
    until(hanging.is_hanging.is_set)
    session.event("late")
    report = session.close(0.0)
    hanging.let_go.set()
    until(lambda: num_drains() < num_before)
    assert session.close() == report
    assert unaccounted(session) == {}


def test_several_threads_may_flush_at_once() -> None:
    recording = Recording()
    session = insitu.start(to=recording)
    num_before = num_drains()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for part in range(20):
            session.event(f"{number}.{part}")
            session.flush()
            assert recording.rows("events", kind=f"{number}.{part}"), "what was produced before the flush is durable"

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_drains() == num_before
    session.close()
    assert len(recording.rows("events")) == 160


def test_the_first_rows_after_a_quiet_second_do_not_wait_for_the_next_heartbeat() -> None:
    recording = Recording()
    session = insitu.start(to=recording)
    waits = []
    for number in range(3):
        wait_for_rows(recording, "health", len(recording.rows("health")) + 2)
        began = time.monotonic()
        session.event("e")
        wait_for_rows(recording, "events", number + 1)
        waits.append(time.monotonic() - began)
    session.close()
    assert min(waits) < 0.5, "a look is every 0.2 s, a heartbeat every second"


def test_the_setting_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    with insitu.start(to=Recording()) as session:
        assert session.stats().max_queue_bytes == parse_bytes("64MiB")
    for text in ("none", "1KiB"):
        monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", text)
        with pytest.raises(ValueError, match=r"INSITU_MAX_QUEUE_BYTES: .* write 1MiB or more"):
            insitu.start(to=Recording())


class Busy:
    """A device's event that comes once it was asked for so many times."""

    def __init__(self, num_times: float) -> None:
        self._num_left = num_times

    def query(self) -> bool:
        self._num_left -= 1
        return self._num_left < 0


def on_a_device(monkeypatch: pytest.MonkeyPatch, num_times: float) -> None:
    """Let each step be done no sooner than its event was asked for so many times."""
    end = Observer.end

    def later(self: Observer, record: StepRecord) -> None:
        end(self, record)
        record.ready = Busy(num_times)

    monkeypatch.setattr(Observer, "end", later)


def test_a_flush_waits_for_the_steps_that_the_device_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch, 20)
    recording, net = Recording(), nn.Linear(4, 2).eval()
    with torch.inference_mode(), insitu.attach(net, to=recording) as session:
        for _ in range(3):
            net(torch.ones(1, 4))
        session.flush()
        assert [row["step_id"] for row in recording.rows("steps")] == [0, 1, 2]
        net(torch.ones(1, 4))
    assert [row["step_id"] for row in recording.rows("summaries")] == [0, 1, 2, 3]
    assert unaccounted(session) == {}


def test_steps_that_the_device_never_finishes_are_counted_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_device(monkeypatch, float("inf"))
    recording, net = Recording(), nn.Linear(4, 2).eval()
    with torch.inference_mode():
        session = insitu.attach(net, to=recording)
        for _ in range(3):
            net(torch.ones(1, 4))
        report = session.close(0.3)
    assert recording.rows("steps") == recording.rows("summaries") == []
    assert report.dropped == 6
    assert session.stats().dropped == {"steps": {"shutdown": 3}, "summaries": {"shutdown": 3}}
    assert unaccounted(session) == {}
    assert recording.rows("health")[-1]["dropped"], "the last heartbeat tells of them"


SPOILED: dict[str, Any] = {"request": 7, "start": 2**40, "phase": "q"}


@pytest.mark.parametrize(("name", "value"), SPOILED.items())
@pytest.mark.parametrize("flight", [None, insitu.Flight(rows="1")], ids=["", "flight"])
def test_a_step_that_cannot_be_stored_is_lost_alone_and_counted(
    name: str, value: Any, flight: insitu.Flight | None, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """What a caller spoils after it was looked at: row maps are shared, not copied."""
    model, rules, steps = nn.Sequential(nn.Identity(), nn.Identity()), [insitu.Rule(sites="0", requests="all")], 40
    with containing(), torch.inference_mode():
        session = insitu.attach(model, to=insitu_records, rules=rules, max_rows=8, flight=flight, overhead_budget=1.0)
        model(torch.zeros(1, 1))
        for step in range(steps):
            entry = insitu.Rows(f"r{step}", 0, 2)
            with session.step(100 + step, rows=[entry]):
                model(torch.zeros(2, 1))
                if step % 10 == 7:
                    object.__setattr__(entry, name, value)
                    for place in session._open.places[0] or () if name == "request" and session._open else ():
                        object.__setattr__(place, name, value)
        report = session.close()
    stats = session.stats()
    stored = {row["step_id"] for row in insitu_records.rows("steps")}
    bad = {100 + step for step in range(steps) if step % 10 == 7}
    assert stored == {0} | {100 + step for step in range(steps)} - bad
    assert stats.dropped["steps"] == {"probe_error": len(bad)}
    captured = Counter(row["step_id"] for row in insitu_records.rows("captures"))
    assert captured == {step: 2 for step in range(100, 100 + steps) if name != "request" or step not in bad}
    if name == "request":
        assert stats.dropped["captures"] == {"probe_error": 2 * len(bad)}
    assert sum(stats.produced.values()) == report.durable + report.dropped
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert said.exc_info is None and "\n" not in said.getMessage()


def test_of_rare_rows_only_the_one_that_cannot_be_stored_is_lost(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)
    with containing():
        for number in range(9):
            row = {"kind": "k", "step_id": "a" if number == 4 else number}
            session._inlet.put_row("events", row)  # `append` refuses such a row at the call
        session.close()
    assert [row["step_id"] for row in insitu_records.rows("events")] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert session.stats().dropped == {"events": {"probe_error": 1}}
