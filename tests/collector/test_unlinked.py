"""Intervals that come before it is known whom they served wait for that: sent once, with links, or told without."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from feed_kit import BASE_NS, Writer, interval, source, step_row
from otlp_kit import attributes
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import receiver as receiver
from subscriber_kit import store as store
from target_kit import Receiver
from test_subscriber import TRACE, cursors, request, send, subscribed

from insitu.cli import insitu as command
from insitu.exporters.base import Batch
from insitu.forwarding.cursor import Cursor
from insitu.identity import Source
from insitu.records import schema_of
from insitu.vocabulary import RequestEvent, Role
from insitu_collector.subscriber import unlinked
from insitu_collector.subscriber.follower import Read
from insitu_collector.subscriber.traces import StoredTraces
from insitu_collector.subscriber.unlinked import HOLD_S, Unlinked

MINUTE: Final = 60_000
"""Steps of `interval`, one a ms: metrics are due."""


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Run:
    """A driver, a first stage and a last one, whose rows come in the order in which a test writes them."""

    def __init__(self, store: Path) -> None:
        self.driver, self.first, self.last = source(9, rank=-1, stage=-1, role=Role.DRIVER), source(0), source(1)
        self.writer = Writer(store)
        for of in (self.driver, self.first, self.last):
            self.writer.rows(of, "sources", of.row())

    def request(self, **more: Any) -> None:
        self.writer.rows(self.driver, "requests", request(RequestEvent.ARRIVED, 0, 5, **more))

    def step(self, number: int, *names: str, has_map: bool = True) -> None:
        entry = {"count": 1, "position": 0, "phase": 1, "sample_row": -1}
        rows = [{"request": name, "row": at, **entry} for at, name in enumerate(names)] if has_map else None
        self.writer.rows(self.first, "steps", step_row(number, rows=rows))

    def intervals(self, *steps: int, **more: Any) -> None:
        self.writer.rows(self.last, "intervals", *(interval(number, **more) for number in steps))

    def join(self, epoch: int, **more: Any) -> Source:
        """Another process is there."""
        joined = source(epoch, **more)
        self.writer.rows(joined, "sources", joined.row())
        return joined


@pytest.fixture
def run(store: Path) -> Run:
    return Run(store)


def links(receiver: Receiver) -> list[tuple[int | None, int]]:
    """Return the steps of the spans that came, in order, and how many links each has."""
    found = [(attributes(span).get("insitu.step"), len(span.links)) for span in receiver.spans()]
    return sorted(found, key=lambda each: -1 if each[0] is None else each[0])


@pytest.mark.parametrize("order", list(permutations(("request", "step", "intervals"))), ids=" ".join)
@pytest.mark.parametrize("number", [1, MINUTE])
def test_in_whatever_order_rows_come_spans_link_to_whom_they_served_and_come_once(
    order: tuple[str, ...], number: int, run: Run, store: Path, receiver: Receiver
) -> None:
    write: dict[str, Callable[[], None]] = {
        "request": run.request,
        "step": lambda: run.step(number, "one"),
        "intervals": lambda: run.intervals(number, number),
    }
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        for at, table in enumerate(order, 1):
            write[table]()
            assert subscriber.look()
            assert len(links(receiver)) == (2 if at == 3 else 0)
        assert subscriber.look(final=True)
    assert links(receiver) == [(number, 1)] * 2
    assert {link.trace_id.hex() for span in receiver.spans() for link in span.links} == {TRACE}
    assert sum(point.as_double for point in receiver.points("insitu.interval.time")[-1:]) == pytest.approx(0.0014)
    assert subscriber.backlog().num_rows == 0
    send(store, receiver.url)
    assert len(receiver.spans()) == 2
    assert Cursor(store, receiver.url).account["unlinked"] == 0


def test_one_look_suffices_where_the_step_began_in_a_later_minute_than_the_batch(
    run: Run, store: Path, receiver: Receiver
) -> None:
    run.request()
    run.intervals(MINUTE - 1, MINUTE)
    run.step(MINUTE, "one")
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        assert subscriber.look()
    assert links(receiver) == [(MINUTE - 1, 0), (MINUTE, 1)]


def test_what_nothing_is_said_of_in_time_is_sent_as_it_is_counted_and_said_once(
    run: Run, store: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    run.request()
    clock = Clock()
    with subscribed(store, receiver.url, clock=clock) as subscriber, caplog.at_level(logging.WARNING):
        run.intervals(1, 2)
        assert subscriber.look()
        clock.now_s = HOLD_S / 2
        run.intervals(3)
        assert subscriber.look()
        clock.now_s = HOLD_S - 0.001
        assert subscriber.look()
        assert receiver.spans() == []
        clock.now_s = HOLD_S
        assert subscriber.look()
        assert links(receiver) == [(1, 0), (2, 0)], "each batch by its own time"
        for number in (1, 2, 3):
            run.step(number, "one")
        assert subscriber.look(final=True)
    assert links(receiver) == [(1, 0), (2, 0), (3, 1)]
    assert Cursor(store, receiver.url).account["unlinked"] == 2
    assert caplog.text.count("without links") == 1
    assert "2 rows of intervals without links" in cursors(store)


def test_a_step_waits_for_the_last_of_its_requests(run: Run, store: Path, receiver: Receiver) -> None:
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        run.step(1, "one", "two", "three")
        run.intervals(1)
        run.request()
        assert subscriber.look()
        run.request(request="three", trace_id="cd" * 16)
        assert subscriber.look()
        assert receiver.spans() == []
        run.request(request="two", trace_id=None)
        assert subscriber.look()
    assert links(receiver) == [(1, 2)]


@pytest.mark.parametrize("as_they_are", ["untraced", "no map", "no request", "no step"])
def test_what_has_no_links_to_wait_for_is_sent_at_once(
    as_they_are: str, run: Run, store: Path, receiver: Receiver
) -> None:
    if as_they_are == "untraced":
        run.request(trace_id=None)
        run.step(2, "one")
    elif as_they_are != "no step":
        run.step(2, has_map=as_they_are != "no map")
    run.intervals(*((-1,) if as_they_are == "no step" else (1, 2)), t0_ns=5, t1_ns=6)
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        assert subscriber.look()
        assert len(receiver.spans()) == (1 if as_they_are == "no step" else 2)
    assert all(not num for _, num in links(receiver))


def test_what_waits_is_sent_at_the_end_of_once_and_counted_only_where_there_are_traces(
    run: Run, store: Path, receiver: Receiver
) -> None:
    run.intervals(1)
    send(store, receiver.url)
    assert (links(receiver), Cursor(store, receiver.url).account["unlinked"]) == ([(1, 0)], 0)
    run.request()
    run.intervals(2)
    send(store, receiver.url)
    assert (links(receiver), Cursor(store, receiver.url).account["unlinked"]) == ([(1, 0), (2, 0)], 1)


@pytest.mark.parametrize("is_killed", [True, False])
def test_what_waits_when_it_is_stopped_or_killed_is_sent_with_links_at_the_next_start(
    is_killed: bool, run: Run, store: Path, receiver: Receiver
) -> None:
    run.request()
    run.step(1, "one")
    run.intervals(1)
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        assert subscriber.look(final=True)
        run.intervals(2)
        assert subscriber.look()
        if not is_killed:
            subscriber.finish()
    assert links(receiver) == [(1, 1)]
    (waiting,) = json.loads(cursors(store, "--json"))["cursors"]
    assert waiting["rows"] == 1
    run.step(2, "one")
    send(store, receiver.url)
    assert links(receiver) == [(1, 1), (2, 1)]


def test_what_waits_is_bounded_in_bytes_and_the_longest_waiting_goes(
    run: Run, store: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.request()
    clock = Clock()
    with subscribed(store, receiver.url, clock=clock) as subscriber:
        batch = run.writer.rows(run.last, "intervals", interval(1))
        monkeypatch.setattr(unlinked, "MAX_BYTES", 3 * batch.data.nbytes)
        for number in (2, 3, 4):
            assert subscriber.look()
            clock.now_s += 0.1
            run.intervals(number)
        assert subscriber.look()
        assert links(receiver) == [(1, 0)]
        run.step(4, "one")
        assert subscriber.look()
    assert links(receiver) == [(1, 0), (2, 0), (3, 0), (4, 1)], "steps 2 and 3 are passed: nothing comes of them"


def test_what_waits_while_its_segment_is_sealed_and_merged_comes_once(
    run: Run, store: Path, receiver: Receiver
) -> None:
    run.request()
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        for number in (1, 2):
            run.intervals(number)
            assert subscriber.look()
            run.writer.seal()
        merged = CliRunner().invoke(command, ["store", "compact", str(store)])
        assert merged.exit_code == 0, merged.output
        run.step(1, "one")
        run.step(2, "one")
        assert subscriber.look(final=True)
    assert links(receiver) == [(1, 1), (2, 1)]
    send(store, receiver.url)
    assert len(receiver.spans()) == 2


def test_steps_of_another_replica_say_nothing_of_this_one(run: Run, store: Path, receiver: Receiver) -> None:
    other = source(2, replica=1)
    run.writer.rows(other, "sources", other.row())
    run.step(5)
    run.writer.rows(other, "intervals", interval(1))
    run.intervals(1)
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        assert subscriber.look()
    assert [attributes(span)["insitu.rank"] for span in receiver.spans()] == [1]


@pytest.mark.parametrize("order", list(permutations(("request", "step", "peer", "intervals"))), ids=" ".join)
def test_a_peer_of_the_first_stage_without_row_maps_says_nothing_of_steps_of_who_has_them(
    order: tuple[str, ...], run: Run, store: Path, receiver: Receiver
) -> None:
    peer = run.join(5, stage=0)
    write: dict[str, Callable[[], object]] = {
        "request": run.request,
        "step": lambda: run.step(1, "one"),
        "peer": lambda: run.writer.rows(peer, "steps", step_row(1, rows=None)),
        "intervals": lambda: run.intervals(1),
    }
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        for table in order:
            write[table]()
            assert subscriber.look()
    assert links(receiver) == [(1, 1)]


def test_where_no_rank_of_a_first_stage_has_row_maps_nothing_waits_once_each_said_so(
    run: Run, store: Path, receiver: Receiver
) -> None:
    run.join(4, rank=5, stage=0)  # ended before its first step, and began anew
    peer = run.join(5, stage=0)
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        run.step(1, has_map=False)
        run.intervals(1)
        assert subscriber.look()
        assert receiver.spans() == [], "the peer may say more"
        run.writer.rows(peer, "steps", step_row(1, rows=None))
        assert subscriber.look()
        assert links(receiver) == [(1, 0)]
        run.step(2, has_map=False)
        run.intervals(2)
        assert subscriber.look()
    assert links(receiver) == [(1, 0), (2, 0)]


def test_steps_of_before_a_restart_say_nothing_of_those_after_whose_numbers_begin_anew(
    run: Run, store: Path, receiver: Receiver
) -> None:
    run.request()
    run.step(1, "one")
    run.step(1000, "one")
    with subscribed(store, receiver.url, clock=Clock()) as subscriber:
        run.intervals(1)
        assert subscriber.look()
        again = {"unix_anchor_ns": BASE_NS + 3_000_000_000}
        first, last = run.join(6, rank=0, stage=0, **again), run.join(7, rank=1, stage=1, **again)
        run.writer.rows(last, "intervals", interval(1))
        assert subscriber.look()
        assert links(receiver) == [(1, 1)]
        run.writer.rows(first, "steps", step_row(1))
        assert subscriber.look()
    assert links(receiver) == [(1, 1), (1, 0)]


def test_rows_are_counted_whose_step_nothing_was_said_of(run: Run, store: Path, receiver: Receiver) -> None:
    run.request()
    run.step(1, "one")
    run.intervals(1, 1, 1, 2)
    send(store, receiver.url)
    assert links(receiver) == [(1, 1), (1, 1), (1, 1), (2, 0)]
    assert Cursor(store, receiver.url).account["unlinked"] == 1


def test_what_waits_does_not_hold_what_was_read_with_it() -> None:
    row = {**interval(1), "row_seq": 0, "epoch": 1, "rank": 1, "stage": 1}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema_of("intervals")) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=schema_of("intervals")))
    memory = np.frombuffer(sink.getvalue(), np.uint8).copy()
    data = pa.ipc.open_stream(pa.py_buffer(memory)).read_next_batch()
    is_held = weakref.ref(memory)
    waiting = Unlinked()
    waiting.keep([Read(Batch(1, 0, data, "intervals"), was_sent=False)], 0.0)
    del memory, data
    gc.collect()
    assert is_held() is None
    (kept,) = waiting.reads
    assert kept.batch.data["step_id"].to_pylist() == [1]


def test_a_step_is_learned_without_a_look_at_all_requests_that_are_known() -> None:
    num_hashed = 0

    class Name(str):
        """Counts how often it is looked for."""

        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal num_hashed
            num_hashed += 1
            return super().__hash__()

    first, traces = source(0, run=Name("feed")), StoredTraces()
    identity = {"row_seq": 0, "epoch": 0, "rank": 0, "stage": 0}
    asked = [{**request(RequestEvent.ARRIVED, 0, 5, request=f"r{n}"), **identity} for n in range(1000)]
    traces.learn_requests(first, pa.RecordBatch.from_pylist(asked, schema=schema_of("requests")))
    entry = {"request": "r7", "row": 0, "count": 1, "position": 0, "phase": 1, "sample_row": -1}
    steps = pa.RecordBatch.from_pylist([{**step_row(1, rows=[entry]), **identity}], schema=schema_of("steps"))
    num_hashed = 0
    traces.learn_steps(first, steps)
    assert traces.untold(first, steps["step_id"]) == []
    assert num_hashed < 100
