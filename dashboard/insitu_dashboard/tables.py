"""The same as the charts, in numbers: a table twin for each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.palette import LABELS

MOST_ROWS: Final = 5_000

Picture = Mapping[str, Any]


def shares_table(picture: Picture, *, part: str) -> pa.Table:
    """Return the shares of `grid` (a row a rank, last seconds) or `mix` (a row a stage, the window), in percent."""
    rows = []
    for cell in picture[part]:
        place = {"stage": cell["stage"]} | ({"rank": cell["rank"]} if "rank" in cell else {})
        shown = {f"{label} (%)": 100 * cell["classes"].get(str(cls), 0.0) for cls, label in LABELS.items()}
        rows.append(place | {name: round(value, 1) for name, value in shown.items()})
    table = pa.Table.from_pylist(rows)
    return table.select([name for name in table.column_names if _is_used(table, name)])


def _is_used(table: pa.Table, name: str) -> bool:
    return "(%)" not in name or any(table[name].to_pylist())


def latency_table(picture: Picture) -> pa.Table:
    """Return the latency chart: a row a bucket, times in milliseconds."""
    latency = picture["latency"]
    columns: dict[str, Any] = {"time (UTC)": _times(latency["unix_s"])}
    for name, label in _LATENCIES.items():
        columns[label] = pa.array(
            [None if v is None else round(1e3 * v, 3) for v in latency.get(name, [])], pa.float64()
        )
    columns["tokens"] = pa.array(latency.get("tokens_per_s", []), pa.int64())
    return pa.table(columns)


_LATENCIES: Final = {
    "ttft_p50_s": "first token p50 (ms)",
    "ttft_p95_s": "first token p95 (ms)",
    "itl_p50_s": "between tokens p50 (ms)",
    "itl_p99_s": "between tokens p99 (ms)",
}


def alarms_table(picture: Picture) -> pa.Table:
    """Return the alarms, newest first."""
    names = ("kind", "state", "stage", "rank", "layer", "site", "step", "num_requests", "confidence", "text", "remedy")
    kinds = {name: pa.int64() for name in ("stage", "rank", "layer", "step", "num_requests")} | {
        "confidence": pa.float64()
    }
    alarms = picture["alarms"]
    found = {"detected (UTC)": _times([int(alarm["detected"]) / 1e9 for alarm in alarms])}
    columns = {name: pa.array([alarm[name] for alarm in alarms], kinds.get(name, pa.utf8())) for name in names}
    return pa.table(found | columns)


def heat_table(picture: Picture) -> pa.Table:
    """Return the heat map: a row a (bucket, rank, class) that took time, in percent of the bucket; newest first."""
    heat = picture["heat"]
    labels = {str(cls): LABELS[cls] for cls in LedgerClass}
    rows = [
        (begin, lane["stage"], lane["rank"], labels[cls], percent[row][column])
        for column, begin in reversed(list(enumerate(heat["unix_s"])))
        for row, lane in enumerate(heat["lanes"])
        for cls, percent in heat["percent"].items()
        if percent[row][column] > 0
    ][:MOST_ROWS]
    times, stages, ranks, classes, shares = zip(*rows, strict=True) if rows else ([], [], [], [], [])
    return pa.table(
        {
            "time (UTC)": _times(list(times)),
            "stage": pa.array(stages, pa.int64()),
            "rank": pa.array(ranks, pa.int64()),
            "class": pa.array(classes, pa.utf8()),
            f"share of {heat['bucket_s']} s (%)": pa.array(shares, pa.int64()),
        }
    )


def spans_table(spans: Mapping[str, Any]) -> pa.Table:
    """Return the timeline: a row a span, newest first. A span that stands for several says how many."""
    base_s = int(spans["base"]) / 1e9
    places = range(len(spans["lane"]))[::-1][:MOST_ROWS]
    lanes, classes = spans["lanes"], spans["classes"]
    return pa.table(
        {
            "begin (UTC)": _times([base_s + spans["t0_us"][at] / 1e6 for at in places]),
            "stage": pa.array([lanes[spans["lane"][at]]["stage"] for at in places], pa.int64()),
            "rank": pa.array([lanes[spans["lane"][at]]["rank"] for at in places], pa.int64()),
            "class": pa.array([LABELS[LedgerClass(classes[spans["cls"][at]])] for at in places], pa.utf8()),
            "duration (ms)": pa.array([round(spans["us"][at] / 1e3, 4) for at in places], pa.float64()),
            "step": pa.array([_known(spans["step"][at]) for at in places], pa.int64()),
            "micro-batch": pa.array([_known(spans["mb"][at]) for at in places], pa.int64()),
            "intervals": pa.array([spans["merged"][at] for at in places], pa.int64()),
        }
    )


def _known(number: int) -> int | None:
    return None if number < 0 else number


def _times(unix_s: list[float]) -> pa.Array:
    return pa.array([round(1e3 * t) for t in unix_s], pa.int64()).cast(pa.timestamp("ms"))
