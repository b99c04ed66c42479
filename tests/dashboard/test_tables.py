"""Table twins: what a chart shows, in numbers."""

from __future__ import annotations

import json

import pytest

from insitu_dashboard import tables
from insitu_dashboard.notices import State
from insitu_dashboard.picture import NO_DATA, blank_picture, picture
from insitu_dashboard.run_view import RunView
from insitu_dashboard.span_document import live_document


@pytest.fixture
def pictured(view: RunView) -> tables.Picture:
    assert view.last_ns is not None
    text = json.dumps(picture(view, view.timeline.unix_ns(view.last_ns), 60, run="r", replica=0))
    found: tables.Picture = json.loads(text)
    return found


def test_the_twin_of_shares_has_the_charts_numbers(pictured: tables.Picture) -> None:
    found = tables.shares_table(pictured, part="grid").to_pylist()
    for row, cell in zip(found, pictured["grid"], strict=True):
        assert (row["stage"], row["rank"]) == (cell["stage"], cell["rank"])
        assert row["compute (%)"] == pytest.approx(100 * cell["classes"]["compute"], abs=0.051)


def test_the_twin_of_the_heat_map_has_every_cell_that_is_not_nothing(pictured: tables.Picture) -> None:
    heat = pictured["heat"]
    cells = [value for percent in heat["percent"].values() for row in percent for value in row]
    found = tables.heat_table(pictured)
    assert found.num_rows == sum(value not in (0, NO_DATA) for value in cells)
    assert f"share of {heat['bucket_s']} s (%)" in found.column_names


def test_the_twin_of_latency_has_a_row_a_bucket(pictured: tables.Picture) -> None:
    found = tables.latency_table(pictured)
    assert found.num_rows == len(pictured["latency"]["unix_s"])


def test_the_twin_of_alarms_says_when_and_what(pictured: tables.Picture) -> None:
    (row,) = tables.alarms_table(pictured).to_pylist()
    assert row["text"].startswith("stage 1 limits")
    assert row["detected (UTC)"].timestamp() == pytest.approx(int(pictured["alarms"][0]["detected"]) / 1e9, abs=1e-2)


def test_the_twin_of_the_timeline_has_the_newest_first(view: RunView) -> None:
    end = view.last_ns or 0
    document = live_document(view, view.intervals.between(end - 10**9, end), reset=True)
    found = tables.spans_table(document)
    assert found.num_rows == len(document["lane"]) > 50
    assert found["begin (UTC)"].to_pylist() == sorted(found["begin (UTC)"].to_pylist(), reverse=True)
    assert set(found["class"].to_pylist()) <= {
        "compute",
        "host",
        "waits upstream",
        "waits downstream",
        "transfer",
        "no demand",
    }


def test_twins_of_nothing_are_empty() -> None:
    nothing = blank_picture(State.EMPTY)
    for found in (
        tables.heat_table(nothing),
        tables.latency_table(nothing),
        tables.alarms_table(nothing),
        tables.shares_table(nothing, part="mix"),
    ):
        assert found.num_rows == 0
