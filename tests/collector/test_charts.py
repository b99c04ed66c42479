"""Static charts: few marks, the palette's colours, and data that is what the records say."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import vl_convert

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.classes import PLACE
from insitu_collector.ledger.palette import LOOKS
from insitu_collector.ledger.window import Ledger, LedgerRow
from insitu_collector.requests.latency import Samples
from insitu_collector.views.charts import MOST_BUCKETS, MOST_MARKS, latency_lines, ledger_bars, timeline_chart
from insitu_collector.views.spans import Spans

MS = 1_000_000
COMPUTE, GC, HOST = (PLACE[cls] for cls in (LedgerClass.COMPUTE, LedgerClass.GC, LedgerClass.HOST))


def spans(rows: list[tuple[int, int, int, int, int]]) -> Spans:
    """lane, t0, t1, place of class, step"""
    lane, t0, t1, cls, step = np.array(rows, np.int64).reshape(-1, 5).T
    return Spans(lane, t0, t1, cls, step, np.zeros_like(lane), lane - 1, np.ones_like(lane))


def marks_of(chart: Any) -> list[list[dict[str, Any]]]:
    """Return the rows of each layer, of all panels."""
    spec = chart.to_dict()
    panels = spec.get("vconcat", [spec])
    assert vl_convert.vegalite_to_svg(spec).startswith("<svg"), "it can be drawn"
    layers = [layer.get("data", panel.get("data")) for panel in panels for layer in panel["layer"]]
    return [spec["datasets"][data["name"]] if "name" in data else data["values"] for data in layers]


def colours_of(chart: Any) -> dict[str, str]:
    scale = chart.to_dict()["layer"][0]["encoding"]["color"]["scale"]
    return dict(zip(scale["domain"], scale["range"], strict=True))


def test_a_timeline_has_a_bar_an_interval_in_the_lane_of_its_rank() -> None:
    rows = [(0, 0, 4 * MS, COMPUTE, 7), (0, 4 * MS, 5 * MS, GC, 7), (1, 5 * MS, 9 * MS, COMPUTE, 7)]
    chart = timeline_chart(spans(rows), {0: 0, 1: 1}, (0, 10 * MS), 0, ("head", "rest"), None)
    bars, *letters = marks_of(chart)
    assert [(bar["rank"], bar["class"], bar["t0"], bar["t1"]) for bar in bars] == [
        ("stage 0, rank 0", "C  compute", 0.0, 4.0),
        ("stage 0, rank 0", "G  gc", 4.0, 5.0),
        ("stage 1, rank 1", "C  compute", 5.0, 9.0),
    ]
    assert sorted(mark["letter"] for layer in letters for mark in layer) == ["C", "C", "G"]
    assert colours_of(chart) == {"C  compute": LOOKS[LedgerClass.COMPUTE].colour, "G  gc": LOOKS[LedgerClass.GC].colour}
    assert chart.to_dict()["title"]["text"] == "head"
    assert chart.to_dict()["title"]["subtitle"] == ["rest"]


def test_bars_are_cut_at_the_window_and_other_steps_are_faded() -> None:
    rows = [(0, -5 * MS, 5 * MS, COMPUTE, 6), (0, 5 * MS, 25 * MS, HOST, 7)]
    bars, *letters = marks_of(timeline_chart(spans(rows), {0: 0}, (0, 20 * MS), 0, ("", ""), 7))
    assert [(bar["t0"], bar["t1"], bar["opacity"] < 1) for bar in bars] == [(0.0, 5.0, True), (5.0, 20.0, False)]
    assert [bar["duration"] for bar in bars] == ["10.00 ms", "20.00 ms"]
    assert [mark["letter"] for layer in letters for mark in layer] == ["H"]


@pytest.mark.parametrize("num_spans", [100, 50_000])
def test_a_timeline_has_few_marks_however_many_spans(num_spans: int) -> None:
    rows = [(n % 4, n * MS, (n + 4) * MS, COMPUTE if n % 3 else HOST, n) for n in range(num_spans)]
    chart = timeline_chart(spans(rows), dict.fromkeys(range(4), 0), (0, num_spans * MS), 0, ("", ""), None)
    layers = marks_of(chart)
    assert sum(map(len, layers)) <= MOST_MARKS
    assert len(layers[0]) == 100 or len(layers[0]) > 200


def test_parts_of_a_ledger_lie_side_by_side_and_fill_the_window() -> None:
    rows = (
        LedgerRow(0, 0, LedgerClass.COMPUTE, 30),
        LedgerRow(0, 0, LedgerClass.WAIT_DOWNSTREAM, 50, 1),
        LedgerRow(0, 0, LedgerClass.WAIT_DOWNSTREAM, 20, 2),
        LedgerRow(1, 1, LedgerClass.COMPUTE, 99),
        LedgerRow(1, 1, LedgerClass.GC, 1),
    )
    parts, *letters = marks_of(ledger_bars(Ledger(0, 100, rows, {0: 0, 1: 0}), ("", "")))
    by_rank = defaultdict(list)
    for part in parts:
        by_rank[part["rank"]].append((part["class"], part["t0"], part["t1"]))
    assert dict(by_rank) == {
        "stage 0, rank 0": [("C  compute", 0.0, 30.0), ("D  waits downstream", 30.0, 100.0)],
        "stage 1, rank 1": [("C  compute", 0.0, 99.0), ("G  gc", 99.0, 100.0)],
    }
    assert sorted(mark["letter"] for layer in letters for mark in layer) == ["C 30 %", "C 99 %", "D 70 %"]


def samples(times_s: list[float], seconds: list[float]) -> Samples:
    return Samples((np.array(times_s) * 1e9).astype(np.int64), np.array(seconds))


def test_latencies_are_percentiles_of_each_bucket_and_a_hole_where_there_are_none() -> None:
    first = samples([0.1, 0.2, 2.5], [0.010, 0.030, 0.5])
    chart = latency_lines({"first": first, "between": samples([], [])}, 0, 0, [], ("", ""))
    *_, lines, _, _, none = marks_of(chart)
    assert [(row["t"], row["line"], row["value"]) for row in lines] == [
        (0.5, "p50", pytest.approx(20)),
        (1.5, "p50", None),
        (2.5, "p50", pytest.approx(500)),
        (0.5, "p95", pytest.approx(29)),
        (1.5, "p95", None),
        (2.5, "p95", pytest.approx(500)),
    ]
    assert none == []


def test_a_long_run_has_wider_buckets_and_few_marks() -> None:
    times = np.arange(0, 5_000, 0.5).tolist()
    chart = latency_lines(dict.fromkeys(("first", "between"), samples(times, times)), 0, 0, [], ("", ""))
    layers = marks_of(chart)
    assert 2 * MOST_BUCKETS / 2 < max(map(len, layers)) <= 2 * MOST_BUCKETS
    assert sum(map(len, layers)) <= MOST_MARKS
