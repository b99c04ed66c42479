"""The two ends of an OTLP connection: what this process is, and OpenTelemetry's own exporters with what they are told.

Endpoint, headers, certificates, compression and timeouts are read from OTEL_* variables by those exporters. They
answer SUCCESS or FAILURE alone; why, and how much of a request was refused, is taken from the answer on its way.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
from opentelemetry.sdk.metrics.export import Metric, MetricExporter, MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from insitu.exporters.otlp import names
from insitu.identity import Source, package_version
from insitu.vocabulary import NO_RANK, DropReason

THREAD: Final = "insitu-otlp"
SIGNALS: Final = ("traces", "metrics", "logs")
PORTS: Final = {"grpc": 4317, "http/protobuf": 4318}
COMPRESSIONS: Final = {"grpc": ("none", "gzip"), "http/protobuf": ("none", "gzip", "deflate")}
AGAIN: Final[frozenset[str | int]] = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS", 429, 502, 503, 504}
)
"""Answers after which the specification of OTLP has a client try again."""
TOO_MUCH: Final[frozenset[str | int]] = frozenset({"RESOURCE_EXHAUSTED", 413})
_in_use: set[Any] = set()
"""Exporters not shut down yet. A forked child keeps its parent's here, untouched: see `insitu.exporters.collector`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    reason: DropReason | None = None
    """Why it was not taken; None: it was."""
    again: bool = False
    """It may be taken later."""
    num_rejected: int = 0
    """Spans or data points of it that were refused for good, where it was taken (`partial_success`)."""
    text: str = ""


class _Notes:
    """What the receiver said since the last `clear`. One thread."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.code: str | int | None = None
        self.text = ""
        self.num_rejected = 0

    def take(self, reply: Any) -> None:
        """Note the reply of a request that was taken."""
        partial = reply.partial_success
        self.num_rejected = getattr(partial, "rejected_spans", 0) or getattr(partial, "rejected_data_points", 0)
        self.text = partial.error_message

    def answer(self, is_taken: bool) -> Answer:
        if is_taken:
            return Answer(None, False, self.num_rejected, self.text)
        told = " ".join(str(part) for part in (self.code, self.text) if part) or "no answer"
        if self.code is None or self.code in AGAIN:
            return Answer(DropReason.COLLECTOR_UNREACHABLE, True, 0, told)
        reason = DropReason.REFUSED_QUOTA if self.code in TOO_MUCH else DropReason.REFUSED_INVALID
        return Answer(reason, False, 0, told)


class _Quiet(logging.Filter):
    """Keeps the exporters' own words off the log where they speak on our thread: we say each state once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.current_thread().name != THREAD


_QUIET: Final = _Quiet()


@dataclass(frozen=True, slots=True)
class Target:
    """Where one signal goes, and how."""

    signal: str
    """"traces" or "metrics"."""
    protocol: str
    endpoint: str | None
    """None: as OTEL_* variables say."""

    @property
    def shown(self) -> str:
        """The endpoint, without what may be secret."""
        port = PORTS[self.protocol]
        url = urlsplit(self.endpoint or setting("ENDPOINT", self.signal) or f"http://localhost:{port}")
        return f"otlp://{url.netloc.rpartition('@')[2] or url.path}"


def unwanted(environment: Mapping[str, str]) -> frozenset[str]:
    """Return the signals that OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER and OTEL_LOGS_EXPORTER set to `none`."""
    told = {signal: environment.get(exporter_variable(signal), "").strip() for signal in SIGNALS}
    return frozenset(signal for signal, exporter in told.items() if exporter.lower() == "none")


def exporter_variable(signal: str) -> str:
    """Return the variable that names the exporter of a signal."""
    return f"OTEL_{signal.upper()}_EXPORTER"


