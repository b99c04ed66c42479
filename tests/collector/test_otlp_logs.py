"""Incidents as OTLP logs: received by the protocol's own services over gRPC and HTTP, and by servers that fail."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import grpc
import pytest
from alert_kit import alert, serving
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from insitu.vocabulary import VerdictKind
from insitu_collector.notify import otlp_logs
from insitu_collector.notify.delivery import Unsent
from insitu_collector.notify.otlp_logs import OtlpLogs, severity_of, speaks_grpc

Request = logs_service_pb2.ExportLogsServiceRequest


class Service(logs_service_pb2_grpc.LogsServiceServicer):
    """The receiving end of OTLP/gRPC; `codes` are answered first, one a request."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self.codes = list(codes)
        self.got: Queue[Request] = Queue()
        self.release = threading.Event()

    def Export(self, request: Request, context: grpc.ServicerContext) -> Any:
        if self.codes:
            code = self.codes.pop(0)
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.release.wait()
            context.abort(code, "as told")
        self.got.put(request)
        return logs_service_pb2.ExportLogsServiceResponse()


@pytest.fixture
def service() -> Iterator[tuple[Service, str]]:
    servicer = Service()
    server = grpc.server(ThreadPoolExecutor(4))
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"http://127.0.0.1:{port}"
    finally:
        servicer.release.set()
        server.stop(0).wait(10)


def attributes(record: LogRecord) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(each) for each in found.values] if kind == "array_value" else found

    return {pair.key: plain(pair.value) for pair in record.attributes}


def only(request: Request) -> LogRecord:
    (resource,) = request.resource_logs
    assert {pair.key: pair.value.string_value for pair in resource.resource.attributes}["service.name"] == "insitu"
    (scope,) = resource.scope_logs
    assert scope.scope.name == "insitu.verdicts"
    (record,) = scope.log_records
    return record


def check(record: LogRecord, sent: Any) -> None:
    assert record.body.string_value == "rank 1 (stage 1) is stuck."
    assert (record.severity_text, record.severity_number) == ("ERROR", 17)
    assert record.time_unix_nano == sent.unix_ns
    assert record.event_name == "insitu.incident"
    assert attributes(record) == {
        "insitu.incident": "run-stuck-r1-1",
        "insitu.alert": "run-stuck-r1-1#0",
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
        "insitu.requests": ["a", "b"],
    }


def test_an_alert_arrives_over_grpc(service: tuple[Service, str]) -> None:
    servicer, url = service
    with closing(OtlpLogs(url)) as logs:
        sent = alert()
        logs.send(sent)
        check(only(servicer.got.get(timeout=10)), sent)


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED])
def test_what_grpc_refuses_is_not_taken_for_sent(
    service: tuple[Service, str], code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    servicer, url = service
    servicer.codes.append(code)
    with closing(OtlpLogs(url)) as logs:
        with pytest.raises(Unsent) as refused:
            logs.send(alert())
        assert refused.value.again
        logs.send(alert())
    assert servicer.got.qsize() == 1
    assert caplog.records == []  # the delivery says it, once


def test_a_service_that_hangs_is_left(service: tuple[Service, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_logs, "ATTEMPT_S", 0.3)
    servicer, url = service
    servicer.codes.append(grpc.StatusCode.DEADLINE_EXCEEDED)
    with closing(OtlpLogs(url)) as logs, pytest.raises(Unsent):
        logs.send(alert())


@pytest.mark.parametrize("path", ["", "/v1/logs"], ids=["grpc", "http"])
def test_an_endpoint_that_is_not_there_is_tried_again(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp_logs, "ATTEMPT_S", 0.3)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}{path}"
        with closing(OtlpLogs(url)) as logs, pytest.raises(Unsent) as refused:
            logs.send(alert())
    assert refused.value.again
    assert caplog.records == []


@pytest.mark.parametrize("answer", [500, 503, "hang", "garbage"])
def test_http_that_fails_is_tried_again(answer: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_logs, "ATTEMPT_S", 0.3)
    with (
        serving(*[answer] * 100) as server,
        closing(OtlpLogs(f"{server.base}/v1/logs")) as logs,
        pytest.raises(Unsent) as refused,
    ):
        logs.send(alert())
    assert refused.value.again


def test_an_alert_arrives_over_http() -> None:
    got: Queue[tuple[str, Request]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = Request.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            got.put((self.path, request))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with closing(OtlpLogs(f"http://127.0.0.1:{server.server_port}/v1/logs")) as logs:
            sent = alert()
            logs.send(sent)
        path, request = got.get(timeout=10)
        assert path == "/v1/logs"
        check(only(request), sent)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("url", "environment", "is_grpc"),
    [
        ("http://there:4317", {}, True),
        ("http://there:4317/", {}, True),
        ("http://there:4318/v1/logs", {}, False),
        ("http://there:4318", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, False),
        ("http://there/x", {"OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL": "http"}, True),
    ],
)
def test_which_protocol_an_endpoint_speaks(url: str, environment: dict[str, str], is_grpc: bool) -> None:
    assert speaks_grpc(url, environment) is is_grpc


@pytest.mark.parametrize(
    ("kind", "state", "severity"),
    [
        (VerdictKind.STUCK, "open", "ERROR"),
        (VerdictKind.STUCK, "closed", "INFO"),
        (VerdictKind.GC_PAUSE, "open", "WARN"),
        ("acme.thermal", "open", "WARN"),
        (VerdictKind.SITE_NEVER_FIRED, "open", "INFO"),
    ],
)
def test_severity(kind: str, state: str, severity: str) -> None:
    assert severity_of(alert(kind=kind, state=state)) == severity


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from insitu_collector.notify.otlp_logs import OtlpLogs\n"
        "try: OtlpLogs('http://there:4317')\n"
        "except ValueError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "OTLP logs to http://there:4317 need the extra otlp: pip install 'insitu[otlp]'\n"


def test_a_judge_imports_none_of_it_when_it_is_not_asked_for() -> None:
    code = (
        "import sys, insitu_collector.judge.command\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'prometheus_client')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "[]\n"
