"""Every name that insitu gives to OpenTelemetry: of resources, spans, metrics and attributes. Plain Python.

No convention of OpenTelemetry speaks of ranks, stages or steps (semconv 1.44): those names are ours, and this is the
one place to change when it does. docs/otel.md has them with units and meaning; a test compares the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SCOPE: Final = "insitu"
"""Of every span and metric; its version is insitu's."""
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""Of the names that are OpenTelemetry's own (`service.*`, `host.*`, `process.*`)."""

SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"
SERVICE_INSTANCE: Final = "service.instance.id"
HOST_NAME: Final = "host.name"
PROCESS_PID: Final = "process.pid"
DISTRO_NAME: Final = "telemetry.distro.name"
DISTRO_VERSION: Final = "telemetry.distro.version"
MODEL: Final = "gen_ai.request.model"
OPERATION: Final = "gen_ai.operation.name"
COMPLETION: Final = "text_completion"
"""The operation of all requests that `session.request(...)` tells of."""
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_ID: Final = "gen_ai.request.id"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
ERROR: Final = "error.type"
OTHER_ERROR: Final = "_OTHER"
"""What the conventions call an error whose kind is not told."""
RUN: Final = "insitu.run"
ROLE: Final = "insitu.role"
BOOT: Final = "insitu.boot_id"
REPLICA: Final = "insitu.replica"
WORLD_RANK: Final = "dist.world.rank"
PIPELINE_RANK: Final = "dist.pp.rank"
TENSOR_RANK: Final = "dist.tp.rank"
DATA_RANK: Final = "dist.dp.rank"
EXPERT_RANK: Final = "dist.ep.rank"

RANK: Final = "insitu.rank"
STAGE: Final = "insitu.stage"
STEP: Final = "insitu.step"
MICROBATCH: Final = "insitu.mb"
PHASE: Final = "insitu.phase"
SITE: Final = "insitu.site"
LAYER: Final = "insitu.layer"
CLASS: Final = "insitu.class"
PEER: Final = "insitu.peer"
NUM_BYTES: Final = "insitu.bytes"
CPU_TIME: Final = "insitu.cpu_ns"
NUM_TRACES: Final = "insitu.num_traces"
TABLE: Final = "insitu.table"
REASON: Final = "insitu.reason"
VARIANT: Final = "insitu.variant"
KIND: Final = "insitu.kind"
TAKE: Final = "insitu.take"
EVERY: Final = "insitu.every"

INCIDENT_NAME: Final = "insitu.incident"
"""Event name of the log record of an incident; what follows are its attributes (docs/alerts.md)."""
VERDICT_NAME: Final = "insitu.verdict"
FLIGHT_NAME: Final = "insitu.flight"
EVENT_NAME: Final = "insitu.event"
"""Event names of log records of rows of `verdicts`, `incidents` and `events`, which a store sends (docs/otel.md)."""
INCIDENT: Final = "insitu.incident"
ALERT: Final = "insitu.alert"
STATE: Final = "insitu.state"
CONFIDENCE: Final = "insitu.confidence"
REMEDY: Final = "insitu.remedy"
VERDICT: Final = "insitu.verdict"
REVISION: Final = "insitu.revision"
NUM_REQUESTS: Final = "insitu.num_requests"
REQUESTS: Final = "insitu.requests"


def span_name(cls: str) -> str:
    """Return the name of an interval's span, by its class (`insitu.vocabulary.IntervalClass`)."""
    return f"insitu.{cls}"


def event_name(event: str) -> str:
    """Return the name of an event of a request's span, by its `insitu.vocabulary.RequestEvent`."""
    return f"insitu.request.{event}"


def request_span_name(model: str | None) -> str:
    """Return the name of a request's span, as the conventions have it: the operation, and the model if it is known."""
    return f"{COMPLETION} {model}" if model else COMPLETION


class Form(StrEnum):
    """What kind of metric it is."""

    COUNTER = "counter"
    """A monotonic sum: cumulative, or delta where OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE says so."""
    GAUGE = "gauge"
    """Of what came since the last export; nothing where nothing came."""
    HISTOGRAM = "histogram"
    """With the buckets of the metric; without any, exponential of scale 0: a bucket is an octave."""


@dataclass(frozen=True, slots=True)
class MetricName:
    """One metric."""

    name: str
    form: Form
    unit: str
    """UCUM; "1" has no dimension, braces annotate."""
    text: str
    attributes: tuple[str, ...]
    """Beside rank and stage, which every point has that is not of a request."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of its buckets but the last, which has none."""


_OF_SITE: Final = (SITE, LAYER)

