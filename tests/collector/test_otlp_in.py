"""OpenTelemetry's own SDK sends to a collector, over gRPC and HTTP: it is stored, durable, and read back equal."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from disk_kit import fill, small_disk
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import HealthCheck, given, settings
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.metrics import Observation
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import AlwaysOnExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, StatusCode
from opentelemetry.trace import Status as SpanStatus
from otlp_in_kit import Collector, any_request, collecting, normal, spans, without_empty_groups

from insitu.intake import Intake, Quota, Quotas
from insitu_collector.otlp.limits import MAX_REQUEST_BYTES
from insitu_collector.otlp.signals import LOGS, SIGNALS, TRACES, Signal
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

PROTOBUF = {"Content-Type": "application/x-protobuf"}
RESOURCE = Resource({"service.name": "shop", "service.version": "1.2"})


@dataclass
class Ports:
    """A running collector."""

    server: CollectorServer
    store: Path
    grpc: str
    http: str

    def export(self, signal: Signal, body: bytes, **options: Any) -> Any:
        """Send one request over gRPC. Raises grpc.RpcError."""
        with grpc.insecure_channel(self.grpc, options=(("grpc.max_send_message_length", -1),)) as channel:
            call = channel.unary_unary(f"/{signal.service}/Export", None, signal.response.FromString)
            return call(body, timeout=30, **options)

    def post(self, signal: Signal, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """Send one request over HTTP."""
        return httpx.post(self.http + signal.path, content=body, headers=headers or PROTOBUF, timeout=30)

    def stored(self, signal: Signal) -> list[Any]:
        """Return the requests in the store."""
        return list(open_store(self.store).otlp(signal.table))


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[Ports]:
    with collecting(tmp_path / "store") as (server, over_grpc, over_http):
        yield Ports(server, tmp_path / "store", over_grpc, over_http)


def some_spans() -> Any:
    """Return spans of an SDK with all that spans have."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("shop.http", "3", schema_url="https://example.org/1")
    with tracer.start_as_current_span("outer", attributes={"a": [1, 2], "b": "ü", "c": 0.5, "d": True}) as outer:
        outer.add_event("event", {"n": 1})
        with tracer.start_as_current_span("inner", links=[Link(outer.get_span_context(), {"l": 1})]) as inner:
            inner.set_status(SpanStatus(StatusCode.ERROR, "no stock"))
    with provider.get_tracer("other").start_as_current_span("third"):
        pass
    return kept.get_finished_spans()


def some_metrics() -> Any:
    """Return metrics of an SDK of every kind it has, with exemplars of a sampled trace."""
    reader = InMemoryMetricReader()
    view = View(instrument_name="latency", aggregation=ExponentialBucketHistogramAggregation())
    provider = MeterProvider([reader], RESOURCE, exemplar_filter=AlwaysOnExemplarFilter(), views=[view])
    meter = provider.get_meter("shop", "1")
    meter.create_counter("sold", "{item}").add(3, {"kind": "book"})
    meter.create_up_down_counter("carts").add(-1)
    meter.create_gauge("load").set(0.5)
    meter.create_histogram("size", "By").record(700)
    meter.create_observable_gauge("heat", [lambda _: [Observation(3.5)]])
    with TracerProvider().get_tracer("t").start_as_current_span("s"):
        for value in (0.001, 2.0, 900.0):
            meter.create_histogram("latency", "s").record(value)
    return reader.get_metrics_data()


def some_logs() -> Any:
    """Return log records of an SDK."""
    kept = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider(RESOURCE)
    provider.add_log_record_processor(SimpleLogRecordProcessor(kept))
    logger = provider.get_logger("shop.log")
    with TracerProvider().get_tracer("t").start_as_current_span("s"):
        logger.emit(body="sold", severity_text="INFO", attributes={"n": 2}, event_name="shop.sold")
    logger.emit(body={"nested": ["a", 1]}, observed_timestamp=5)
    return kept.get_finished_logs()


MADE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "traces": (some_spans, encode_spans),
    "metrics": (some_metrics, encode_metrics),
    "logs": (some_logs, encode_logs),
}
OVER_GRPC: dict[str, Any] = {"traces": GrpcSpans, "metrics": GrpcMetrics, "logs": GrpcLogs}
OVER_HTTP: dict[str, Any] = {"traces": HttpSpans, "metrics": HttpMetrics, "logs": HttpLogs}


