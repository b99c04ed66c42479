"""A process that sends spans over OTLP/gRPC, in requests that were serialised before the clock started.

`workers.Worker` asks it. Requests differ in their trace and span ids alone: a receiver may leave out what it has.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from worker_loop import serve

EXPORT: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
IN_FLIGHT: Final = 8
"""Requests that are not answered yet, at most."""
AGAIN: Final = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
"""What the specification has a sender send again, ..."""
AGAIN_S: Final = 0.05
"""... after so long."""
ANSWER_S: Final = 120.0
TRACE_BYTES, SPAN_BYTES = 16, 8


def request(num_spans: int) -> bytes:
    """Return one serialised request: what an instrumented model server says of its requests."""
    ids = np.random.default_rng(0)
    begin = time.time_ns()
    spans = [
        Span(
            trace_id=ids.bytes(TRACE_BYTES),
            span_id=ids.bytes(SPAN_BYTES),
            name="chat tiny-llama",
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=begin + number * 1_000_000,
            end_time_unix_nano=begin + number * 1_000_000 + 25_000_000,
            attributes=[
                _text("gen_ai.operation.name", "chat"),
                _text("gen_ai.request.model", "tiny-llama"),
                _number("gen_ai.usage.input_tokens", 17 + number),
                _number("gen_ai.usage.output_tokens", 40 + number % 7),
                _text("server.address", "127.0.0.1"),
                _number("server.port", 8000),
            ],
        )
        for number in range(num_spans)
    ]
    scope = ScopeSpans(scope=InstrumentationScope(name="bench", version="1"), spans=spans)
    resource = Resource(attributes=[_text("service.name", "bench"), _text("host.name", "localhost")])
    whole = ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope])])
    return whole.SerializeToString()


def _text(key: str, value: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=value))


def _number(key: str, value: int) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(int_value=value))


def places_of_ids(message: bytes) -> NDArray[np.int64]:
    """Return the places of all bytes of trace and span ids in a request."""
    spans = ExportTraceServiceRequest.FromString(message).resource_spans[0].scope_spans[0].spans
    ids = [each for span in spans for each in (span.trace_id, span.span_id)]
    starts = [message.index(each) for each in ids]
    assert len(set(starts)) == len(ids), "ids are random: each is found at its own place"
    return np.concatenate([np.arange(at, at + len(each)) for at, each in zip(starts, ids, strict=True)])


def requests(num_requests: int, num_spans: int, seed: int) -> list[bytes]:
    """Return requests that have no id in common."""
    first = np.frombuffer(request(num_spans), np.uint8)
    places = places_of_ids(first.tobytes())
    random = np.random.default_rng(seed)
    made = []
    for _ in range(num_requests):
        message = first.copy()
        message[places] = random.integers(0, 256, len(places), dtype=np.uint8)
        made.append(message.tobytes())
    return made


class Load:
    """Sends what it has made, once."""

    def __init__(self, address: str, num_requests: int, num_spans: int) -> None:
        self._requests = requests(num_requests, num_spans, seed=int.from_bytes(os.urandom(4), "big"))
        self._channel = grpc.insecure_channel(address)
        self._export = self._channel.unary_unary(
            EXPORT,
            request_serializer=lambda message: message,
            response_deserializer=ExportTraceServiceResponse.FromString,
        )
        grpc.channel_ready_future(self._channel).result(ANSWER_S)

    def do_ready(self) -> dict[str, Any]:
        """Answer, once all requests are made and the receiver is there."""
        return {}

    def do_send(self) -> dict[str, Any]:
        """Send all, several at a time, until each is answered. Raises where a receiver refuses for good."""
        began, cpu = time.perf_counter(), time.process_time()
        waiting = iter(self._requests)
        lock, refused = threading.Lock(), list[str]()

        def send_next() -> None:
            while not refused:
                with lock:
                    message = next(waiting, None)
                if message is None:
                    return
                try:
                    self._send(message)
                except Exception as error:
                    refused.append(_words(error))

        threads = [threading.Thread(target=send_next) for _ in range(IN_FLIGHT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if refused:
            raise RuntimeError(refused[0])
        return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}

    def _send(self, message: bytes) -> None:
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                answer = self._export(message, timeout=ANSWER_S)
            except grpc.RpcError as error:
                if _code(error) not in AGAIN or time.monotonic() > deadline:
                    raise
                threading.Event().wait(AGAIN_S)
                continue
            if answer.partial_success.rejected_spans:
                raise RuntimeError(f"spans were rejected: {answer.partial_success.error_message}")
            return

    def do_close(self) -> dict[str, Any]:
        self._channel.close()
        return {}


def _code(error: Exception) -> grpc.StatusCode | None:
    status: Any = error  # what a call raises is itself the call
    return status.code() if isinstance(status, grpc.Call) else None


def _words(error: Exception) -> str:
    status: Any = error
    code = _code(error)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "no OTLP receiver"
    return f"{code.name}: {status.details()}" if code is not None else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    serve(lambda: Load(job["address"], job["num_requests"], job["num_spans"]))
