"""The picture of a run that pages draw: one JSON document, a pure function of a `RunView` and a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from insitu.vocabulary import VerdictKind, severity
from insitu_collector.ledger.tiles import LEVELS_NS
from insitu_collector.ledger.window import CLASSES
from insitu_collector.requests.latency import SECOND_NS, percentiles
from insitu_collector.verdicts.finding import OPEN, REVISED, Verdict, standing
from insitu_dashboard.notices import Notice, State, notice_of, state_of
from insitu_dashboard.run_view import RunView
from insitu_dashboard.tiles import Shares, Times, shares

SCHEMA: Final = "insitu.picture/1"
WINDOWS_S: Final = (10, 60, 300, 3600)
DEFAULT_WINDOW_S: Final = 60
MOST_BUCKETS: Final = 360
MOST_ALARMS: Final = 50
NOW_S: Final = 5
"""What the grid and the numbers call now."""
RECENT_S: Final = 30
"""What rates and percentiles of requests are taken over: they are rarer than steps."""
NO_DATA: Final = -1
_QUIET: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)


def picture(
    view: RunView,
    unix_ns: int,
    window_s: int,
    *,
    run: str,
    replica: int,
    num_replicas: int = 1,
    at_ns: int | None = None,
    num_damaged: int = 0,
) -> Any:
    """Return the document that pages draw: the last `window_s` seconds of a run.

    unix_ns: now. num_replicas: that the run has. num_damaged: places of the store's files that could not be read.
    at_ns: look at this time of the run's timeline instead of its newest (a paused page).
    """
    end = at_ns if at_ns is not None else view.settled_ns
    end = end or view.last_ns or 0
    bucket_ns = max(1, -(-window_s // MOST_BUCKETS)) * SECOND_NS
    width_ns = max(width for width in LEVELS_NS if bucket_ns % width == 0)
    times = view.times_between(end - (window_s + 1) * SECOND_NS, end, width_ns)
    header = _header(view, unix_ns)
    header["replica"] = f"replica {replica} of {num_replicas}" if num_replicas > 1 else ""
    told = [v for v in view.verdicts if at_ns is None or v.detected_unix_ns <= view.timeline.unix_ns(at_ns)]
    return {
        "schema": SCHEMA,
        "unix_ns": str(unix_ns),
        "end": str(view.timeline.unix_ns(end)),
        "run": run,
        "replica": replica,
        "header": header,
        "notice": as_json(_notice(view, header, num_damaged)),
        "verdicts": [verdict_json(verdict) for verdict in told_now(told, is_over=header["state"] == State.ENDED)],
        "alarms": [verdict_json(verdict) for verdict in alarms(told)],
        "numbers": _numbers(view, end),
        "grid": _grid(view, view.times_between(end - (NOW_S + 1) * SECOND_NS, end)),
        "mix": _mix(view, times),
        "latency": _latency(view, end, window_s),
        "ticks": _ticks(view, told, end, window_s),
        "heat": _heat(view, times, bucket_ns),
    }


def blank_picture(state: State, notice: Notice | None = None) -> dict[str, Any]:
    """Return the picture of nothing: no store, no run, or not the one that was asked for."""
    shown = notice or notice_of(state, None, {}, is_judged=False, has_steps=False)
    header: dict[str, Any] = {
        "state": str(state),
        "age_s": None,
        "clock": "",
        "drops": 0,
        "drop_reasons": {},
        "overhead": None,
    }
    return {
        "schema": SCHEMA,
        "unix_ns": "0",
        "end": "0",
        "run": "",
        "replica": 0,
        "header": {**header, "model": None, "stages": 0, "ranks": 0, "replica": ""},
        "notice": as_json(shown),
        "verdicts": [],
        "alarms": [],
        "numbers": {},
        "grid": [],
        "mix": [],
        "latency": {"unix_s": []},
        "ticks": [],
        "heat": {"unix_s": [], "bucket_s": 1, "lanes": [], "percent": {}},
    }


def as_json(notice: Notice | None) -> dict[str, str] | None:
    """Return a notice as JSON has it."""
    return None if notice is None else {**asdict(notice), "level": str(notice.level)}


def told_now(verdicts: list[Verdict], *, is_over: bool) -> list[Verdict]:
    """Return the verdicts to show first: what is open, most severe first; of a run that is over, what stands.

    `healthy` and `inconclusive` stand alone, and only while nothing else is open.
    """
    if is_over:
        return standing(verdicts)
    found = [verdict for verdict in verdicts if verdict.state == OPEN]
    loud = [verdict for verdict in found if verdict.kind not in _QUIET]
    quiet = sorted((verdict for verdict in found if verdict.kind in _QUIET), key=lambda v: v.window_end_unix_ns)
    return sorted(loud or quiet[-1:], key=lambda v: (severity(v.kind), v.window_start_unix_ns, v.verdict))


def alarms(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return everything that was found and not withdrawn, newest first."""
    found = [verdict for verdict in verdicts if verdict.kind not in _QUIET and verdict.state != REVISED]
    return sorted(found, key=lambda v: (-v.detected_unix_ns, v.verdict))[:MOST_ALARMS]


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as pages have it; nanoseconds as text, since a page's numbers hold 53 bits."""
    found = verdict.to_json()
    t0, t1 = found.pop("window_unix_ns")
    detected = found.pop("detected_unix_ns")
    return {
        **found,
        "id": verdict.verdict,
        "state": verdict.state,
        "t0": str(t0),
        "t1": str(t1),
        "detected": str(detected),
    }


