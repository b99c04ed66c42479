"""Receivers of OTLP that misbehave on command, over HTTP and over gRPC, with all three signals; and a store to send."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import grpc
import trustme
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from otlp_kit import points_in, spans_in

from insitu_collector.subscriber.payloads import REQUESTS, payload_of

_REPLIES: Final[dict[str, tuple[Any, str]]] = {
    "traces": (ExportTraceServiceResponse, "rejected_spans"),
    "metrics": (ExportMetricsServiceResponse, "rejected_data_points"),
    "logs": (ExportLogsServiceResponse, "rejected_log_records"),
}
_SERVICES: Final = {
    "opentelemetry.proto.collector.trace.v1.TraceService": "traces",
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "metrics",
    "opentelemetry.proto.collector.logs.v1.LogsService": "logs",
}


@dataclass(frozen=True)
class Say:
    """One answer: of both protocols, so that a table of cases holds for both."""

    status: int = 200
    code: grpc.StatusCode = grpc.StatusCode.OK
    retry_s: int | None = None
    """`Retry-After`, or RetryInfo."""
    num_rejected: int = 0
    text: str = ""


OK: Final = Say()
HANG: Final = Say(text="hang")


@dataclass(frozen=True)
class Got:
    """One request that was taken, as it came."""

    signal: str
    body: bytes
    headers: dict[str, str]

    @property
    def request(self) -> Any:
        return REQUESTS[self.signal].FromString(self.body)


class Receiver:
    """What a receiver got. `answers` are given first, one a request; `too_large` and OK for the rest."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: deque[Say] = deque()
        self.choose: Callable[[str, Any], Say] = lambda *_: OK
        """What is answered where nothing is left in `answers`: by signal and request."""
        self.num_asked = 0
        self.release = threading.Event()
        self._got: list[Got] = []
        self._changed = threading.Condition()

    def answer(self, got: Got) -> Say:
        with self._changed:
            self.num_asked += 1
            say = self.answers.popleft() if self.answers else self.choose(got.signal, got.request)
            if say.status == 200 and say is not HANG:
                self._got.append(got)
            self._changed.notify_all()
        if say is HANG:
            self.release.wait()
        return say

    def got(self, signal: str) -> list[Got]:
        with self._changed:
            return [got for got in self._got if got.signal == signal]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), f"it did not come true; {self.num_asked} requests"

    def spans(self) -> list[Any]:
        return spans_in(got.request for got in self.got("traces"))

    def records(self) -> list[Any]:
        return [
            record
            for got in self.got("logs")
            for resource in got.request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def points(self, name: str) -> list[Any]:
        """Return all data points of a metric, in order of arrival."""
        return points_in((got.request for got in self.got("metrics")), name)

    def num_items(self) -> int:
        with self._changed:
            return sum(payload_of(got.signal, got.body).num_items for got in self._got)


def reply_of(signal: str, say: Say) -> bytes:
    kind, field = _REPLIES[signal]
    reply = kind()
    if say.num_rejected or say.text:
        reply.partial_success.error_message = say.text
        setattr(reply.partial_success, field, say.num_rejected)
    return bytes(reply.SerializeToString())


@contextmanager
def http_target(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            signal = self.path.rpartition("/")[2]
            headers = {key.lower(): value for key, value in self.headers.items()} | {"path": self.path}
            say = receiver.answer(Got(signal, body, headers))
            if say is HANG:
                self.close_connection = True
                return
            reply = reply_of(signal, say) if say.status == 200 else Status(message=say.text).SerializeToString()
            self.send_response(say.status)
            if say.retry_s is not None:
                self.send_header("Retry-After", str(say.retry_s))
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    receiver.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def grpc_target(tls: grpc.ServerCredentials | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    def export(signal: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def serve(body: bytes, context: grpc.ServicerContext) -> bytes:
            headers = {str(key): str(value) for key, value in context.invocation_metadata()}
            say = receiver.answer(Got(signal, body, headers))
            if say.code is not grpc.StatusCode.OK:
                if say.retry_s is not None:
                    detail = AnyMessage()
                    detail.Pack(RetryInfo(retry_delay=Duration(seconds=say.retry_s)))
                    status = Status(code=say.code.value[0], message=say.text, details=[detail])
                    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
                context.abort(say.code, say.text)
            return reply_of(signal, say)

        return serve

    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    for service, signal in _SERVICES.items():
        handler = grpc.unary_unary_rpc_method_handler(export(signal))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
    if tls is None:
        receiver.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        receiver.url = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', tls)}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.release.set()
        server.stop(0).wait(10)


TARGETS: Final[Mapping[str, Callable[[], AbstractContextManager[Receiver]]]] = {
    "http": http_target,
    "grpc": grpc_target,
}


def tls_target(
    protocol: str, ca: trustme.CA, *, asks: bool = False, leaf: trustme.LeafCert | None = None
) -> AbstractContextManager[Receiver]:
    """A receiver with TLS. asks: for a certificate that `ca` has signed. leaf: its own, in place of a good one."""
    issued = leaf or ca.issue_cert("127.0.0.1")
    if protocol == "http":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(context)
        if asks:
            ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return http_target(context)
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    root = ca.cert_pem.bytes() if asks else None
    return grpc_target(grpc.ssl_server_credentials([pair], root, asks))
