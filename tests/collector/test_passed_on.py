"""What others sent by OTLP is sent on: each record byte for byte, with what it is of, once, and nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import pytest
from click.testing import CliRunner
from feed_kit import BASE_NS, Writer, source
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from otlp_in_kit import any_request, collecting, spans
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import receiver as receiver
from subscriber_kit import store as store
from target_kit import Receiver, Say, grpc_target
from test_otlp_replay import replay
from test_subscriber import send, subscribed

from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.exporters.base import Batch
from insitu.forwarding.cursor import Cursor
from insitu_collector.otlp.decoding import decode
from insitu_collector.otlp.receiver import Encoded
from insitu_collector.otlp.signals import GROUPS, RECORDS, SCOPES, SIGNALS, TRACES, Signal
from insitu_collector.otlp.wire import cut, entry
from insitu_collector.store import open_store
from insitu_collector.subscriber.delivery import GaveUp
from insitu_collector.subscriber.passed_on import MAX_BYTES, records_of, requests_of
from insitu_collector.subscriber.payloads import Payload, halves


class Sent(NamedTuple):
    """A record as it lies in a request, and all else of its group and scope."""

    resource: bytes
    scope: bytes
    otlp: bytes


def entries(data: bytes, number: int) -> tuple[bytes, list[bytes]]:
    rest, places = cut(data, (0, len(data)), number, len(data))
    return rest, [data[begin:end] for begin, end in places]


def sent_in(request: bytes) -> list[Sent]:
    found = []
    for group in entries(request, GROUPS)[1]:
        resource, scopes = entries(group, SCOPES)
        for each in scopes:
            scope, records = entries(each, RECORDS)
            found += [Sent(resource, scope, record) for record in records]
    return found


def got(receiver: Receiver, signal: Signal = TRACES) -> list[Sent]:
    return [record for each in receiver.got(signal.name) for record in sent_in(each.body)]


def odd(number: int, num_bytes: int = 0) -> bytes:
    """Return a span as no library writes one: fields out of order, one that nobody knows, the name twice."""
    span = spans(1, seed=number).resource_spans[0].scope_spans[0].spans[0]
    ids = TRACES.record(trace_id=span.trace_id, span_id=span.span_id).SerializeToString()
    name, unknown = TRACES.record(name=f"odd {number}").SerializeToString(), b"\xc2\x3e\x01?"  # field 1000
    return bytes(name + TRACES.record(trace_state="x" * num_bytes).SerializeToString() + unknown + name + ids)


def request_of(records: Sequence[bytes], service: str) -> bytes:
    group = spans(0, service=service).resource_spans[0].resource.SerializeToString()
    scope = entry(1, b"") + b"".join(entry(RECORDS, record) for record in records)
    return entry(GROUPS, entry(1, group) + entry(SCOPES, scope))


def take(store: Path, *requests: tuple[bytes, str]) -> None:
    """Have a collector receive requests of spans, each of a tenant."""
    with collecting(store) as (server, _, _):
        assert server.otlp is not None
        for body, tenant in requests:
            assert not server.otlp._receiver.receive(TRACES, Encoded(body), tenant).HasField("partial_success")


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_what_sdks_send_arrives_as_if_they_had_sent_it_there(store: Path, receiver: Receiver) -> None:
    resource = Resource({"service.name": "shop"})
    with collecting(store) as (_, own, _), grpc_target() as direct:
        ends = [own, direct.url.removeprefix("grpc://")]
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        logs = LoggerProvider(resource=resource, shutdown_on_exit=False)
        for end in ends:
            traces.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(end, insecure=True)))
            logs.add_log_record_processor(SimpleLogRecordProcessor(OTLPLogExporter(end, insecure=True)))
        with traces.get_tracer("shop").start_as_current_span("buy", attributes={"items": 2}) as span:
            span.add_event("paid")
        logs.get_logger("shop").emit(LogRecord(timestamp=BASE_NS, body="sold out", event_name="shop.sold_out"))
        meters = MeterProvider(
            [PeriodicExportingMetricReader(OTLPMetricExporter(end, insecure=True), 1e9) for end in ends],
            resource=resource,
            shutdown_on_exit=False,
        )
        meters.get_meter("shop").create_counter("sold").add(3, {"kind": "tea"})
        for provider in (traces, logs, meters):
            provider.shutdown()
        send(store, receiver.url)
        for signal in SIGNALS[::2]:
            assert got(receiver, signal) == got(direct, signal) != []
    (metric,) = got(receiver, SIGNALS[1])
    assert [metric.otlp] == open_store(store).table("metrics")["otlp"].to_pylist(), "each reader has a time of its own"
    assert [point.as_int for point in receiver.points("sold")] == [3]


@given(st.lists(any_request(), max_size=4))
def test_any_records_leave_in_their_bytes_with_what_they_are_of(requests: list[tuple[Signal, Any]]) -> None:
    for signal in SIGNALS:
        mine = [request for of, request in requests if of is signal]
        rows = [decode(signal, request.SerializeToString()).columns("") for request in mine]
        batches = [
            Batch(1, seq, columns.batch(source(1), 1000 * seq), signal.table) for seq, columns in enumerate(rows)
        ]
        records = [record for batch in batches for record in records_of(batch, lambda *_: None)]
        payloads = list(requests_of(records))
        came = [sent for request in mine for sent in sent_in(request.SerializeToString())]
        left = [sent for payload in payloads for sent in sent_in(payload.body)]
        assert left == came
        parts = [half for each in payloads for half in (halves(each) if each.num_items > 1 else (each,))]
        if signal.name != "metrics":
            assert [sent for part in parts for sent in sent_in(part.body)] == came


def test_odd_bytes_stay_as_they_are_through_halves_and_sizes(store: Path, receiver: Receiver) -> None:
    records = [odd(number, 60_000) for number in range(40)]
    take(store, (request_of(records, "shop"), ""))
    receiver.choose = lambda _, request: (
        Say(413, grpc.StatusCode.RESOURCE_EXHAUSTED)
        if len(request.resource_spans[0].scope_spans[0].spans) > 3
        else Say()
    )
    send(store, receiver.url)
    assert [each.otlp for each in got(receiver)] == records
    assert {each.resource for each in got(receiver)} == {sent_in(request_of(records, "shop"))[0].resource}
    receiver.choose = lambda *_: Say()
    replay(store, receiver.url)
    whole = receiver.got("traces")[-3:]
    assert [each.otlp for one in whole for each in sent_in(one.body)] == records
    assert all(len(one.body) < MAX_BYTES + 1024 for one in whole)


def test_a_metric_is_parted_at_its_points_and_no_other_changes() -> None:
    metrics = SIGNALS[1]
    few = metrics.record(name="few")
    few.sum.data_points.add(as_int=1)
    odd_one = few.SerializeToString() + metrics.record(name="few").SerializeToString()
    many = metrics.record(name="many")
    for number in range(5):
        many.sum.data_points.add(as_int=number)
    scope = entry(RECORDS, odd_one) + entry(RECORDS, many.SerializeToString())
    first, second = halves(Payload("metrics", entry(GROUPS, entry(SCOPES, scope)), 6))
    assert next(each.otlp for each in sent_in(first.body)) == odd_one
    parts = [metrics.record.FromString(each.otlp) for half in (first, second) for each in sent_in(half.body)][1:]
    assert [[point.as_int for point in part.sum.data_points] for part in parts] == [[0, 1], [2, 3, 4]]


# -- each once, with its own resource --------------------------------------------------------------------------------


def test_what_a_restart_cut_off_comes_again_as_a_whole_and_then_no_more(store: Path, receiver: Receiver) -> None:
    records = [odd(number, 30_000) for number in range(100)]
    take(store, *((request_of(records[at : at + 20], f"shop {at}"), "") for at in range(0, 100, 20)))
    receiver.choose = lambda *_: Say() if receiver.num_asked < 3 else Say(503, grpc.StatusCode.UNAVAILABLE)
    with subscribed(store, receiver.url, give_up_s=0.0) as subscriber, pytest.raises(GaveUp):
        subscriber.look(final=True)
    num_first = len(got(receiver))
    assert 0 < num_first < 100
    receiver.choose = lambda *_: Say()
    send(store, receiver.url)
    arrived = [each.otlp for each in got(receiver)]
    assert arrived[num_first:] == records, "the batches of a chunk are noted once all of it is taken"
    send(store, receiver.url)
    assert len(arrived) == len(got(receiver))
    assert Cursor(store, receiver.url).account["rows"] == {}


def row(otlp: bytes, resource_row: int, resource: bytes | None, tenant: str = "acme") -> dict[str, Any]:
    shared = {"resource_row": resource_row, "resource": resource, "scope_row": resource_row, "scope": resource and b""}
    return {**shared, "otlp": otlp, "tenant": tenant, "unix_ns": BASE_NS}


def test_a_resource_that_was_read_before_a_restart_is_found_and_never_another_tenants(
    store: Path, receiver: Receiver
) -> None:
    mine = sent_in(request_of([b""], "mine"))[0].resource
    collector, writer = source(2**63 + 5, rank=-1, stage=-1), Writer(store)
    writer.rows(collector, "sources", collector.row())
    writer.rows(collector, "spans", row(odd(0), 0, mine))
    send(store, receiver.url)
    writer.seal()
    writer.rows(collector, "spans", row(odd(1), 0, None), row(odd(2), 0, None, tenant="other"))
    send(store, receiver.url)
    writer.rows(collector, "spans", row(odd(3), 99, None))
    send(store, receiver.url)
    writer.close()
    assert [(each.resource, each.otlp) for each in got(receiver)] == [
        (mine, odd(0)),
        (mine, odd(1)),
        (b"", odd(2)),
        (b"", odd(3)),
    ]
    assert [len(sent_in(each.body)) for each in receiver.got("traces")] == [1, 1, 1, 1], "a request is of one tenant"


def test_what_a_tenant_had_erased_is_not_sent_and_others_keep_theirs(store: Path, receiver: Receiver) -> None:
    take(store, *((request_of([odd(number)], f"of {number}"), tenant) for number, tenant in enumerate("ab")))
    erased = CliRunner().invoke(command, ["store", "erase", str(store), "--tenant", "a", "--yes"])
    assert erased.exit_code == 0, erased.output
    send(store, receiver.url)
    assert got(receiver) == sent_in(request_of([odd(1)], "of 1"))


def test_a_replay_of_a_window_has_its_spans_with_a_resource_that_stands_outside(
    store: Path, receiver: Receiver
) -> None:
    request = spans(5)
    for number, span in enumerate(request.resource_spans[0].scope_spans[0].spans):
        span.start_time_unix_nano = BASE_NS + number * 1_000_000_000
    body = request.SerializeToString()
    take(store, (body, ""))
    told = replay(store, receiver.url, "--from", str(BASE_NS // 10**9 + 2), "--until", str(BASE_NS // 10**9 + 4))
    assert got(receiver) == sent_in(body)[2:4]
    assert told["account"]["sent"]["traces"] == 2
    assert replay(store, receiver.url, "--tables", "spans")["rows"] == 5
    assert got(receiver)[2:] == sent_in(body)


# -- what does not parse ---------------------------------------------------------------------------------------------

BAD: Final = b"\x0a\x7f"
"""A field that is longer than what holds it: no message."""


def sound(signal: Signal, number: int) -> bytes:
    text = {"name": f"{number}"} if signal is not SIGNALS[2] else {"event_name": f"{number}"}
    return bytes(signal.record(**text).SerializeToString())


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.table)
@pytest.mark.parametrize("bad", [{"otlp": BAD}, {"resource": BAD}, {"scope": BAD}], ids=lambda bad: next(iter(bad)))
def test_a_row_that_does_not_parse_is_counted_and_all_others_leave(
    signal: Signal, bad: dict[str, bytes], store: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    collector, writer = source(2**63 + 5, rank=-1, stage=-1), Writer(store)
    writer.rows(collector, "sources", collector.row())
    writer.rows(
        collector,
        signal.table,
        row(sound(signal, 0), 0, b""),
        row(sound(signal, 1), 1, b"") | bad,
        row(sound(signal, 2), 2, b""),
    )
    with subscribed(store, receiver.url) as subscriber:
        assert subscriber.look()
        writer.rows(collector, signal.table, row(sound(signal, 3), 3, b""))
        assert subscriber.look(final=True)
        assert subscriber.backlog().num_rows == 0
    writer.close()
    assert [each.otlp for each in got(receiver, signal)] == [sound(signal, number) for number in (0, 2, 3)]
    account = Cursor(store, receiver.url).account
    assert (account["rows"], account["dead"]) == ({"unmappable": 1}, {})
    assert f"rows of {signal.table} are not sent as OTLP and counted" in caplog.text
    send(store, receiver.url)
    assert len(got(receiver, signal)) == 3
    again = replay(store, receiver.url, code=ExitCode.PARTIAL)["account"]
    assert (again["sent"], again["rows"]) == ({signal.name: 3}, {"unmappable": 1})
    words = ["store", "replay", str(store), "--to", receiver.url, "--dry-run"]
    told = CliRunner().invoke(command, words)
    assert told.exit_code == ExitCode.PARTIAL
    assert told.stdout.endswith(f" to {receiver.url}, 1 unmappable lost\n")