def exporters(ports: Ports, signal: Signal) -> list[Any]:
    """Return the SDK's exporters of a signal: over gRPC and HTTP, plain and gzip."""
    over_grpc, over_http = OVER_GRPC[signal.name], OVER_HTTP[signal.name]
    return [
        over_grpc(endpoint=f"http://{ports.grpc}"),
        over_grpc(endpoint=f"http://{ports.grpc}", compression=grpc.Compression.Gzip),
        over_http(endpoint=ports.http + signal.path),
        over_http(endpoint=ports.http + signal.path, compression=Compression.Gzip),
    ]


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_what_an_sdk_sends_is_read_back_equal(ports: Ports, signal: Signal) -> None:
    make, encode = MADE[signal.name]
    sent = make()
    expected = normal(encode(sent))
    number = 0
    for number, exporter in enumerate(exporters(ports, signal), 1):
        assert exporter.export(sent).name == "SUCCESS"
        found = ports.stored(signal)  # at once: an answer says it is durable
        assert len(found) == number and normal(found[-1]) == expected
        exporter.shutdown()
    assert number == 4


def test_metrics_of_an_sdk_are_of_every_kind_it_has_and_have_exemplars(ports: Ports) -> None:
    GrpcMetrics(endpoint=f"http://{ports.grpc}").export(some_metrics())
    rows = open_store(ports.store).table("metrics").to_pylist()
    assert {row["name"]: row["kind"] for row in rows} == {
        "sold": "sum",
        "carts": "sum",
        "load": "gauge",
        "heat": "gauge",
        "size": "histogram",
        "latency": "exponential_histogram",
    }
    assert all(row["service"] == "shop" and row["unix_ns"] > 10**18 for row in rows)
    (latency,) = (row["otlp"] for row in rows if row["name"] == "latency")
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

    (point,) = Metric.FromString(latency).exponential_histogram.data_points
    assert point.count == 3 and len(point.exemplars) > 0 and len(point.exemplars[0].trace_id) == 16


def test_rows_are_found_by_sql(ports: Ports) -> None:
    HttpSpans(endpoint=f"{ports.http}/v1/traces").export(some_spans())
    found = open_store(ports.store).sql(
        "SELECT a.name, b.scope IS NOT NULL AS scoped FROM spans a JOIN spans b "
        "ON a.epoch = b.epoch AND a.scope_row = b.row_seq WHERE a.service = 'shop' ORDER BY a.row_seq"
    )
    assert found["name"].to_pylist() == ["inner", "outer", "third"]
    assert all(found["scoped"].to_pylist())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_request())
def test_any_request_is_answered_over_http_and_read_back_equal(ports: Ports, drawn: tuple[Signal, Any]) -> None:
    signal, request = drawn
    before = len(ports.stored(signal))
    answer = ports.post(signal, request.SerializeToString())
    assert (answer.status_code, answer.content) == (200, b"")
    expected = without_empty_groups(signal, request)
    found = ports.stored(signal)[before:]
    assert [normal(each) for each in found] == ([normal(expected)] if expected.ByteSize() else [])


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_an_empty_request_is_a_success(ports: Ports, signal: Signal) -> None:
    assert ports.export(signal, b"") == signal.response()
    assert (ports.post(signal, b"").status_code, ports.post(signal, b"").content) == (200, b"")
    answer = ports.post(signal, b"{}", {"Content-Type": "application/json; charset=utf-8"})
    assert (answer.status_code, answer.json()) == (200, {})
    assert ports.stored(signal) == []


def bad_and_good() -> Any:
    """Return a request of five spans: one without an id, one with a name that is too long."""
    request = spans(5)
    all_spans = request.resource_spans[0].scope_spans[0].spans
    all_spans[1].ClearField("span_id")
    all_spans[3].name = "n" * 300
    return request


def test_what_cannot_be_stored_is_a_partial_success_and_counted(ports: Ports) -> None:
    request = bad_and_good()
    over_grpc = ports.export(TRACES, request.SerializeToString()).partial_success
    assert over_grpc.rejected_spans == 2
    assert "1 spans (invalid_id)" in over_grpc.error_message and "(name_too_long)" in over_grpc.error_message
    over_http = TRACES.response.FromString(ports.post(TRACES, request.SerializeToString()).content)
    assert over_http.partial_success == over_grpc
    stored = open_store(ports.store).table("spans")["name"].to_pylist()
    assert stored == ["span 0", "span 2", "span 4"] * 2
    assert ports.server.otlp is not None
    counts = ports.server.otlp.to_json()
    assert counts["stored"] == {"spans": 6}
    assert counts["rejected"] == {"spans": {"invalid_id": 2, "name_too_long": 2}}
    account = ports.server.ingest.account()
    found = (account["produced"]["spans"], account["durable"]["spans"], account["dropped"]["spans"])
    assert found == (10, 6, {"refused_invalid": 4}), "each record that came is stored or counted"


