"""Requests of OTLP as clients make them, from hypothesis and by hand, and a collector that takes them."""

from __future__ import annotations

import math
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from insitu.intake import Intake
from insitu_collector.otlp.ports import listener
from insitu_collector.otlp.problems import Problem
from insitu_collector.otlp.signals import SIGNALS, TRACES, Signal
from insitu_collector.service.server import CollectorServer

U64: Final = st.integers(0, 2**64 - 1)
I64: Final = st.integers(-(2**63), 2**63 - 1)
TEXT: Final = st.text(max_size=12)
FLOAT: Final = st.floats(allow_nan=True).map(lambda number: number if number == number else math.nan)
"""There is one NaN: JSON has no other."""


@contextmanager
def collecting(store: Path, intake: Intake | None = None) -> Iterator[tuple[CollectorServer, str, str]]:
    """A collector with both ports: itself, and where gRPC and HTTP are."""
    http = listener("127.0.0.1", 0)
    with CollectorServer(store, port=0, intake=intake, otlp_http=http) as server:
        yield server, f"127.0.0.1:{server.port}", f"http://127.0.0.1:{port_of(http)}"


def port_of(http: socket.socket) -> int:
    return int(http.getsockname()[1])


class Collector:
    """`insitu collect` in a process of its own."""

    def __init__(self, store: Path) -> None:
        options = ["collect", "--store", str(store), "--port", "0", "--otlp-http-port", "0"]
        self.process = subprocess.Popen([sys.executable, "-m", "insitu", *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.startswith("collecting on"):
                break
        found = re.search(r"http://(127.0.0.1:\d+) \(gRPC\) and on (http://127.0.0.1:\d+) \(HTTP\)", "".join(said))
        assert found is not None, said
        self.grpc, self.http = found[1], found[2]
        self._rest = threading.Thread(target=self.process.stderr.read)
        self._rest.start()

    def peak_bytes(self) -> int:
        """Return the most memory it has had resident so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.close()
        return status

    def close(self) -> None:
        """Let go of what is left of it. Safe to call twice."""
        self.process.kill()
        self.process.wait()
        self._rest.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def spans(num: int, *, seed: int = 0, service: str = "shop") -> Any:
    """Return a request of so many spans with valid ids, of one resource and scope."""
    chance = random.Random(seed)
    request = TRACES.request()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = service
    scope = group.scope_spans.add()
    scope.scope.name = "kit"
    for i in range(num):
        span = scope.spans.add(trace_id=chance.randbytes(16), span_id=chance.randbytes(8), name=f"span {i}")
        span.start_time_unix_nano = 1_800_000_000_000_000_000 + i
        span.attributes.add(key="i").value.int_value = i
    return request


def normal(request: Any) -> bytes:
    """Return a request in one form: bytes that are equal for equal requests, NaN included."""
    data: bytes = request.SerializeToString(deterministic=True)
    return data


def without_empty_groups(signal: Signal, request: Any) -> Any:
    """Return a copy of a request without groups and scopes that hold no record."""
    kept = signal.request()
    for group in groups_of(request):
        filled = [scope for scope in scopes_of(group) if len(records_of(scope))]
        if filled:
            copy = groups_of(kept).add()
            copy.CopyFrom(group)
            del scopes_of(copy)[:]
            scopes_of(copy).extend(filled)
    return kept


def why_refused(take: Callable[[], object]) -> tuple[grpc.StatusCode, float | None] | None:
    """Return the code and the delay of the Problem that a call raises; None where it raises none."""
    try:
        take()
    except Problem as problem:
        return problem.code, problem.retry_s
    return None


def groups_of(request: Any) -> Any:
    return getattr(request, request.DESCRIPTOR.fields_by_number[1].name)


def scopes_of(group: Any) -> Any:
    return getattr(group, group.DESCRIPTOR.fields_by_number[2].name)


def records_of(scope: Any) -> Any:
    return getattr(scope, scope.DESCRIPTOR.fields_by_number[2].name)


# -- requests of any kind --------------------------------------------------------------------------------------------


def values() -> st.SearchStrategy[AnyValue]:
    leaves = st.one_of(
        st.builds(AnyValue, string_value=TEXT),
        st.builds(AnyValue, bool_value=st.booleans()),
        st.builds(AnyValue, int_value=I64),
        st.builds(AnyValue, double_value=FLOAT),
        st.builds(AnyValue, bytes_value=st.binary(max_size=8)),
        st.just(AnyValue()),
    )
    return st.recursive(leaves, _nested, max_leaves=4)


def _nested(inner: st.SearchStrategy[AnyValue]) -> st.SearchStrategy[AnyValue]:
    arrays = st.builds(ArrayValue, values=st.lists(inner, max_size=3))
    lists = st.builds(KeyValueList, values=st.lists(st.builds(KeyValue, key=TEXT, value=inner), max_size=3))
    return st.one_of(st.builds(AnyValue, array_value=arrays), st.builds(AnyValue, kvlist_value=lists))


ATTRIBUTES: Final = st.lists(st.builds(KeyValue, key=TEXT, value=values()), max_size=3)
TRACE_IDS: Final = st.binary(min_size=16, max_size=16).filter(any)
SPAN_IDS: Final = st.binary(min_size=8, max_size=8).filter(any)


def span_records() -> st.SearchStrategy[Any]:
    event = st.builds(Span.Event, time_unix_nano=U64, name=TEXT, attributes=ATTRIBUTES)
    link = st.builds(Span.Link, trace_id=TRACE_IDS, span_id=SPAN_IDS, attributes=ATTRIBUTES, flags=st.integers(0, 511))
    return st.builds(
        Span,
        trace_id=TRACE_IDS,
        span_id=SPAN_IDS,
        parent_span_id=st.one_of(st.just(b""), SPAN_IDS),
        trace_state=TEXT,
        name=TEXT,
        kind=st.integers(0, 5),
        start_time_unix_nano=U64,
        end_time_unix_nano=U64,
        attributes=ATTRIBUTES,
        events=st.lists(event, max_size=2),
        links=st.lists(link, max_size=2),
    )


def metric_records() -> st.SearchStrategy[Any]:
    exemplars = st.lists(
        st.builds(metrics_pb2.Exemplar, time_unix_nano=U64, as_double=FLOAT, trace_id=TRACE_IDS, span_id=SPAN_IDS),
        max_size=1,
    )
    common: dict[str, Any] = {"attributes": ATTRIBUTES, "time_unix_nano": U64, "start_time_unix_nano": U64}
    number = st.one_of(
        st.builds(metrics_pb2.NumberDataPoint, **common, as_int=I64, exemplars=exemplars),
        st.builds(metrics_pb2.NumberDataPoint, **common, as_double=FLOAT, exemplars=exemplars),
    )
    counts = st.lists(U64, max_size=4)
    buckets = st.builds(
        metrics_pb2.ExponentialHistogramDataPoint.Buckets, offset=st.integers(-9, 9), bucket_counts=counts
    )
    exponential = st.builds(
        metrics_pb2.ExponentialHistogramDataPoint,
        **common,
        count=U64,
        sum=FLOAT,
        scale=st.integers(-10, 20),
        positive=buckets,
        negative=buckets,
        exemplars=exemplars,
    )
    plain = st.builds(
        metrics_pb2.HistogramDataPoint,
        **common,
        count=U64,
        bucket_counts=counts,
        explicit_bounds=st.lists(FLOAT, max_size=3),
        exemplars=exemplars,
    )
    quantile = st.builds(metrics_pb2.SummaryDataPoint.ValueAtQuantile, quantile=FLOAT, value=FLOAT)
    summary = st.builds(
        metrics_pb2.SummaryDataPoint, **common, count=U64, quantile_values=st.lists(quantile, max_size=2)
    )
    kinds = {
        "gauge": st.builds(metrics_pb2.Gauge, data_points=st.lists(number, max_size=2)),
        "sum": st.builds(metrics_pb2.Sum, data_points=st.lists(number, max_size=2), is_monotonic=st.booleans()),
        "histogram": st.builds(metrics_pb2.Histogram, data_points=st.lists(plain, max_size=2)),
        "exponential_histogram": st.builds(
            metrics_pb2.ExponentialHistogram, data_points=st.lists(exponential, max_size=2)
        ),
        "summary": st.builds(metrics_pb2.Summary, data_points=st.lists(summary, max_size=2)),
    }
    named: dict[str, Any] = {"name": TEXT, "unit": TEXT, "description": TEXT, "metadata": ATTRIBUTES}
    return st.one_of(*(st.builds(metrics_pb2.Metric, **named, **{kind: made}) for kind, made in kinds.items()))


def log_records() -> st.SearchStrategy[Any]:
    return st.builds(
        LogRecord,
        time_unix_nano=U64,
        observed_time_unix_nano=U64,
        severity_number=st.integers(0, 24),
        severity_text=TEXT,
        body=values(),
        attributes=ATTRIBUTES,
        trace_id=st.one_of(st.just(b""), TRACE_IDS, st.binary(max_size=20)),
        span_id=st.one_of(st.just(b""), SPAN_IDS),
        event_name=TEXT,
    )


RECORDS: Final = {"spans": span_records(), "metrics": metric_records(), "logs": log_records()}


@st.composite
def requests(draw: st.DrawFn, signal: Signal) -> Any:
    """Draw a request of a signal: any number of groups, scopes and records, schema URLs, empty ones too."""
    request = signal.request()
    for _ in range(draw(st.integers(0, 3))):
        group = groups_of(request).add(schema_url=draw(TEXT))
        if draw(st.booleans()):
            group.resource.CopyFrom(
                Resource(attributes=draw(ATTRIBUTES), dropped_attributes_count=draw(st.integers(0, 3)))
            )
        for _ in range(draw(st.integers(0, 2))):
            scope = scopes_of(group).add(schema_url=draw(TEXT))
            if draw(st.booleans()):
                named = InstrumentationScope(name=draw(TEXT), version=draw(TEXT), attributes=draw(ATTRIBUTES))
                scope.scope.CopyFrom(named)
            records_of(scope).extend(draw(st.lists(RECORDS[signal.table], max_size=3)))
    return request


def any_request() -> st.SearchStrategy[tuple[Signal, Any]]:
    """Draw a signal and a request of it."""
    return st.sampled_from(SIGNALS).flatmap(lambda signal: st.tuples(st.just(signal), requests(signal)))