def setting(name: str, signal: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a setting of a signal: its own variable, else the one of all signals, else ""."""
    own = environment.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", "").strip()
    return own or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()


def target_of(signal: str, place: str, environment: Mapping[str, str] = os.environ) -> Target:
    """Return where a signal goes. place: what follows `otlp://`, "" for what OTEL_* variables say.

    Raises ValueError, one line, for a port that is none, a protocol or a compression there is no exporter for.
    """
    protocol = setting("PROTOCOL", signal, environment) or "grpc"
    if protocol not in PORTS:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; use one of {', '.join(PORTS)}")
    compression = setting("COMPRESSION", signal, environment).lower() or "none"
    if compression not in COMPRESSIONS[protocol]:
        known = ", ".join(COMPRESSIONS[protocol])
        raise ValueError(f"OTEL_EXPORTER_OTLP_COMPRESSION is {compression!r}; {protocol} has {known}")
    if not place:
        return Target(signal, protocol, None)
    host, _, path = place.partition("/")
    if ":" not in host.rpartition("]")[2]:
        host = f"{host}:{PORTS[protocol]}"
    port = host.rpartition(":")[2]
    if not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(f"destination otlp://{place}: {port!r} is no port; write one from 1 to 65535")
    is_open = setting("INSECURE", signal, environment).lower() != "false" and not setting(
        "CERTIFICATE", signal, environment
    )
    base = f"http{'' if is_open else 's'}://{host}"
    if protocol == "grpc":
        return Target(signal, protocol, base)
    return Target(signal, protocol, "/".join(part for part in (base, path.strip("/"), "v1", signal) if part))


def resource_of(source: Source, detected: Resource | None = None) -> Resource:
    """Return what this process is: our words, over which OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME go.

    detected: what `Resource.create` found earlier; by default what it finds now, with threads, which a process that is
    about to end cannot start.
    """
    ours: dict[str, Any] = {
        names.SERVICE_NAME: "insitu",
        names.SERVICE_VERSION: package_version(),
        names.SERVICE_INSTANCE: f"{source.epoch:016x}",
        names.HOST_NAME: source.host,
        names.PROCESS_PID: source.pid,
        names.DISTRO_NAME: "insitu",
        names.DISTRO_VERSION: package_version(),
        names.RUN: source.run,
        names.ROLE: str(source.role),
        names.BOOT: source.boot_id,
        names.REPLICA: source.replica,
    }
    if source.model is not None:
        ours[names.MODEL] = source.model
    if source.rank != NO_RANK:
        ours |= {
            names.WORLD_RANK: source.rank,
            names.PIPELINE_RANK: source.stage,
            names.TENSOR_RANK: source.tp_rank,
            names.DATA_RANK: source.dp_rank,
            names.EXPERT_RANK: source.ep_rank,
        }
    detected = Resource.create() if detected is None else detected
    return detected.merge(Resource(ours, names.SCHEMA_URL)).merge(OTELResourceDetector().detect())


def scope() -> InstrumentationScope:
    """Return who made the spans and metrics."""
    return InstrumentationScope(names.SCOPE, package_version())


class SpanEnd:
    """Sends spans. Used by one thread, which it holds for as long as the exporter tries."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._notes = _Notes()
        self._exporter: SpanExporter = _exporter(target, self._notes)
        _in_use.add(self._exporter)

    def send(self, spans: Sequence[ReadableSpan]) -> Answer:
        self._notes.clear()
        return self._notes.answer(self._exporter.export(spans).name == "SUCCESS")

    def close(self) -> None:
        """End what is being tried and hang up. Any thread."""
        self._exporter.shutdown()
        _in_use.discard(self._exporter)


class MetricEnd:
    """Sends metrics, as `SpanEnd` does spans."""

    def __init__(self, target: Target, resource: Resource) -> None:
        self.target = target
        self._notes = _Notes()
        self._resource = resource
        self._exporter: MetricExporter = _exporter(target, self._notes)
        _in_use.add(self._exporter)

    def send(self, metrics: Sequence[Metric]) -> Answer:
        of_scope = ScopeMetrics(scope(), metrics, "")
        data = MetricsData([ResourceMetrics(self._resource, [of_scope], self._resource.schema_url)])
        self._notes.clear()
        return self._notes.answer(self._exporter.export(data).name == "SUCCESS")

    def close(self) -> None:
        self._exporter.shutdown()
        _in_use.discard(self._exporter)


def _exporter(target: Target, notes: _Notes) -> Any:
    return (_grpc_exporter if target.protocol == "grpc" else _http_exporter)(target, notes)


def import_exporters(protocol: str) -> dict[str, Any]:
    """Return the SDK's exporter of each signal. Raises ModuleNotFoundError where the extra is not installed.

    Imports what those import at their first request, too: that would be while the model steps.
    """
    if protocol == "grpc":
        with suppress(ModuleNotFoundError):  # not public: a gRPC without it imports something else then
            import_module("grpc._channel")
        import_module("grpc.experimental")
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans

        return {"traces": GrpcSpans, "metrics": GrpcMetrics}
    import_module("netrc")
    import_module("requests")
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans

    return {"traces": HttpSpans, "metrics": HttpMetrics}


class _Heard:
    """A gRPC stub that notes what is answered."""

    def __init__(self, stub: Any, notes: _Notes) -> None:
        self._stub = stub
        self._notes = notes

    def Export(self, **call: Any) -> Any:
        try:
            reply = self._stub.Export(**call)
        except grpc.RpcError as error:
            status: Any = error
            self._notes.code, self._notes.text = status.code().name, status.details() or ""
            raise
        self._notes.take(reply)
        return reply


def _grpc_exporter(target: Target, notes: _Notes) -> Any:
    kind = import_exporters("grpc")[target.signal]
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").addFilter(_QUIET)

    class Heard(kind):  # type: ignore[misc, valid-type]
        # Not public. An SDK without it exports as well, and why it fails stays unknown: `collector_unreachable`.
        def _initialize_channel_and_stub(self) -> None:
            super()._initialize_channel_and_stub()
            made: Any = self
            made._client = _Heard(made._client, notes)

    # "none" is a value of the specification that this exporter does not know.
    is_plain = setting("COMPRESSION", target.signal).lower() == "none"
    return Heard(endpoint=target.endpoint, compression=grpc.Compression.NoCompression if is_plain else None)


def _http_exporter(target: Target, notes: _Notes) -> Any:
    import requests
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    kind = import_exporters("http/protobuf")[target.signal]
    for name in (kind.__module__, "opentelemetry.exporter.otlp.common.http"):
        logging.getLogger(name).addFilter(_QUIET)
    reply = ExportTraceServiceResponse if target.signal == "traces" else ExportMetricsServiceResponse

    def hear(response: Any, *_: Any, **__: Any) -> None:
        if not response.ok:
            notes.code, notes.text = response.status_code, response.reason
            return
        with suppress(DecodeError):  # taken all the same; it says nothing of refusals
            notes.take(reply.FromString(response.content))

    # A credential provider that OTEL_* variables name makes a session of its own.
    if any(name.endswith("CREDENTIAL_PROVIDER") for name in os.environ if name.startswith("OTEL_PYTHON_EXPORTER")):
        return kind(endpoint=target.endpoint)
    session = requests.Session()
    session.hooks["response"].append(hear)
    return kind(endpoint=target.endpoint, session=session)
