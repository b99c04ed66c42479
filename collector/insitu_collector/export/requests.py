"""Requests as slices with their phases inside, and how many were running and waiting. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.export.trace import Args, Counter, Slice, clipped

_ENDS: Final = {RequestEvent.FINISHED: "finished", RequestEvent.FAILED: "failed"}
_PHASES: Final = {
    RequestEvent.ARRIVED: "queue",
    RequestEvent.QUEUED: "queue",
    RequestEvent.KV_WAIT: "kv_wait",
    RequestEvent.SCHEDULED: "prefill",
    RequestEvent.FIRST_TOKEN: "decode",
    RequestEvent.PREEMPTED: "preempted",
}
"""What a request is in from an event on; `resumed` goes back to what it was in before."""
_TELLING: Final = frozenset(_PHASES) - {RequestEvent.ARRIVED}
"""Without any of these nothing is known of what happened between arrival and end."""


@dataclass(frozen=True, slots=True)
class Life:
    """One request: its events by time, without single tokens."""

    name: str
    events: tuple[tuple[int, RequestEvent, int], ...]
    """(t_ns, event, num_tokens or -1)"""

    @property
    def begin_ns(self) -> int:
        return self.events[0][0]

    @property
    def end_ns(self) -> int | None:
        return next((t for t, event, _ in self.events if event in _ENDS), None)

    def first(self, event: RequestEvent) -> int | None:
        """Return when an event came first."""
        return next((t for t, each, _ in self.events if each == event), None)


def without_tokens(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return the events of `requests` that a trace shows: all but single tokens, which are most of them."""
    return rows.filter(pc.not_equal(rows["event"], int(RequestEvent.TOKEN)))


def lives(rows: pa.Table, clock: Timeline) -> list[Life]:
    """Return the requests of a `requests` table by arrival."""
    found: dict[str, list[tuple[int, RequestEvent, int]]] = {}
    names, events, tokens = (rows[name].to_pylist() for name in ("request", "event", "num_tokens"))
    times = clock.moved(rows, "t_ns").tolist()
    for name, event, t_ns, num_tokens in zip(names, events, times, tokens, strict=True):
        found.setdefault(name, []).append((t_ns, RequestEvent(event), -1 if num_tokens is None else num_tokens))
    whole = [Life(name, tuple(sorted(events, key=_order))) for name, events in found.items()]
    return sorted(whole, key=lambda life: (life.begin_ns, life.name))


def _order(event: tuple[int, RequestEvent, int]) -> tuple[int, float]:
    """By time, and within a moment in the order of a life: numbers of events are, but for one that came later."""
    return event[0], RequestEvent.ARRIVED + 0.5 if event[1] == RequestEvent.KV_WAIT else float(event[1])


def request_slices(life: Life, begin_ns: int, end_ns: int) -> list[Slice]:
    """Return a request's slice and its phases inside, clipped to the window; empty when it lies outside.

    A request that has not ended reaches to the end of the window, and says so.
    """
    ended = life.end_ns
    last = max(end_ns if ended is None else ended, life.begin_ns)
    whole = clipped(Slice(life.begin_ns, last, life.name, "request", _args(life)), begin_ns, end_ns)
    if whole is None:
        return []
    return [whole, *_phases(life, last, begin_ns, end_ns)]


def _args(life: Life) -> Args:
    args: Args = {"outcome": next((_ENDS[event] for _, event, _ in life.events if event in _ENDS), "still running")}
    arrived = next((tokens for _, event, tokens in life.events if event == RequestEvent.ARRIVED), None)
    if arrived is None:
        args["begin"] = "not recorded"
    elif arrived >= 0:
        args["prompt_tokens"] = arrived
    if life.end_ns is not None and life.events[-1][2] >= 0:
        args["tokens"] = life.events[-1][2]
    return args


def _phases(life: Life, last_ns: int, begin_ns: int, end_ns: int) -> list[Slice]:
    if not any(event in _TELLING for _, event, _ in life.events):
        return []
    found: list[tuple[int, str]] = []
    before = ""
    for t_ns, event, _ in life.events:
        name = before if event == RequestEvent.RESUMED else _PHASES.get(event, "")
        if event == RequestEvent.PREEMPTED and found:
            before = found[-1][1]
        if name and (not found or found[-1][1] != name):
            found.append((t_ns, name))
    ends = [*(t for t, _ in found[1:]), last_ns]
    drawn = [
        clipped(Slice(t0, min(t1, last_ns), name, "phase", {}), begin_ns, end_ns)
        for (t0, name), t1 in zip(found, ends, strict=True)
        if t0 <= last_ns
    ]
    return [each for each in drawn if each is not None]


def request_counters(found: list[Life], begin_ns: int, end_ns: int) -> list[Counter]:
    """Return how many requests were in flight and, where it was recorded when they were scheduled, how many waited."""
    spans = [(life.begin_ns, life.end_ns) for life in found]
    counters = [_counted("requests in flight", spans, begin_ns, end_ns)]
    scheduled = [life.first(RequestEvent.SCHEDULED) for life in found]
    if any(t is not None for t in scheduled):
        waits = [
            (life.begin_ns, life.end_ns if t is None else t)
            for life, t in zip(found, scheduled, strict=True)
            if t is None or life.first(RequestEvent.ARRIVED) is not None
        ]
        counters.append(_counted("requests waiting", waits, begin_ns, end_ns))
    return counters


def _counted(name: str, spans: list[tuple[int, int | None]], begin_ns: int, end_ns: int) -> Counter:
    begun = np.array([begin for begin, _ in spans], np.int64)
    ended = np.array([end for _, end in spans if end is not None], np.int64)
    times = np.clip(np.concatenate([begun, ended]), begin_ns, None)
    change = np.concatenate([np.ones(len(begun), np.int64), -np.ones(len(ended), np.int64)])
    order = np.argsort(times, kind="stable")
    times, total = times[order], np.cumsum(change[order])
    last = np.append(times[1:] != times[:-1], True) if len(times) else np.zeros(0, bool)
    wanted = last & (times < end_ns)
    return Counter(name, times[wanted].tolist(), total[wanted].tolist())