def _header(view: RunView, unix_ns: int) -> dict[str, Any]:
    last = view.last_ns
    age = None if last is None else max(0.0, (unix_ns - view.timeline.unix_ns(last)) / 1e9)
    missing = view.missing()
    overhead = view.overhead()
    return {
        "state": str(state_of(age, is_closed=view.is_closed)),
        "age_s": None if age is None else round(age, 1),
        "clock": _clock(view),
        "drops": sum(missing.values()),
        "drop_reasons": missing,
        "overhead": None if overhead is None else round(overhead, 4),
        "model": view.model,
        "stages": len(set(view.stages.values())),
        "ranks": len(view.stages),
    }


def _clock(view: RunView) -> str:
    """Return how many hosts there are, and how well their clocks are known against each other."""
    rows = view.sources.select(["boot_id", "epoch"]).to_pylist()
    hosts = {row["boot_id"]: row["epoch"] for row in rows}
    if len(hosts) <= 1:
        return "one host"
    errors = [view.timeline.error_ns(rows[0]["epoch"], epoch) for epoch in hosts.values()]
    known = [error for error in errors if error is not None]
    how = f"±{max(known) / 1e6:.2f} ms" if len(known) == len(errors) else "by their wall clocks"
    return f"{len(hosts)} hosts, {how}"


def _notice(view: RunView, header: dict[str, Any], num_damaged: int) -> Notice | None:
    return notice_of(
        State(header["state"]),
        header["age_s"],
        header["drop_reasons"],
        is_judged=bool(view.verdicts),
        has_steps=bool(view.steps) or view.intervals.last_ns is not None,
        num_damaged=num_damaged,
    )


def _numbers(view: RunView, end_ns: int) -> dict[str, Any]:
    last = end_ns // SECOND_NS
    numbers = range(last - NOW_S, last)
    seconds = [view.latency.seconds[number] for number in numbers if number in view.latency.seconds]
    recent = [view.latency.seconds[n] for n in range(last - RECENT_S, last) if n in view.latency.seconds]
    recorded = last - min(view.steps, default=last)
    has_requests = bool(view.latency.seconds or view.latency.done)
    return {
        "tokens_per_s": round(sum(s.num_tokens for s in seconds) / NOW_S, 1) if has_requests else None,
        "requests_per_s": round(sum(s.num_finished for s in recent) / max(1, min(RECENT_S, recorded)), 2)
        if has_requests
        else None,
        "failed": sum(s.num_failed for s in recent) if has_requests else None,
        "running": view.latency.num_running if has_requests else None,
        "steps_per_s": round(sum(view.steps[number] for number in numbers) / NOW_S, 1) if view.steps else None,
        **asdict(percentiles(recent)),
    }


