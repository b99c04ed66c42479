"""Spans as pages draw them: one JSON document of columns, times in microseconds since a base. Pure."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from insitu_collector.ledger.classes import PLACE, classify
from insitu_collector.views.spans import CLASSES, Spans, fitted, spans_of
from insitu_dashboard.run_view import OpenInterval, RunView

SCHEMA: Final = "insitu.spans/1"


def live_document(view: RunView, rows: pa.Table, *, reset: bool) -> dict[str, Any]:
    """Return intervals as they were recorded. `reset`: they replace what the page holds."""
    return _document(view, spans_of(rows, view.timeline, view.stages), reset=reset)


def window_document(view: RunView, t0_ns: int, t1_ns: int, pixels: int) -> dict[str, Any]:
    """Return the intervals that touch [t0_ns, t1_ns), at the detail that `pixels` columns can show."""
    spans = spans_of(view.intervals.between(t0_ns, t1_ns), view.timeline, view.stages)
    return _document(view, fitted(spans, t0_ns, t1_ns, pixels), reset=True)


def _document(view: RunView, spans: Spans, *, reset: bool) -> dict[str, Any]:
    base = view.intervals.base_ns or 0
    lanes = view.lanes
    return {
        "schema": SCHEMA,
        "base": str(view.timeline.unix_ns(base)),
        "reset": reset,
        "lanes": [{"stage": view.stages[rank], "rank": rank} for rank in lanes],
        "classes": [str(cls) for cls in CLASSES],
        **_columns(spans, base),
        "open": [_open(each, view, lanes, base) for each in view.open_intervals() if each.rank in lanes],
        "until_us": ((view.settled_ns or base) - base) / 1e3,
        "gaps": [
            {
                "lane": lanes.index(gap.rank),
                "t0_us": (gap.t0_ns - base) / 1e3,
                "t1_us": (gap.t1_ns - base) / 1e3,
                "text": gap.text,
            }
            for gap in view.lost
            if gap.rank in lanes
        ],
        "since": str(view.timeline.unix_ns(view.intervals.since_ns or base)),
    }


def _columns(spans: Spans, base_ns: int) -> dict[str, Any]:
    return {
        "lane": spans.lane.tolist(),
        "t0_us": ((spans.t0_ns - base_ns) / 1e3).tolist(),
        "us": ((spans.t1_ns - spans.t0_ns) / 1e3).tolist(),
        "cls": spans.cls.tolist(),
        "step": spans.step.tolist(),
        "mb": spans.mb.tolist(),
        "peer": spans.peer.tolist(),
        "merged": spans.merged.tolist(),
    }


def _open(each: OpenInterval, view: RunView, lanes: list[int], base_ns: int) -> dict[str, Any]:
    cls, _ = classify(int(each.cls), each.peer, each.rank, view.stages)
    return {
        "lane": lanes.index(each.rank),
        "cls": PLACE[cls],
        "t0_us": (each.since_ns - base_ns) / 1e3,
        "peer": each.peer,
        "text": each.text,
    }
