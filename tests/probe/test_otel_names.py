"""Names of OpenTelemetry are in one place, each once, and `docs/otel.md` has them all."""

from __future__ import annotations

import re
from pathlib import Path

from insitu.exporters.otlp import names
from insitu.statistics.parts import finalise
from insitu.vocabulary import IntervalClass

PAGE = (Path(__file__).parents[2] / "docs/otel.md").read_text()


def test_the_page_has_every_metric_with_its_form_unit_and_attributes() -> None:
    rows = dict(re.findall(r"^\| `((?:insitu|gen_ai)\.[\w.]+)` \| (.*) \|$", PAGE, re.MULTILINE))
    for metric in names.METRICS:
        if metric not in names.STATISTICS.values():
            form, unit, attributes, _ = rows[metric.name].split(" | ")
            assert (form, unit) == (metric.form, f"`{metric.unit}`"), metric.name
            assert re.findall(r"`([\w.]+)`", attributes) == list(metric.attributes), metric.name
    for figure, metric in names.STATISTICS.items():
        assert f"`{figure}`" in PAGE, figure
        assert metric.name == f"insitu.statistics.{figure}"


def test_every_name_is_given_once() -> None:
    told = [metric.name for metric in names.METRICS]
    assert len(told) == len(set(told))
    attributes = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    for attribute in attributes - {names.SCHEMA_URL, names.SCOPE}:
        assert f"`{attribute}`" in PAGE, attribute


def test_no_data_point_names_a_request() -> None:
    for metric in names.METRICS:
        assert not {names.REQUESTS, names.STEP} & set(metric.attributes), metric.name


def test_the_page_has_every_class_of_intervals() -> None:
    for cls in IntervalClass:
        assert names.span_name(cls.name.lower()) in PAGE or f"`{cls.name.lower()}`" in PAGE, cls


def test_what_is_a_gauge_of_statistics_is_a_figure_of_them() -> None:
    assert finalise.__doc__ is not None
    statistics = (Path(__file__).parents[2] / "docs/probe.md").read_text()
    for figure in names.STATISTICS:
        assert f"`{figure}`" in statistics, figure
