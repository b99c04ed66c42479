"""Chrome's JSON: complete events, counters and flow arrows."""

from __future__ import annotations

import io
import json
from typing import Any

from insitu_collector.export.chrome import write_chrome
from insitu_collector.export.trace import ClockOfHost, Counter, Process, Slice, Trace, Track


def written(*processes: Process) -> dict[str, Any]:
    file = io.BytesIO()
    write_chrome(Trace("5eed", list(processes), [ClockOfHost("h", 50, 50, 1_000_050)], 0, 0, 0), file)
    answer: dict[str, Any] = json.loads(file.getvalue())
    return answer


def test_slices_are_complete_events_in_microseconds_since_the_first() -> None:
    rows = [Slice(2_000, 5_500, "compute", "compute", {"step": 3}), Slice(6_000, 6_000, "told", "v", {})]
    answer = written(Process("rank 0", "pid 7", [Track("step thread", lambda: iter(rows))]))
    assert answer["otherData"]["base_unix_ns"] == str(1_000_000 + 2_000)
    meta = {event["name"]: event["args"] for event in answer["traceEvents"] if event["ph"] == "M"}
    assert meta["process_name"] == {"name": "rank 0"}
    assert meta["thread_name"] == {"name": "step thread"}
    drawn = [event for event in answer["traceEvents"] if event["ph"] in "Xi"]
    assert [(e["ph"], e["name"], e["ts"], e.get("dur")) for e in drawn] == [
        ("X", "compute", 0.0, 3.5),
        ("i", "told", 4.0, None),
    ]
    assert drawn[0]["args"] == {"step": 3}


def test_a_flow_begins_inside_its_source_and_ends_inside_its_sink() -> None:
    first = [Slice(0, 1_000, "send_xfer", "transfer", {}, (1,))]
    second = [Slice(0, 3_000, "recv_wait", "wait_upstream", {}, (), (1,))]
    tracks = Track("t", lambda: iter(first)), Track("t", lambda: iter(second))
    answer = written(*(Process("r", "", [track]) for track in tracks))
    begin, end = (next(e for e in answer["traceEvents"] if e["ph"] == phase) for phase in "sf")
    assert begin["id"] == end["id"] and end["bp"] == "e"
    assert (begin["pid"], begin["ts"], end["pid"], end["ts"]) == (1, 0.0, 2, 2.999)


def test_counters_and_an_empty_trace() -> None:
    answer = written(Process("driver", "", [], [Counter("requests in flight", [1_000, 2_000], [1, 0])]))
    counts = [(e["ts"], e["args"]) for e in answer["traceEvents"] if e["ph"] == "C"]
    assert counts == [(0.0, {"requests in flight": 1}), (1.0, {"requests in flight": 0})]
    assert written()["traceEvents"] == []