def _rounded(found: Shares) -> dict[str, float]:
    return {str(cls): round(share, 4) for cls, share in found.items() if share >= 0.0005}


def _grid(view: RunView, times: Times) -> list[dict[str, Any]]:
    still_open = {each.rank: each for each in view.open_intervals()}
    cells = []
    for rank, ns in zip(view.lanes, times.ns.sum(axis=0), strict=True):
        found = shares(ns)
        cls = next(iter(found), None)
        waiting = still_open.get(rank)
        cells.append(
            {
                "stage": view.stages[rank],
                "rank": rank,
                "cls": None if cls is None else str(cls),
                "share": 0.0 if cls is None else round(found[cls], 4),
                "classes": _rounded(found),
                "open": None
                if waiting is None
                else {"text": waiting.text, "s": round((waiting.until_ns - waiting.since_ns) / 1e9, 1)},
            }
        )
    return cells


def _mix(view: RunView, times: Times) -> list[dict[str, Any]]:
    of, ns = np.array([view.stages[rank] for rank in view.lanes]), times.ns.sum(axis=0)
    return [
        {"stage": stage, "classes": _rounded(shares(ns[of == stage].sum(axis=0)))} for stage in np.unique(of).tolist()
    ]


def _latency(view: RunView, end_ns: int, window_s: int) -> dict[str, list[Any]]:
    last = end_ns // SECOND_NS
    step = max(1, -(-window_s // MOST_BUCKETS))
    found: dict[str, list[Any]] = {
        name: [] for name in ("unix_s", "ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p99_s", "tokens_per_s")
    }
    for number in range(last - window_s, last, step):
        each = view.latency.at(number)
        found["unix_s"].append(round(view.timeline.unix_ns(number * SECOND_NS) / 1e9, 3))
        found["tokens_per_s"].append(None if each is None else each[1])
        for name, value in asdict(each[0]).items() if each else dict.fromkeys(list(found)[1:5]).items():
            found[name].append(None if value is None else round(value, 6))
    return found


def _ticks(view: RunView, verdicts: Iterable[Verdict], end_ns: int, window_s: int) -> list[dict[str, Any]]:
    end = view.timeline.unix_ns(end_ns)
    begin = end - window_s * SECOND_NS
    return [
        {"unix_ms": verdict.window_start_unix_ns // 1_000_000, "kind": str(verdict.kind), "text": verdict.text}
        for verdict in alarms(verdicts)
        if begin <= verdict.window_start_unix_ns <= end + NOW_S * SECOND_NS
    ]


def _heat(view: RunView, times: Times, bucket_ns: int) -> dict[str, Any]:
    """Return, for each class that occurs, a row a rank and a column a bucket: its share of the bucket in percent."""
    buckets = times.t0_ns // bucket_ns
    first = int(buckets.min()) if len(buckets) else 0
    ns = np.zeros((int(buckets.max()) - first + 1 if len(buckets) else 0, *times.ns.shape[1:]), np.int64)
    np.add.at(ns, buckets - first, times.ns)
    total = ns.sum(axis=2, keepdims=True)
    percent = np.where(total > 0, np.rint(100 * ns / np.maximum(total, 1)), NO_DATA).astype(np.int64)
    used = np.flatnonzero(ns.sum(axis=(0, 1))).tolist()
    begins = [view.timeline.unix_ns((first + column) * bucket_ns) / 1e9 for column in range(len(ns))]
    return {
        "unix_s": [round(begin, 3) for begin in begins],
        "bucket_s": bucket_ns // SECOND_NS,
        "lanes": [{"stage": view.stages[rank], "rank": rank} for rank in view.lanes],
        "percent": {str(CLASSES[at]): percent[:, :, at].T.tolist() for at in used},
    }
