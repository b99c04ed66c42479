"""Points add up: deltas to what is cumulative, octaves to counts; a gauge is forgotten once it was told."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource

from insitu.exporters.otlp import names
from insitu.exporters.otlp.ends import scope
from insitu.exporters.otlp.points import Points

A, B = (("insitu.site", "a"),), (("insitu.site", "b"),)
amounts = st.lists(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 1000)), max_size=4), max_size=6)


def told(points: Points, unix_ns: int) -> dict[str, list[Any]]:
    return {metric.name: list(metric.data.data_points) for metric in points.take(unix_ns)}


@given(amounts)
def test_deltas_add_up_to_what_is_cumulative(windows: list[list[tuple[Any, int]]]) -> None:
    delta, cumulative = Points(0, delta=True), Points(0, delta=False)
    sums: dict[Any, int] = {}
    since = 0
    for number, window in enumerate(windows, 1):
        for points in (delta, cumulative):
            for attributes, amount in window:
                points.add(names.SITE_STEPS, attributes, amount)
                points.spread(names.MAGNITUDE, attributes, np.full(32, amount, np.int64), amount)
        parts, whole = told(delta, number * 10), told(cumulative, number * 10)
        for part in parts.get("insitu.site.steps", []):
            key = tuple(part.attributes.items())
            sums[key] = sums.get(key, 0) + part.value
            assert (part.start_time_unix_nano, part.time_unix_nano) == (since, number * 10)
        since = number * 10
        found = {tuple(point.attributes.items()): point for point in whole.get("insitu.site.steps", [])}
        assert {key: point.value for key, point in found.items()} == sums
        assert all(point.start_time_unix_nano == 0 for point in found.values())
        spreads = {tuple(p.attributes.items()): p.count for p in whole.get("insitu.statistics.magnitude", [])}
        assert spreads == {key: 33 * total for key, total in sums.items()}


def test_a_gauge_is_told_once() -> None:
    points = Points(0, delta=False)
    points.put(names.SITE_ABSMAX, A, 3.0)
    assert not points.is_larger(names.SITE_ABSMAX, A, 3.0)
    assert points.is_larger(names.SITE_ABSMAX, A, 3.5)
    (point,) = told(points, 5)["insitu.site.absmax"]
    assert (point.value, point.time_unix_nano) == (3.0, 5)
    assert told(points, 6) == {}
    assert points.is_larger(names.SITE_ABSMAX, A, 0.0)


def test_a_total_that_is_known_elsewhere_is_reached() -> None:
    points = Points(0, delta=True)
    points.reach(names.PRODUCED, A, 5)
    assert [point.value for point in told(points, 1)["insitu.records.produced"]] == [5]
    points.reach(names.PRODUCED, A, 12)
    assert [point.value for point in told(points, 2)["insitu.records.produced"]] == [7]


@pytest.mark.parametrize("delta", [False, True])
def test_every_form_can_be_encoded(delta: bool) -> None:
    points = Points(0, delta=delta)
    for metric in names.METRICS:
        if metric.form is names.Form.COUNTER:
            points.add(metric, A, 1)
        elif metric.form is names.Form.GAUGE:
            points.put(metric, A, float("nan"))
        elif metric.bounds:
            points.measure(metric, A, 0.3, None)
        else:
            points.spread(metric, A, np.zeros(32, np.int64), 4)
    resource = Resource({"service.name": "insitu"})
    data = MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope(), points.take(9), "")], "")])
    (encoded,) = encode_metrics(data).resource_metrics[0].scope_metrics
    assert [metric.name for metric in encoded.metrics] == [metric.name for metric in names.METRICS]
    assert [metric.unit for metric in encoded.metrics] == [metric.unit for metric in names.METRICS]
    kinds = {names.Form.COUNTER: "sum", names.Form.GAUGE: "gauge", names.Form.HISTOGRAM: "exponential_histogram"}
    expected = ["histogram" if metric.bounds else kinds[metric.form] for metric in names.METRICS]
    assert [metric.WhichOneof("data") for metric in encoded.metrics] == expected


@given(st.lists(st.floats(0, 20), min_size=1), st.booleans())
def test_a_measurement_is_in_the_first_bucket_whose_bound_it_does_not_exceed(seconds: list[float], delta: bool) -> None:
    points = Points(0, delta=delta)
    bounds = names.FIRST_TOKEN.bounds
    for value in seconds:
        points.measure(names.FIRST_TOKEN, A, value, None)
    (point,) = told(points, 5)["gen_ai.server.time_to_first_token"]
    edges = [float("-inf"), *bounds, float("inf")]
    assert point.bucket_counts == [sum(a < s <= b for s in seconds) for a, b in itertools.pairwise(edges)]
    assert (point.count, point.sum) == (len(seconds), pytest.approx(sum(seconds)))
    assert (point.min, point.max) == (min(seconds), max(seconds))
    again = told(points, 6).get("gen_ai.server.time_to_first_token", [])
    assert [p.count for p in again] == ([] if delta else [len(seconds)])
