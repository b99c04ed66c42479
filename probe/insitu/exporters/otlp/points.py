"""Numbers that add up until they are exported, and then are OpenTelemetry's data points.

They come already added up over many steps, with their own times, so they become points as they are. The SDK's
instruments would stamp them anew, repeat a gauge that got no news, and cost a call a step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

from insitu.exporters.otlp.names import METRICS, Form, MetricName
from insitu.statistics.layout import FIRST_OCTAVE, NUM_OCTAVES

Attributes = tuple[tuple[str, str | int], ...]
Series = tuple[MetricName, Attributes]
Number = int | float
Counts = NDArray[np.int64]

SCALE: Final = 0
"""Bucket i of an exponential histogram of this scale holds 2^i < x <= 2^(i+1): an octave of `statistics`."""


@dataclass(slots=True)
class _Buckets:
    """Measurements in the buckets of their metric."""

    counts: Counts
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")


class Points:
    """Counters and histograms since the beginning, gauges since the last export."""

    def __init__(self, began_unix_ns: int, *, delta: bool) -> None:
        """delta: counters and histograms are exported as what came since the last time, not since the beginning."""
        self._delta = delta
        self._since_ns = began_unix_ns
        self._totals: defaultdict[Series, Number] = defaultdict(int)
        self._told: defaultdict[Series, Number] = defaultdict(int)
        self._octaves: dict[Series, Counts] = {}
        """NUM_OCTAVES counts, then that of zeros."""
        self._told_octaves: dict[Series, Counts] = {}
        self._measured: dict[Series, _Buckets] = {}
        self._gauges: dict[Series, float] = {}
        self._exemplars: dict[Series, Exemplar] = {}

    def add(self, metric: MetricName, attributes: Attributes, amount: Number, exemplar: Exemplar | None = None) -> None:
        """Count more; an amount of 0 begins a series at 0."""
        self._totals[metric, attributes] += amount
        self._point_to((metric, attributes), exemplar)

    def reach(self, metric: MetricName, attributes: Attributes, total: Number) -> None:
        """Set a counter whose total is known elsewhere."""
        self._totals[metric, attributes] = total

    def put(self, metric: MetricName, attributes: Attributes, value: float, exemplar: Exemplar | None = None) -> None:
        """Set a gauge: the latest value is told."""
        self._gauges[metric, attributes] = value
        self._point_to((metric, attributes), exemplar)

    def is_larger(self, metric: MetricName, attributes: Attributes, value: float) -> bool:
        """Tell whether a gauge of largest values has seen none as large since the last export."""
        return value > self._gauges.get((metric, attributes), float("-inf"))

    def spread(self, metric: MetricName, attributes: Attributes, octaves: Counts, num_zero: int) -> None:
        """Count more magnitudes: int64[NUM_OCTAVES], and how many were 0."""
        added = np.append(octaves, num_zero)
        before = self._octaves.get((metric, attributes))
        self._octaves[metric, attributes] = added if before is None else before + added

    def measure(self, metric: MetricName, attributes: Attributes, value: float, exemplar: Exemplar | None) -> None:
        """Count one measurement into the metric's buckets."""
        series = (metric, attributes)
        found = self._measured.get(series)
        if found is None:
            found = self._measured[series] = _Buckets(np.zeros(len(metric.bounds) + 1, np.int64))
        found.counts[bisect_left(metric.bounds, value)] += 1  # a bound belongs to the bucket below it
        found.total += value
        found.low, found.high = min(found.low, value), max(found.high, value)
        self._point_to(series, exemplar)

    def _point_to(self, series: Series, exemplar: Exemplar | None) -> None:
        if exemplar is not None:
            self._exemplars[series] = exemplar

    def take(self, unix_ns: int) -> list[Metric]:
        """Return the points of now, one metric a name, and forget the gauges."""
        points: defaultdict[MetricName, list[NumberDataPoint]] = defaultdict(list)
        spreads: defaultdict[MetricName, list[ExponentialHistogramDataPoint]] = defaultdict(list)
        measured: defaultdict[MetricName, list[HistogramDataPoint]] = defaultdict(list)
        for (metric, attributes), total in self._totals.items():
            points[metric].append(self._sum((metric, attributes), total, unix_ns))
        for (metric, attributes), value in self._gauges.items():
            exemplars = self._of((metric, attributes))
            points[metric].append(NumberDataPoint(dict(attributes), 0, unix_ns, value, exemplars))
        for (metric, attributes), counts in self._octaves.items():
            spreads[metric].append(self._histogram((metric, attributes), counts, unix_ns))
        for (metric, attributes), buckets in self._measured.items():
            measured[metric].append(self._bucketed((metric, attributes), buckets, unix_ns))
        self._gauges.clear()
        self._exemplars.clear()
        if self._delta:
            self._measured.clear()
            self._since_ns = unix_ns
        found = [self._metric(name, points[name], spreads[name], measured[name]) for name in METRICS]
        return [metric for metric in found if metric.data.data_points]

    def _bucketed(self, series: Series, buckets: _Buckets, unix_ns: int) -> HistogramDataPoint:
        return HistogramDataPoint(
            attributes=dict(series[1]),
            start_time_unix_nano=self._since_ns,
            time_unix_nano=unix_ns,
            count=int(buckets.counts.sum()),
            sum=buckets.total,
            bucket_counts=buckets.counts.tolist(),
            explicit_bounds=series[0].bounds,
            min=buckets.low,
            max=buckets.high,
            exemplars=self._of(series),
        )

    def _of(self, series: Series) -> list[Exemplar]:
        exemplar = self._exemplars.get(series)
        return [] if exemplar is None else [exemplar]

    def _sum(self, series: Series, total: Number, unix_ns: int) -> NumberDataPoint:
        value = total
        if self._delta:
            value, self._told[series] = total - self._told[series], total
        return NumberDataPoint(dict(series[1]), self._since_ns, unix_ns, value, self._of(series))

    def _histogram(self, series: Series, counts: Counts, unix_ns: int) -> ExponentialHistogramDataPoint:
        if self._delta:
            before = self._told_octaves.get(series, np.zeros_like(counts))
            self._told_octaves[series] = counts
            counts = counts - before
        unknown: float = None  # type: ignore[assignment]  # optional in the protocol, and nobody can tell it
        return ExponentialHistogramDataPoint(
            attributes=dict(series[1]),
            start_time_unix_nano=self._since_ns,
            time_unix_nano=unix_ns,
            count=int(counts.sum()),
            sum=unknown,
            scale=SCALE,
            zero_count=int(counts[NUM_OCTAVES]),
            positive=Buckets(FIRST_OCTAVE, counts[:NUM_OCTAVES].tolist()),
            negative=Buckets(0, []),
            flags=0,
            min=unknown,
            max=unknown,
        )

    def _metric(
        self,
        name: MetricName,
        points: list[NumberDataPoint],
        spreads: list[ExponentialHistogramDataPoint],
        measured: list[HistogramDataPoint],
    ) -> Metric:
        temporality = AggregationTemporality.DELTA if self._delta else AggregationTemporality.CUMULATIVE
        data: Sum | Gauge | Histogram | ExponentialHistogram
        if name.form is Form.COUNTER:
            data = Sum(points, temporality, is_monotonic=True)
        elif name.form is Form.GAUGE:
            data = Gauge(points)
        elif name.bounds:
            data = Histogram(measured, temporality)
        else:
            data = ExponentialHistogram(spreads, temporality)
        return Metric(name.name, name.text, name.unit, data)
