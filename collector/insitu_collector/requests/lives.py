"""What the events of requests say: when each began and ended, and what it was in while no step had it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import RequestClass, RequestEvent
from insitu_collector.clocks.timeline import Int64
from insitu_collector.requests.ledger import NOBODY, PLACE
from insitu_collector.rows.tape import Columns

Bool = NDArray[np.bool_]

_OPEN: Final = 256
"""Stands for the end of what is known, behind every number of an event (`requests.event` is a u8)."""
_STATES: Final = {
    (RequestEvent.ARRIVED, RequestEvent.KV_WAIT): RequestClass.QUEUE,
    (RequestEvent.ARRIVED, RequestEvent.SCHEDULED): RequestClass.QUEUE,
    (RequestEvent.KV_WAIT, RequestEvent.SCHEDULED): RequestClass.KV_WAIT,
    (RequestEvent.KV_WAIT, RequestEvent.KV_WAIT): RequestClass.KV_WAIT,
    (RequestEvent.PREEMPTED, RequestEvent.RESUMED): RequestClass.PREEMPTED,
    (RequestEvent.PREEMPTED, RequestEvent.SCHEDULED): RequestClass.PREEMPTED,
}
"""What a request is in between two events that follow each other. Anything else is told by its steps, or by nothing."""
_LAST: Final = {
    RequestEvent.ARRIVED: RequestClass.QUEUE,
    RequestEvent.KV_WAIT: RequestClass.KV_WAIT,
    RequestEvent.PREEMPTED: RequestClass.PREEMPTED,
}
"""... and after its last one, when it failed or is open, and no step and no token came later."""
_NOT_STATES: Final = (RequestEvent.QUEUED, RequestEvent.FIRST_TOKEN, RequestEvent.TOKEN)
_ENDS: Final = (RequestEvent.FINISHED, RequestEvent.FAILED)
_TOKENS: Final = (RequestEvent.FIRST_TOKEN, RequestEvent.TOKEN)
_ORDER: Final = {RequestEvent.ARRIVED: 0, RequestEvent.KV_WAIT: 1, RequestEvent.FINISHED: 3, RequestEvent.FAILED: 3}
"""Events of one moment stand in this order, the others at 2."""
_LATEST: Final = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Lives:
    """Requests in the order in which the record names them."""

    names: list[str]
    begin: Int64
    end: Int64
    first_token: Int64
    arrived: Bool
    ended: Bool
    last_token: Int64
    """The least number there is for none."""
    control: Columns
    """`at, event, t, step` of the events that change what a request is in, by request and time."""


def lives_of(names: list[str], events: Columns, at: Int64, first_seen: Int64, until_ns: int) -> Lives:
    """Return the lives of n requests. `at`: whose each event is, -1 for nobody's; `first_seen`: their first step."""
    mine = at >= 0
    rows = {"at": at[mine]} | {name: events[name][mine] for name in ("event", "t", "step")}
    arrival, num = _first(rows, (RequestEvent.ARRIVED,), len(names)), len(names)
    seen = first_seen.copy()
    np.minimum.at(seen, rows["at"], rows["t"])
    begin = np.where(arrival < _LATEST, arrival, seen)
    end = -_first({**rows, "t": -rows["t"]}, _ENDS, num)
    token = _first(rows, (RequestEvent.FIRST_TOKEN,), num)
    return Lives(
        names=names,
        begin=begin,
        end=np.maximum(np.where(end > -_LATEST, end, until_ns), begin),
        first_token=np.where(token < _LATEST, token, -1),
        arrived=arrival < _LATEST,
        ended=end > -_LATEST,
        last_token=-_first({**rows, "t": -rows["t"]}, _TOKENS, num),
        control=_sorted({name: column[~np.isin(rows["event"], _NOT_STATES)] for name, column in rows.items()}),
    )


def _first(rows: Columns, events: tuple[RequestEvent, ...], num: int) -> Int64:
    found = np.full(num, _LATEST)
    wanted = np.isin(rows["event"], events)
    np.minimum.at(found, rows["at"][wanted], rows["t"][wanted])
    return found


def _sorted(rows: Columns) -> Columns:
    place = np.full(_OPEN + 1, 2)
    place[list(_ORDER)], place[_OPEN] = list(_ORDER.values()), 4
    order = np.lexsort((place[rows["event"]], rows["t"], rows["at"]))
    return {name: column[order] for name, column in rows.items()}


def state_spans(lives: Lives, worked_until: Int64, until_ns: int, *, lossy: bool = False) -> Columns:
    """Return what requests were in between two events, as claims by request (`insitu_collector.requests.ledger.SPAN`).

    worked_until: the end of each one's last known step. lossy: silence up to `until_ns` proves nothing.
    """
    control = lives.control
    if not lossy:
        still = np.flatnonzero(~lives.ended)
        last = {"at": still, "event": np.full(len(still), _OPEN), "t": np.full(len(still), until_ns)}
        last["step"] = np.full(len(still), -1)
        control = _sorted({name: np.concatenate([control[name], last[name]]) for name in control})
    at, event, t_ns = control["at"], control["event"], control["t"]
    follows = np.flatnonzero((at[1:] == at[:-1]) & (t_ns[1:] > t_ns[:-1])) if len(at) else np.zeros(0, np.int64)
    cls = _table()[event[follows], event[follows + 1]]
    closing = np.isin(event[follows + 1], (RequestEvent.FAILED, _OPEN))
    later = np.maximum(worked_until, lives.last_token)[at[follows]] > t_ns[follows]
    kept = (cls >= 0) & ~(closing & later)
    begin, end = t_ns[follows][kept], t_ns[follows + 1][kept]
    nobody = np.full(len(begin), NOBODY)
    return {"at": at[follows][kept], "begin": begin, "end": end, "cls": cls[kept], "rank": nobody, "doing": nobody}


def _table() -> Int64:
    table = np.full((_OPEN + 1, _OPEN + 1), -1)
    for (before, after), cls in _STATES.items():
        table[before, after] = PLACE[cls]
    for before, cls in _LAST.items():
        table[before, [RequestEvent.FAILED, _OPEN]] = PLACE[cls]
    return table