def test_rejects_are_told_in_the_store_when_they_begin_and_when_they_double(ports: Ports) -> None:
    for _ in range(5):
        ports.export(TRACES, bad_and_good().SerializeToString())
    ports.export(TRACES, spans(1).SerializeToString())  # with its sync, all before it
    events = open_store(ports.store).table("events").to_pylist()
    told = [event["text"] for event in events if event["kind"] == "otlp_rejected" and "invalid_id" in event["text"]]
    assert [text.partition(" of spans")[0] for text in told] == ["1", "2", "4"]


def test_requests_in_json_are_taken_and_answered_in_json(ports: Ports) -> None:
    said = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "web"}}]},
                "scopeSpans": [
                    {
                        "spans": [
                            {"traceId": "5B8EFFF798038103D269B633813FC60C", "spanId": "eee19b7ec3c1b174", "name": "ok"},
                            {"traceId": "", "spanId": "eee19b7ec3c1b174", "name": "no id"},
                        ]
                    }
                ],
            }
        ]
    }
    answer = ports.post(TRACES, json.dumps(said).encode(), {"Content-Type": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "1"
    (row,) = open_store(ports.store).table("spans").to_pylist()
    assert (row["trace_id"], row["service"], row["name"]) == ("5b8efff798038103d269b633813fc60c", "web", "ok")


def refusal(ports: Ports, signal: Signal, body: bytes) -> tuple[grpc.StatusCode, Status, dict[str, bytes]]:
    """Return how a request is refused over gRPC: code, details, trailing metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        ports.export(signal, body)
    pairs: Any = caught.value.trailing_metadata()
    trailing = dict(pairs or ())
    return caught.value.code(), Status.FromString(trailing["grpc-status-details-bin"]), trailing


@pytest.mark.parametrize("body", [b"nonsense", b"\x0a\x05abc", b"\x1f\x8bno gzip"])
def test_nonsense_is_refused_for_good_in_the_same_words_over_both(ports: Ports, body: bytes) -> None:
    code, status, _ = refusal(ports, LOGS, body)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (status.code, list(status.details)) == (3, [])
    gzipped = PROTOBUF | {"Content-Encoding": "gzip"} if body.startswith(b"\x1f") else PROTOBUF
    answer = ports.post(LOGS, body, gzipped)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/x-protobuf")
    assert Status.FromString(answer.content) == status
    assert "retry-after" not in answer.headers
    in_json = ports.post(LOGS, b"{nonsense", {"Content-Type": "application/json"})
    assert (in_json.status_code, in_json.json()["code"]) == (400, 3)
    assert ports.server.otlp is not None
    assert ports.server.otlp.to_json()["refused_requests"] == {"logs": {"invalid_argument": 3}}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-protobuf", "Content-Encoding": "br"}, 415),
        ({"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip, gzip"}, 415),
        ({"Content-Type": "APPLICATION/X-PROTOBUF; a=b", "Content-Encoding": "GZIP"}, 200),
    ],
)
def test_forms_that_otlp_has_not_are_refused(ports: Ports, headers: dict[str, str], status: int) -> None:
    assert ports.post(TRACES, gzip.compress(b""), headers or {"X": "y"}).status_code == status


def test_other_paths_and_methods_are_not_there(ports: Ports) -> None:
    assert httpx.get(f"{ports.http}/v1/traces").status_code == 405
    assert httpx.post(f"{ports.http}/v1/other", content=b"").status_code == 404


def test_too_large_a_request_is_refused_for_good(ports: Ports) -> None:
    body = bytes(MAX_REQUEST_BYTES + 1)
    code, status, trailing = refusal(ports, TRACES, body)
    assert (code, status.code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 8)
    assert "google.rpc.retryinfo-bin" not in trailing, "it is not to be sent again"
    for content in (
        body,
        (body[i : i + (1 << 20)] for i in range(0, len(body), 1 << 20)),
    ):  # with its length, and in chunks
        answer = httpx.post(f"{ports.http}/v1/traces", content=content, headers=PROTOBUF)
        assert answer.status_code == 413 and "retry-after" not in answer.headers


def test_without_memory_a_request_is_asked_for_again_later(ports: Ports) -> None:
    admission = ports.server._admission
    all_there_is = admission.limits.in_flight
    assert admission.take("somebody", all_there_is) is None
    try:
        code, status, trailing = refusal(ports, TRACES, spans(1).SerializeToString())
        assert code is grpc.StatusCode.UNAVAILABLE
        retry = RetryInfo()
        assert status.details[0].Unpack(retry) and retry.retry_delay.seconds == 1
        assert RetryInfo.FromString(trailing["google.rpc.retryinfo-bin"]) == retry
        answer = ports.post(TRACES, spans(1).SerializeToString())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    finally:
        admission.give("somebody", all_there_is)
    assert ports.post(TRACES, spans(1).SerializeToString()).status_code == 200
    ports.export(TRACES, spans(1).SerializeToString())


def test_who_has_sent_more_than_the_quota_is_asked_to_wait_as_long_as_it_says(tmp_path: Path) -> None:
    quotas = Quotas(by_tenant={}, others=Quota(rows_per_s=10))
    body = spans(40).SerializeToString()
    with collecting(tmp_path / "store", Intake(quotas=quotas)) as (server, at_grpc, at_http):
        ports = Ports(server, tmp_path / "store", at_grpc, at_http)
        ports.export(TRACES, body)  # what is larger than a second's worth is taken, and what follows waits for it
        code, _, trailing = refusal(ports, TRACES, body)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        delay = RetryInfo.FromString(trailing["google.rpc.retryinfo-bin"]).retry_delay
        assert 1 <= delay.seconds <= 3
        answer = ports.post(TRACES, body)
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 3
        refused = server.health.counts.totals().refused
        assert {reason: taken.frames for (reason, _), taken in refused.items()} == {"refused_quota": 2}
    assert open_store(tmp_path / "store").table("spans").num_rows == 40


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_on_a_full_disk_an_sdk_tries_again_and_nothing_is_lost_or_stored_twice(tmp_path: Path, over: str) -> None:
    with small_disk(tmp_path / "disk", 8 << 20) as disk, collecting(disk / "store") as (server, at_grpc, at_http):
        ports = Ports(server, disk / "store", at_grpc, at_http)
        ballast = fill(disk)
        if over == "grpc":
            code, _, trailing = refusal(ports, TRACES, spans(1).SerializeToString())
            assert code is grpc.StatusCode.UNAVAILABLE and "google.rpc.retryinfo-bin" in trailing
            exporter: Any = GrpcSpans(endpoint=f"http://{at_grpc}", timeout=30)
        else:
            assert ports.post(TRACES, spans(1).SerializeToString()).headers["retry-after"] == "1"
            exporter = HttpSpans(endpoint=f"{at_http}/v1/traces", timeout=30)
        assert server.otlp is not None
        before = server.otlp.to_json()["refused_requests"]["traces"]["unavailable"]
        with ThreadPoolExecutor(1) as pool:
            exporting = pool.submit(exporter.export, some_spans())
            wait_until(lambda: server.otlp.to_json()["refused_requests"]["traces"]["unavailable"] > before)  # type: ignore[union-attr]
            ballast.unlink()
            assert exporting.result(60).name == "SUCCESS"
        assert open_store(disk / "store").table("spans")["name"].to_pylist() == ["inner", "outer", "third"]
        exporter.shutdown()


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    for _ in range(3000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_requests_of_many_clients_at_once_are_each_stored_whole_and_once(ports: Ports) -> None:
    requests = [spans(20, seed=seed, service=f"service {seed}") for seed in range(24)]

    def send(number: int) -> None:
        if number % 2:
            ports.export(TRACES, requests[number].SerializeToString())
        else:
            assert ports.post(TRACES, requests[number].SerializeToString()).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(len(requests))))
    found = ports.stored(TRACES)
    assert sorted(normal(each) for each in found) == sorted(normal(each) for each in requests)
    numbers = open_store(ports.store).table("spans")["row_seq"].to_pylist()
    assert sorted(numbers) == list(range(480))


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_what_was_answered_is_there_after_a_kill(tmp_path: Path, over: str) -> None:
    collector = Collector(tmp_path / "store")
    try:
        if over == "grpc":
            with grpc.insecure_channel(collector.grpc) as channel:
                call = channel.unary_unary(f"/{TRACES.service}/Export", None, None)
                assert call(spans(3).SerializeToString(), timeout=30) == b""
        else:
            url = f"{collector.http}/v1/traces"
            assert httpx.post(url, content=spans(3).SerializeToString(), headers=PROTOBUF).status_code == 200
    finally:
        collector.close()  # by SIGKILL
    assert [normal(each) for each in open_store(tmp_path / "store").otlp("spans")] == [normal(spans(3))]


def test_what_was_answered_is_there_after_a_stop_and_what_comes_later_is_refused(tmp_path: Path) -> None:
    with collecting(tmp_path / "store") as (server, at_grpc, at_http):
        ports = Ports(server, tmp_path / "store", at_grpc, at_http)
        ports.export(TRACES, spans(3).SerializeToString())
    with pytest.raises(grpc.RpcError) as caught:
        ports.export(TRACES, b"")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(httpx.ConnectError):
        ports.post(TRACES, b"")
    assert [normal(each) for each in ports.stored(TRACES)] == [normal(spans(3))]
