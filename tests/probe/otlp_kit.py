"""A receiver of OTLP in this process, over gRPC and over HTTP, that answers as a test says."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

REPLIES: Final[dict[str, Any]] = {
    "traces": trace_service_pb2.ExportTraceServiceResponse,
    "metrics": metrics_service_pb2.ExportMetricsServiceResponse,
}
REQUESTS: Final[dict[str, Any]] = {
    "traces": trace_service_pb2.ExportTraceServiceRequest,
    "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
}
STATUS: Final = {
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
}
"""What says the same over HTTP."""


@dataclass(frozen=True)
class Got:
    """One request that was accepted."""

    signal: str
    request: Any
    headers: Mapping[str, str]
    num_bytes: int


def spans_in(requests: Iterable[Any]) -> list[Span]:
    """Return all spans of requests, in order."""
    return [
        span
        for request in requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def points_in(requests: Iterable[Any], name: str) -> list[Any]:
    """Return all data points of a metric in requests, in order."""
    return [
        point
        for request in requests
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in getattr(metric, metric.WhichOneof("data")).data_points
    ]


class Inbox:
    """What a receiver got, and how it answers."""

    def __init__(self) -> None:
        self.target = ""
        """HOST:PORT."""
        self.code: grpc.StatusCode | None = None
        """Answered instead of accepting."""
        self.signal: str | None = None
        """The only signal that `code` and `num_rejected` are for."""
        self.num_rejected = 0
        """Spans or data points of each request that are refused out of it."""
        self.is_open = threading.Event()
        """Clear: whoever asks waits."""
        self.is_open.set()
        self.num_asked = 0
        self._got: list[Got] = []
        self._changed = threading.Condition()

    def answer(self, got: Got) -> grpc.StatusCode | Any:
        with self._changed:
            self.num_asked += 1
            self._changed.notify_all()
        self.is_open.wait()
        is_meant = self.signal in (None, got.signal)
        if self.code is not None and is_meant:
            return self.code
        with self._changed:
            self._got.append(got)
            self._changed.notify_all()
        reply = REPLIES[got.signal]()
        if self.num_rejected and is_meant:
            reply.partial_success.error_message = "as told"
            setattr(reply.partial_success, _REJECTED[got.signal], self.num_rejected)
        return reply

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), f"it did not come true; {self.num_asked} requests"

    def got(self, signal: str) -> list[Got]:
        return [got for got in self._got if got.signal == signal]

    def spans(self) -> list[Span]:
        return spans_in(got.request for got in self.got("traces"))

    def points(self, name: str) -> list[Any]:
        """Return all data points of a metric, in order of arrival."""
        return points_in((got.request for got in self.got("metrics")), name)

    def metric(self, name: str) -> Any:
        """Return the latest metric of this name."""
        return next(
            metric
            for got in reversed(self.got("metrics"))
            for resource in got.request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        )

    def resources(self) -> list[dict[str, Any]]:
        """Return the resource of each request."""
        return [
            attributes(each.resource)
            for got in self._got
            for each in (got.request.resource_spans if got.signal == "traces" else got.request.resource_metrics)
        ]


_REJECTED: Final = {"traces": "rejected_spans", "metrics": "rejected_data_points"}


def attributes(record: Any) -> dict[str, Any]:
    """Return the attributes of a span, point or resource."""
    return attributes_of(record.attributes)


def attributes_of(pairs: Any) -> dict[str, Any]:
    """Return key-value pairs as a dictionary."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class _Service(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, inbox: Inbox, signal: str) -> None:
        self._inbox = inbox
        self._signal = signal

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        headers = {str(key): str(value) for key, value in context.invocation_metadata()}
        answer = self._inbox.answer(Got(self._signal, request, headers, request.ByteSize()))
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as told")
        return answer


@contextmanager
def grpc_receiver(port: int = 0) -> Iterator[Inbox]:
    inbox = Inbox()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Service(inbox, "traces"), server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Service(inbox, "metrics"), server)  # type: ignore[no-untyped-call]
    inbox.target = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield inbox
    finally:
        inbox.is_open.set()
        server.stop(0).wait(10)


@contextmanager
def http_receiver() -> Iterator[Inbox]:
    inbox = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            num_bytes = len(body)
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            signal = self.path.removeprefix("/v1/")
            headers = {key.lower(): value for key, value in self.headers.items()}
            answer = inbox.answer(Got(signal, REQUESTS[signal].FromString(body), headers, num_bytes))
            status, reply = 200, b""
            if isinstance(answer, grpc.StatusCode):
                status = STATUS[answer]
            else:
                reply = answer.SerializeToString()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    inbox.target = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield inbox
    finally:
        inbox.is_open.set()
        server.shutdown()
        server.server_close()
        thread.join()
