"""A store is sent to a receiver of OTLP: as the probe's own exporter would, each row once, whatever happens between."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pyarrow as pa
import pytest
from alert_kit import verdict
from click.testing import CliRunner
from feed_kit import BASE_NS, Writer, interval, source, step_row
from otlp_kit import attributes
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import receiver as receiver
from subscriber_kit import store as store
from target_kit import Receiver, Say, grpc_target, http_target
from wait_kit import until

from insitu.cli import insitu as command
from insitu.exporters.base import Batch
from insitu.exporters.otlp.exporter import OtlpExporter
from insitu.exporters.otlp.spans import request_context_of
from insitu.forwarding.cursor import Cursor, id_of
from insitu.identity import Source
from insitu.segments.layout import SEALED, list_segments
from insitu.segments.shard import ShardWriter
from insitu.vocabulary import EXPIRED, RequestEvent, Role
from insitu_collector.simulate.run import processes
from insitu_collector.simulate.scenario import Scenario
from insitu_collector.subscriber.delivery import GaveUp
from insitu_collector.subscriber.mapping import TABLES
from insitu_collector.subscriber.opened import opened
from insitu_collector.subscriber.subscriber import Busy, Subscriber

TRACE: Final = "ab" * 16


@contextmanager
def subscribed(
    store: Path, to: str, give_up_s: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Subscriber]:
    """Open a subscriber that never waits: time passes at once."""
    with opened(store, to, None, lambda _: False, lambda *_: None, give_up_s, clock) as found:
        yield found


def send(store: Path, to: str) -> Subscriber:
    """Send what is there."""
    with subscribed(store, to) as found:
        assert found.look(final=True)
        return found


def request(event: RequestEvent, t_ns: int, num_tokens: int = 1, **more: Any) -> dict[str, Any]:
    row = {"request": "one", "event": int(event), "t_ns": t_ns, "step_id": -1, "num_tokens": num_tokens}
    return {**row, "trace_id": TRACE, **more}


def ids(spans: Sequence[Any]) -> list[bytes]:
    return sorted(span.span_id for span in spans)


def resources(receiver: Receiver) -> dict[str, dict[str, Any]]:
    """Return what spans were said to be of, by process."""
    found = [attributes(each.resource) for got in receiver.got("traces") for each in got.request.resource_spans]
    return {each["service.instance.id"]: each for each in found}


def latest(receiver: Receiver, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
    """Return the last point of each series of a metric, whatever its form."""
    found = {}
    for point in receiver.points(name):
        kind = point.DESCRIPTOR.name
        value = (
            point.as_double or point.as_int if kind == "NumberDataPoint" else (point.count, tuple(point.bucket_counts))
        )
        found[tuple(sorted(attributes(point).items()))] = value
    return found


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_a_store_arrives_as_the_probes_own_exporter_would_have_sent_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sources = {}, {}
    scenario = Scenario(seconds=2.0, warmup_steps=2)
    for tables in processes(scenario):
        for table, found in tables.items():
            for epoch in found["epoch"].unique().to_pylist():
                mine = found.filter(pa.compute.equal(found["epoch"], pa.scalar(epoch, pa.uint64())))
                rows[epoch, table] = mine.combine_chunks().to_batches()[0]
                if table == "sources":
                    sources[epoch] = Source.of_row(mine.to_pylist()[0])
    shard = ShardWriter(store, "collector")
    for (epoch, table), data in rows.items():
        shard.append(Batch(epoch, 0, data, table))
    shard.close()
    with grpc_target() as direct, http_target() as there:
        send(store, there.url)
        for epoch, of in sources.items():
            exporter = OtlpExporter(direct.url.removeprefix("grpc://"), of)
            for table in (name for name in TABLES if name not in ("verdicts", "incidents", "events")):
                if (epoch, table) in rows:
                    exporter.export(Batch(epoch, 0, rows[epoch, table], table))
                    assert exporter.flush(30.0)
            exporter.close(5.0)
        ours, theirs = ({span.span_id: span for span in each.spans()} for each in (there, direct))
        assert len(ours) == len(there.spans()) > 1_000
        assert ours == theirs
        assert resources(there) == resources(direct)
        assert {found.get("dist.pp.rank") for found in resources(there).values()} == {0, 1, None}
        names = {
            metric.name
            for got in direct.got("metrics")
            for each in got.request.resource_metrics
            for metric in each.scope_metrics[0].metrics
        } - {"insitu.probe.time"}
        assert len(names) > 8
        for name in names:
            assert latest(there, name) == latest(direct, name), name


def test_a_request_is_a_span_of_its_trace_and_steps_link_to_it(store: Path, receiver: Receiver) -> None:
    driver, rank = source(9, rank=-1, stage=-1, role=Role.DRIVER, model="m"), source(1)
    writer = Writer(store)
    for of in (driver, rank):
        writer.rows(of, "sources", of.row())
    writer.rows(driver, "requests", request(RequestEvent.ARRIVED, 0, 5), request(RequestEvent.FIRST_TOKEN, 2_000_000))
    of_request = {"request": "one", "row": 0, "count": 3, "position": 0, "phase": 1, "sample_row": -1}
    writer.rows(rank, "steps", step_row(1, num_rows=3, rows=[of_request]))
    writer.rows(rank, "intervals", interval(1), interval(2))
    writer.rows(driver, "requests", request(RequestEvent.FINISHED, 6_000_000, 3))
    writer.close()
    send(store, receiver.url)
    own = request_context_of(driver, "one", TRACE)
    (served,) = [span for span in receiver.spans() if span.name == "text_completion m"]
    assert (served.trace_id.hex(), served.span_id.hex()) == (own.trace_id, own.span_id) == (TRACE, own.span_id)
    assert (served.parent_span_id, served.start_time_unix_nano) == (b"", BASE_NS)
    assert attributes(served)["gen_ai.usage.output_tokens"] == 3
    computed = {
        attributes(span)["insitu.step"]: span
        for span in receiver.spans()
        if span is not served and span.name == "insitu.compute"
    }
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in computed[1].links] == [(TRACE, own.span_id)]
    assert not computed[2].links
    (duration,) = receiver.points("gen_ai.server.request.duration")
    assert (duration.count, duration.sum) == (1, pytest.approx(0.006))
    (spent,) = receiver.points("insitu.interval.time")
    assert spent.as_double == pytest.approx(0.0014)
    assert spent.time_unix_nano == BASE_NS + 2_700_000, "stamped with the time of its rows, not of their sending"


def test_verdicts_incidents_and_events_are_log_records(store: Path, receiver: Receiver) -> None:
    judge = source(1, rank=-1, stage=-1, role=Role.CLIENT)
    writer = Writer(store)
    writer.rows(judge, "sources", judge.row())
    writer.rows(judge, "verdicts", verdict(revision=0).row(), verdict(revision=1, state="closed").row())
    incident = {"incident": "f" * 16, "state": "opened", "run": judge.run, "reason": "slow_step", "text": "slow"}
    writer.rows(judge, "incidents", {**incident, "on_rank": 3, "trigger_unix_ns": BASE_NS + 5})
    writer.rows(judge, "events", {"t_ns": 7, "kind": "warmup_end", "step_id": -1, "text": ""})
    writer.close()
    send(store, receiver.url)
    told = [(record.event_name, record.severity_text, record.body.string_value) for record in receiver.records()]
    assert told == [
        ("insitu.flight", "WARN", "slow"),
        ("insitu.event", "INFO", "warmup_end"),
        ("insitu.verdict", "ERROR", "rank 1 (stage 1) is stuck."),
        ("insitu.verdict", "INFO", "rank 1 (stage 1) is stuck."),
    ]
    flight, event, first, _ = receiver.records()
    assert attributes(first) | {"insitu.requests": None} == {
        "insitu.verdict": "run-stuck-r1-1",
        "insitu.revision": 0,
        "insitu.state": "open",
        "insitu.run": "run",
        "insitu.replica": 0,
        "insitu.kind": "stuck",
        "insitu.stage": 1,
        "insitu.rank": 1,
        "insitu.step": 7,
        "insitu.phase": "decode",
        "insitu.confidence": 1.0,
        "insitu.remedy": "Look at its stack.",
        "insitu.num_requests": 2,
        "insitu.requests": None,
    }
    assert (flight.time_unix_nano, attributes(flight)["insitu.rank"]) == (BASE_NS + 5, 3)
    assert (event.time_unix_nano, attributes(event)["insitu.kind"]) == (BASE_NS + 7, "warmup_end")


# -- each row once ---------------------------------------------------------------------------------------------------


def test_what_is_in_an_open_segment_is_sent_and_not_again_once_it_is_sealed(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    writer.rows(rank, "steps", step_row(3))
    with subscribed(store, receiver.url) as subscriber:
        for number in range(4):
            writer.rows(rank, "intervals", interval(number))
            assert subscriber.look()
            assert len(receiver.spans()) == number + 1
        writer.close()
        assert subscriber.look(final=True)
        assert subscriber.backlog().num_rows == 0
    send(store, receiver.url)
    assert len(receiver.spans()) == 4
    assert len(set(ids(receiver.spans()))) == 4


def test_a_request_that_was_on_its_way_at_a_restart_is_told_of_when_it_ends(store: Path, receiver: Receiver) -> None:
    driver, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), Writer(store)
    writer.rows(driver, "sources", driver.row())
    writer.rows(driver, "requests", request(RequestEvent.ARRIVED, 0, 5))
    send(store, receiver.url)
    assert receiver.spans() == []
    writer.rows(driver, "requests", request(RequestEvent.FIRST_TOKEN, 1), request(RequestEvent.FINISHED, 5_000_000, 2))
    send(store, receiver.url)
    (span,) = receiver.spans()
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (BASE_NS, BASE_NS + 5_000_000)
    assert [point.count for point in receiver.points("gen_ai.server.request.duration")] == [1]
    writer.close()


def test_a_receiver_that_is_away_gets_all_of_it_later(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store, segment_bytes=1)
    writer.rows(rank, "sources", rank.row())
    for step in range(5):
        writer.rows(rank, "intervals", interval(step))
    writer.close()
    receiver.choose = lambda *_: Say(503, grpc.StatusCode.UNAVAILABLE)
    with subscribed(store, receiver.url, give_up_s=0.0) as subscriber, pytest.raises(GaveUp):
        subscriber.look(final=True)
    receiver.choose = lambda *_: Say()
    send(store, receiver.url)
    assert len(set(ids(receiver.spans()))) == len(receiver.spans()) == 5
    assert Cursor(store, receiver.url).account["retried"] == 1


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"schema": "insitu.cursor/1", "to": "grpc://other:1"}'])
def test_row_09_without_its_cursor_all_that_is_kept_is_sent_again_and_nothing_else_changes(
    store: Path, receiver: Receiver, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rank, writer = source(1), Writer(store, segment_bytes=1)
    writer.rows(rank, "sources", rank.row())
    for step in range(6):
        writer.rows(rank, "intervals", interval(step))
    writer.close()
    send(store, receiver.url)
    once = ids(receiver.spans())
    list_segments(store, SEALED, "intervals")[0].path(store, SEALED).unlink()  # no longer kept
    (cursor,) = store.glob("v1/forward/*.json")
    cursor.unlink()
    if text is not None:
        cursor.write_text(text)
    with caplog.at_level(logging.WARNING):
        send(store, receiver.url)
    assert ("cannot be read" in caplog.text) == (text is not None)
    twice = ids(receiver.spans()[6:])
    assert len(twice) == 5
    assert set(twice) < set(once), "duplicates of what was sent, with the same ids"
    send(store, receiver.url)
    assert len(receiver.spans()) == 11, "and once more it is remembered"


def test_a_cursor_that_cannot_be_written_stops_nothing_and_is_written_later(
    store: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    in_the_way = store / "v1" / "forward" / f"{id_of(receiver.url)}.draft"
    in_the_way.mkdir(parents=True)
    with subscribed(store, receiver.url) as subscriber:
        for step in range(3):
            writer.rows(rank, "intervals", interval(step))
            assert subscriber.look(final=True)
        assert len(receiver.spans()) == 3
        assert caplog.text.count("cannot be written") == 1
        in_the_way.rmdir()
        assert subscriber.look(final=True)
    writer.close()
    send(store, receiver.url)
    assert len(receiver.spans()) == 3


def test_one_process_alone_sends_a_store_to_a_receiver(store: Path, receiver: Receiver) -> None:
    Writer(store).close()
    with subscribed(store, receiver.url), pytest.raises(Busy, match="already sends"), subscribed(store, receiver.url):
        pass
    send(store, receiver.url)


def test_segments_that_are_merged_are_not_sent_again_nor_left_out(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store, segment_bytes=1)
    writer.rows(rank, "sources", rank.row())
    for step in range(12):
        writer.rows(rank, "intervals", interval(step))
    with subscribed(store, receiver.url) as subscriber:
        assert subscriber.look()
        for step in range(12, 24):
            writer.rows(rank, "intervals", interval(step))
        writer.close()
        num_segments = len(list_segments(store, SEALED, "intervals"))
        merged = CliRunner().invoke(command, ["store", "compact", str(store)])
        assert merged.exit_code == 0, merged.output
        assert len(list_segments(store, SEALED, "intervals")) < num_segments
        assert subscriber.look(final=True)
    assert len(receiver.spans()) == len(set(ids(receiver.spans()))) == 24
    assert receiver.points("insitu.interval.time")[-1].as_double == pytest.approx(24 * 0.0007)
    send(store, receiver.url)
    assert len(receiver.spans()) == 24


def test_what_is_erased_is_not_sent(store: Path, receiver: Receiver) -> None:
    driver, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), Writer(store)
    writer.rows(driver, "sources", driver.row())
    for name in ("one", "two"):
        events = (RequestEvent.ARRIVED, 0), (RequestEvent.FINISHED, 5_000_000)
        writer.rows(driver, "requests", *(request(event, at, request=name, trace_id=None) for event, at in events))
    writer.close()
    erased = CliRunner().invoke(command, ["store", "erase", str(store), "--request", "one", "--yes"])
    assert erased.exit_code == 0, erased.output
    send(store, receiver.url)
    assert [attributes(span).get("gen_ai.request.id") for span in receiver.spans()] == ["two"]
    assert backlog_of(store, receiver.url) == 0


def backlog_of(store: Path, to: str) -> int:
    return int(json.loads(cursors(store, "--json"))["cursors"][0]["rows"])


# -- what is not sent is counted -------------------------------------------------------------------------------------


def gap(batch_table: str, epoch: int, seq_from: int, seq_to: int, num_rows: int, file: str) -> dict[str, Any]:
    found = {"source_epoch": epoch, "table": batch_table, "seq_from": seq_from, "seq_to": seq_to, "num_rows": num_rows}
    return {**found, "num_bytes": 1, "reason": EXPIRED, "file": file, "unix_ns": BASE_NS}


def test_what_retention_removed_before_it_was_sent_is_counted_once(
    store: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    rank, collector, writer = source(1), source(2, rank=-1, stage=-1, role=Role.CLIENT), Writer(store, segment_bytes=1)
    for of in (rank, collector):
        writer.rows(of, "sources", of.row())
    writer.rows(rank, "intervals", interval(0))
    send(store, receiver.url)
    writer.rows(rank, "intervals", interval(1), interval(2))
    writer.rows(rank, "intervals", interval(3), interval(4), interval(5))
    sent, first, second = list_segments(store, SEALED, "intervals")
    told = [gap("intervals", 1, seq, seq, num, name.file) for seq, num, name in ((0, 1, sent), (1, 2, first))]
    writer.rows(collector, "gaps", *told, gap("captures", 1, 0, 0, 9, "captures/x-0000000000.arrow"))
    receiver.choose = lambda *_: Say(503, grpc.StatusCode.UNAVAILABLE)
    for name in (sent, first):
        name.path(store, SEALED).unlink()
    receiver.choose = lambda *_: Say()
    with caplog.at_level(logging.WARNING), subscribed(store, receiver.url) as subscriber:
        assert subscriber.look(final=True)
        writer.rows(collector, "gaps", gap("intervals", 1, 2, 2, 3, second.file))
        second.path(store, SEALED).unlink()
        assert subscriber.look(final=True)
    assert Cursor(store, receiver.url).account["rows"] == {"expired_unsent": 2}, "what was sent is not lost"
    assert "2 rows were removed by age or size" in caplog.text
    send(store, receiver.url)
    assert Cursor(store, receiver.url).account["rows"] == {"expired_unsent": 2}
    assert len(receiver.spans()) == 4
    writer.close()


def test_rows_of_a_process_that_nothing_names_are_counted_and_stop_nothing(store: Path, receiver: Receiver) -> None:
    rank, nobody, writer = source(1), source(2), Writer(store)
    writer.rows(nobody, "intervals", interval(0), interval(1))
    writer.rows(rank, "sources", rank.row())
    writer.rows(rank, "intervals", interval(0))
    writer.close()
    send(store, receiver.url)
    assert len(receiver.spans()) == 1
    assert Cursor(store, receiver.url).account["rows"] == {"no_source": 2}


def test_a_process_that_says_who_it_is_amid_a_look_is_known(store: Path, receiver: Receiver) -> None:
    first, late, writer = source(1), source(2), Writer(store)
    writer.rows(first, "sources", first.row())
    writer.rows(first, "steps", step_row(1))
    writer.rows(first, "intervals", interval(0))
    writer.seal()
    for name in list_segments(store, SEALED):
        os.utime(name.path(store, SEALED), (0, 0))  # of another stretch of time: sent before what is open is read
    writer.rows(first, "intervals", interval(1))

    def choose(*_: Any) -> Say:
        if not written:
            written.append(writer.rows(late, "sources", late.row()))
            writer.rows(late, "intervals", interval(0))
        return Say()

    written: list[Batch] = []
    receiver.choose = choose
    with subscribed(store, receiver.url) as subscriber:
        assert subscriber.look(final=True)
    assert len(receiver.spans()) == 3
    assert Cursor(store, receiver.url).account["rows"] == {}
    writer.close()


def test_a_batch_that_is_damaged_is_counted_and_what_follows_is_sent(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    for step in range(0, 9, 3):
        writer.rows(rank, "intervals", *(interval(step + more, bytes=77_777_777) for more in range(3)))
    writer.close()
    (name,) = list_segments(store, SEALED, "intervals")
    path = name.path(store, SEALED)
    content = bytearray(path.read_bytes())
    place = content.find((77_777_777).to_bytes(8, "little"), len(content) // 2)
    assert place > 0
    content[place] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    send(store, receiver.url)
    assert len(receiver.spans()) == 6
    assert Cursor(store, receiver.url).account["rows"] == {"unreadable": 3}


# -- what a person sees ----------------------------------------------------------------------------------------------


def test_a_receiver_of_traces_alone_is_sent_nothing_else_and_what_was_left_out_is_counted(
    store: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    writer.rows(rank, "intervals", interval(0), interval(1))
    writer.rows(rank, "events", {"t_ns": 7, "kind": "warmup_end", "step_id": -1, "text": ""})
    writer.close()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "None ")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    send(store, receiver.url)
    assert (len(receiver.spans()), receiver.got("metrics"), receiver.got("logs")) == (2, [], [])
    (cursor,) = json.loads(cursors(store, "--json"))["cursors"]
    account = cursor["account"]
    assert (cursor["rows"], account["sent"], account["left_out"]) == (0, {"traces": 2}, {"metrics": 1, "logs": 1})
    assert account["dead"] == {}
    assert "left out" in cursors(store)


def test_cursors_say_what_waits_for_whom(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    writer.rows(rank, "intervals", interval(0))
    send(store, receiver.url)
    assert f"{receiver.url}: 0 rows wait; 1 spans + 1 data points sent; nobody sends now" in cursors(store)
    writer.rows(rank, "intervals", interval(1), interval(2))
    with subscribed(store, receiver.url):
        (told,) = json.loads(cursors(store, "--json"))["cursors"]
    assert (told["to"], told["rows"], told["live"]) == (receiver.url, 2, True)
    assert told["behind_s"] == pytest.approx((time.time_ns() - BASE_NS - 1_000_000) / 1e9, abs=60)
    writer.close()


def test_a_cursor_says_what_was_sent_while_its_rows_wait_for_their_metrics(store: Path, receiver: Receiver) -> None:
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    writer.rows(rank, "steps", step_row(0))
    writer.rows(rank, "intervals", interval(0))
    with subscribed(store, receiver.url) as subscriber:
        until(lambda: subscriber.look() and "2 rows wait" in cursors(store) and "; 1 spans sent" in cursors(store))
    writer.close()


def cursors(store: Path, *more: str) -> str:
    result = CliRunner().invoke(command, ["store", "cursors", str(store), *more])
    assert result.exit_code == 0, result.output
    return result.output
