"""The session's account is exact, its heartbeat shows a hang, and a fork starts a new identity."""

import gc
import multiprocessing
import socket
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id
from torch import nn
from wait_kit import until

import insitu
from insitu.session.live import Session
from insitu.testing import Recording, expect
from insitu.vocabulary import IntervalClass


def test_produced_is_stored_plus_dropped(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records, role="driver")
    for number in range(20_000):
        session.request("token", f"r{number % 7}", num_tokens=number)
    report = session.close()
    stats = session.stats()
    stored = len(insitu_records.rows("requests"))
    lost = stats.dropped.get("requests", {}).get("ring_full", 0)
    assert stats.produced["requests"] == stored + lost == 20_000
    assert report.pending == 0
    assert sum(stats.produced.values()) == report.durable + report.dropped


def who_asked(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["trace_id"], row["parent_span_id"], row["sampled"]


def test_a_request_is_kept_with_the_span_that_asked_for_it_sampled_or_not(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records, role="driver")
    tracer = TracerProvider().get_tracer("shop")
    with tracer.start_as_current_span("ask the model") as span:
        headers: dict[str, str] = {}
        inject(headers)
        session.request("arrived", "current", trace=insitu.request_context())
    session.request("arrived", "header", trace=insitu.request_context(headers))
    session.request("arrived", "silent", trace=insitu.request_context({"traceparent": f"00-{'c' * 32}-{'d' * 16}-00"}))
    session.request("arrived", "broken", trace=insitu.request_context({"traceparent": f"00-{'c' * 32}-{'0' * 16}-01"}))
    session.request("arrived", "trace alone", trace_id="c" * 32)
    session.request("finished", "header")
    session.close()
    asked = span.get_span_context()
    own = (format_trace_id(asked.trace_id), format_span_id(asked.span_id))
    kept = [(row["request"], *who_asked(row)) for row in insitu_records.rows("requests")]
    assert kept == [
        ("current", *own, True),
        ("header", *own, True),
        ("silent", "c" * 32, "d" * 16, False),
        ("broken", None, None, None),
        ("trace alone", "c" * 32, None, None),
        ("header", None, None, None),
    ]


def test_row_seq_has_no_gap_and_starts_at_zero(insitu_records: Recording) -> None:
    net = nn.Linear(4, 4)
    with insitu.attach(net, to=insitu_records) as session:
        for _ in range(300):
            with session.interval("compute"):
                net(torch.zeros(2, 4))
    stats = session.stats()
    for table, produced in stats.produced.items():
        assert [row["row_seq"] for row in insitu_records.rows(table)] == list(range(produced)), table


@pytest.mark.usefixtures("no_collection")
def test_a_collection_is_carved_out_of_the_interval_it_struck(insitu_records: Recording) -> None:
    ballast = [[number] for number in range(200_000)]
    session = insitu.start(to=insitu_records)
    with session.interval("compute", step_id=5):
        gc.collect()
    session.close()
    rows = insitu_records.rows("intervals", step_id=5)
    assert [row["cls"] for row in rows] == [IntervalClass.COMPUTE, IntervalClass.GC, IntervalClass.COMPUTE]
    assert all(a["t1_ns"] == b["t0_ns"] for a, b in pairwise(rows))
    assert len(ballast) == 200_000


def test_the_heartbeat_shows_an_open_interval_while_it_lasts(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)

    def beats() -> list[dict[str, Any]]:
        return [row for row in insitu_records.rows("health") if row["open_cls"] == IntervalClass.RECV_WAIT]

    with session.interval("recv_wait", step_id=8, mb=1, peer=3):
        until(lambda: len(beats()) >= 4)
    last = beats()[-1]
    assert (last["open_step_id"], last["open_mb"], last["open_peer"]) == (8, 1, 3)
    open_ns = [row["t_ns"] - row["open_since_ns"] for row in beats()]
    assert open_ns == sorted(open_ns)
    session.close()
    assert expect(insitu_records.rows("health"), closing=True)["open_cls"] is None


@pytest.mark.usefixtures("no_collection")
def test_a_plain_forward_is_timed_as_compute_unless_the_caller_times_it(insitu_records: Recording) -> None:
    net = nn.Linear(4, 4)
    with insitu.attach(net, to=insitu_records) as session:
        net(torch.zeros(2, 4))
        with session.interval("host"), session.step(7):
            net(torch.zeros(2, 4))
        with session.step(9):
            net(torch.zeros(2, 4))
    found = [(IntervalClass(row["cls"]).name, row["step_id"]) for row in insitu_records.rows("intervals")]
    assert found == [("COMPUTE", 0), ("HOST", -1), ("COMPUTE", 9)]


@pytest.mark.usefixtures("no_collection")
def test_a_rank_without_a_model_times_itself_at_its_place_in_the_grid(insitu_records: Recording) -> None:
    with insitu.start(to=insitu_records, rank=3, stage=1, tp_rank=1, replica=2) as session:
        with session.step(5), insitu.interval("compute"):
            with session.interval("collective_wait"):
                pass
            with session.interval("host", step_id=4):
                pass
        with session.interval("idle"):
            pass
    source = expect(insitu_records.rows("sources"), rank=3)
    place = [source[name] for name in ("role", "stage", "tp_rank", "replica")]
    assert place == ["rank", 1, 1, 2]
    found = {(row["rank"], IntervalClass(row["cls"]).name, row["step_id"]) for row in insitu_records.rows("intervals")}
    assert found == {(3, "COMPUTE", 5), (3, "COLLECTIVE_WAIT", 5), (3, "HOST", 4), (3, "IDLE", -1)}


def test_an_interval_outside_of_a_step_is_of_the_last_session_that_is_open(insitu_records: Recording) -> None:
    closed = Recording()
    with insitu.start(to=insitu_records):
        last = insitu.start(to=closed)
        last.close()
        assert last.is_closed
        with insitu.interval("host"):
            pass
    assert len(insitu_records.rows("intervals", cls=IntervalClass.HOST)) == 1, "beside garbage collections, perhaps"
    assert closed.rows("intervals", cls=IntervalClass.HOST) == []


def test_a_stage_needs_a_rank(insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match="needs a rank"):
        insitu.start(to=insitu_records, stage=1)
    with insitu.start(to=insitu_records) as session:
        assert (session.source.role, session.source.rank, session.source.stage) == ("client", -1, -1)


def test_flush_makes_everything_so_far_durable_and_goes_on(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)
    session.event("one")
    assert session.flush().pending == 0
    assert [row["kind"] for row in insitu_records.rows("events")] == ["one"]
    session.event("two")
    session.close()
    assert [row["kind"] for row in insitu_records.rows("events")] == ["one", "two"]


def test_closing_twice_is_safe(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)
    assert session.close() == session.close()


def test_a_close_that_nobody_answers_takes_its_deadline_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        session = insitu.start(to=f"grpc://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        report = session.close(1.5)
    assert time.monotonic() - began < 1.8 * 1.5
    assert (report.durable, report.pending) == (0, 0)
    assert report.dropped == sum(session.stats().produced.values()) > 0


def test_an_unknown_column_is_refused(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)
    with pytest.raises(KeyError, match="colour"):
        session.append("events", {"colour": "red"})
    session.close()


def _child(session: Session, answers: Any) -> None:
    session.event("child")
    session.close()
    recording = session.to
    assert isinstance(recording, Recording)
    answers.put((session.source.epoch, [row["kind"] for row in recording.rows("events")]))


def test_a_forked_child_starts_its_own_identity(insitu_records: Recording) -> None:
    session = insitu.start(to=insitu_records)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child, args=(session, answers))
    child.start()
    epoch, kinds = answers.get(timeout=30)
    child.join()
    session.event("parent")
    session.close()
    assert epoch != session.source.epoch
    assert kinds == ["child"]
    assert [row["kind"] for row in insitu_records.rows("events")] == ["parent"]
