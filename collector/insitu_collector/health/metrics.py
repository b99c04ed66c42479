"""A report as Prometheus metrics (docs/collector.md, "Health")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from insitu_collector.health.health import Report
from insitu_collector.health.histogram import Distribution
from insitu_collector.health.readiness import Trouble

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "insitu_collector_"


class HealthMetrics:
    """What prometheus-client asks at each scrape."""

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        yield from metrics_of(self._report())

    def describe(self) -> list[Metric]:
        """Return nothing: names are known without asking a disk."""
        return []


def metrics_of(report: Report) -> Iterator[Metric]:
    """Return a report as metric families."""
    yield from _state(report)
    yield from _traffic(report)
    yield from _losses(report)
    yield from _store(report)


def _state(report: Report) -> Iterator[Metric]:
    trouble = report.state.trouble
    yield _gauge("ready", "Whether it can store durably.", {(): float(trouble is None)})
    states = {(str(each),): float(each is trouble) for each in Trouble}
    yield _gauge("trouble", "Why it is not ready: 1 for the one reason.", states, ("reason",))
    yield _gauge("up_seconds", "Time since it started.", {(): report.up_s})
    yield _gauge("connections", "Streams of probes that are connected.", {(): report.load.num_streams})
    yield _gauge("in_flight_bytes", "Received, and not yet written.", {(): report.load.in_flight_bytes})
    yield _gauge(
        "window_bytes", "What a stream without a quota may have unacknowledged.", {(): report.load.window_bytes}
    )
    yield _gauge("memory_tight", "Whether frames are received one at a time.", {(): float(report.load.is_tight)})


def _traffic(report: Report) -> Iterator[Metric]:
    taken = report.totals.taken
    for field, text in (("frames", "Frames stored."), ("rows", "Rows stored."), ("bytes", "Bytes of frames stored.")):
        values = {key: getattr(each, field) for key, each in taken.items()}
        yield _counter(field, text, values, ("tenant", "table"))
    yield _counter("repeated_frames", "Frames that had been stored before.", {(): report.totals.num_repeated})
    yield _histogram("commit_seconds", "Time of a commit with anything in it.", report.totals.commits)
    text = "Time from a batch's newest row to durable, of processes on this host."
    yield _histogram("capture_to_durable_seconds", text, report.totals.latency)


def _losses(report: Report) -> Iterator[Metric]:
    refused = report.totals.refused
    labels = ("reason", "defect")
    yield _counter("refused_frames", "Frames refused.", {key: each.frames for key, each in refused.items()}, labels)
    yield _counter("refused_rows", "Rows in them.", {key: each.rows for key, each in refused.items()}, labels)
    yield _counter("ended_streams", "Streams ended, or not let in.", _by(report.totals.hung_up), ("reason",))
    yield _gauge("dropped_rows", "Rows that probes say they dropped.", _by(report.totals.dropped), ("reason",))
    yield _counter("gap_rows", "Rows of which the table `gaps` tells.", _by(report.totals.gaps), ("reason",))
    yield _counter(
        "sync_failures", "Commits in which a file could not be synced.", {(): report.totals.num_sync_failures}
    )


def _store(report: Report) -> Iterator[Metric]:
    segments = {("open",): report.num_open, ("sealed",): report.num_sealed}
    yield _gauge("segments", "Files of the store.", segments, ("state",))
    if report.free_bytes is not None:
        yield _gauge("disk_free_bytes", "Free where the store lies.", {(): report.free_bytes})
    if report.keep.max_bytes is not None:
        yield _gauge("keep_bytes", "Most of what is received that is kept.", {(): report.keep.max_bytes})
    if report.keep.max_age_s is not None:
        yield _gauge("keep_seconds", "How long it is kept.", {(): report.keep.max_age_s})


def _by(counts: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(reason,): count for reason, count in counts.items()}


def _counter(name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), values)


def _gauge(name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), values)


def _filled(family: Any, values: Mapping[Any, float]) -> Metric:
    for place, value in sorted(values.items()):
        family.add_metric(place, value)
    return family  # type: ignore[no-any-return]


def _histogram(name: str, text: str, found: Distribution) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric([], found.cumulative(), found.total)
    return family