INTERVAL_TIME: Final = MetricName(
    "insitu.interval.time", Form.COUNTER, "s", "self time of the step thread, by class", (CLASS,)
)
STEPS: Final = MetricName("insitu.steps", Form.COUNTER, "{step}", "steps", (PHASE, VARIANT))
STEP_ROWS: Final = MetricName("insitu.step.rows", Form.COUNTER, "{row}", "valid rows of steps", (PHASE, VARIANT))
PRODUCED: Final = MetricName("insitu.records.produced", Form.COUNTER, "{row}", "rows made, by table", (TABLE,))
DROPPED: Final = MetricName(
    "insitu.records.dropped", Form.COUNTER, "{row}", "rows made and not delivered, by table and reason", (TABLE, REASON)
)
PROBE_TIME: Final = MetricName(
    "insitu.probe.time",
    Form.COUNTER,
    "s",
    "CPU of the probe: `hook` on the step thread, `drain` and `otlp` beside it",
    (KIND,),
)
PERIOD: Final = MetricName(
    "insitu.sampling.period",
    Form.GAUGE,
    "{step}",
    "steps that the latest sampled one stands for, by what is taken and the `every` of its rules",
    (TAKE, EVERY),
)
SITE_STEPS: Final = MetricName(
    "insitu.site.steps", Form.COUNTER, "{step}", "steps with a summary of the site", _OF_SITE
)
SITE_ABSMAX: Final = MetricName(
    "insitu.site.absmax", Form.GAUGE, "1", "largest finite magnitude of a step's valid rows", _OF_SITE
)
SITE_CANARY: Final = MetricName(
    "insitu.site.canary", Form.GAUGE, "1", "sum of the latest step's valid rows, as it is: NaN, too", _OF_SITE
)
NONFINITE_STEPS: Final = MetricName(
    "insitu.site.nonfinite.steps", Form.COUNTER, "{step}", "steps with a value that is NaN or infinite", _OF_SITE
)
NONFINITE_ROWS: Final = MetricName(
    "insitu.site.nonfinite.rows", Form.COUNTER, "{row}", "rows with such a value, where rows are known", _OF_SITE
)
NONFINITE_VALUES: Final = MetricName(
    "insitu.statistics.nonfinite", Form.COUNTER, "{value}", "values of sampled steps, `nan` or `inf`", (*_OF_SITE, KIND)
)
MAGNITUDE: Final = MetricName(
    "insitu.statistics.magnitude",
    Form.HISTOGRAM,
    "1",
    "finite magnitudes of sampled steps by octave; the outermost buckets hold what lies outside, too",
    _OF_SITE,
)
FIGURES: Final = (
    ("absmax", "1"),
    ("mean", "1"),
    ("rms", "1"),
    ("std", "1"),
    ("skew", "1"),
    ("kurtosis", "1"),
    ("zero_share", "1"),
    ("near_zero_share", "1"),
    ("outlier_share", "1"),
    ("beyond_share", "1"),
    ("e4m3_over_share", "1"),
    ("e4m3_under_share", "1"),
    ("e5m2_over_share", "1"),
    ("e5m2_under_share", "1"),
    ("dynamic_range", "{octave}"),
    ("entropy", "{nat}"),
    ("top1", "1"),
    ("margin", "1"),
    ("topk_mass", "1"),
    ("logsumexp", "{nat}"),
    ("residual_ratio", "1"),
    ("residual_cosine", "1"),
)
"""Columns of `insitu.statistics.parts.finalise` that are gauges, with their units; formulas in docs/probe.md."""
STATISTICS: Final = {
    figure: MetricName(
        f"insitu.statistics.{figure}", Form.GAUGE, unit, f"`{figure}` of sampled steps (docs/probe.md)", _OF_SITE
    )
    for figure, unit in FIGURES
}
_OF_REQUEST: Final = (OPERATION, PROVIDER, MODEL, ERROR)
_SECONDS: Final = (*(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75), 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_TIME: Final = MetricName(
    "gen_ai.server.request.duration",
    Form.HISTOGRAM,
    "s",
    "from a request's arrival to its end",
    _OF_REQUEST,
    tuple(0.01 * 2**number for number in range(14)),
)
FIRST_TOKEN: Final = MetricName(
    "gen_ai.server.time_to_first_token",
    Form.HISTOGRAM,
    "s",
    "from its arrival to its first token",
    _OF_REQUEST,
    _SECONDS,
)
TOKEN_TIME: Final = MetricName(
    "gen_ai.server.time_per_output_token",
    Form.HISTOGRAM,
    "s",
    "from its first token to its end, by token after the first",
    _OF_REQUEST,
    _TOKEN_SECONDS,
)
METRICS: Final = (
    REQUEST_TIME,
    FIRST_TOKEN,
    TOKEN_TIME,
    INTERVAL_TIME,
    STEPS,
    STEP_ROWS,
    PRODUCED,
    DROPPED,
    PROBE_TIME,
    PERIOD,
    SITE_STEPS,
    SITE_ABSMAX,
    SITE_CANARY,
    NONFINITE_STEPS,
    NONFINITE_ROWS,
    NONFINITE_VALUES,
    MAGNITUDE,
    *STATISTICS.values(),
)
"""Every metric."""
