"""Where a run's requests spent their time, and one of them in particular: as numbers, as JSON, for people. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from insitu.vocabulary import RequestClass
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.requests.ledger import CLASSES, RequestLedger
from insitu_collector.requests.records import RequestRecords
from insitu_collector.requests.times import RequestTimes
from insitu_collector.steps.work import LEDGER_CLASSES

AT_ONCE: Final = 512
"""Requests whose spans are held at once: a few hundred spans each."""
MOST_WAITS: Final = 4
"""Lines for people on what was waited for; the document has all."""

Waits = dict[tuple[int, str], int]
"""(rank waited for, what it did) -> nanoseconds."""


@dataclass(frozen=True, slots=True)
class OneRequest:
    """The life of one request. Times are of the run's timeline."""

    name: str
    begin_ns: int
    end_ns: int
    arrived: bool
    ended: bool
    ns: dict[RequestClass, int]
    """Every class; they sum to the life."""
    waits: Waits
    spans: tuple[tuple[int, int, RequestClass, int, int], ...]
    """(begin, end, class, rank waited for, its class in `LEDGER_CLASSES`), without a hole."""


@dataclass(frozen=True, slots=True)
class RequestReport:
    """All requests of a run but those of warm-up."""

    num_requests: int
    num_open: int
    """Their end is not on record; they are followed to the end of what is."""
    num_unborn: int
    """Their arrival is not on record."""
    ns: dict[RequestClass, int]
    waits: Waits
    end_to_end_ns: tuple[int, ...]
    """Of requests whose arrival and end are on record, ascending."""
    unsplit_ns: int
    slowest: OneRequest | None
    """Of those."""
    asked: OneRequest | None

    def quantile_s(self, share: float) -> float | None:
        """Return a quantile of end-to-end times, by nearest rank; None of none."""
        place = min(len(self.end_to_end_ns) - 1, int(len(self.end_to_end_ns) * share))
        return self.end_to_end_ns[place] / 1e9 if self.end_to_end_ns else None


class NoSuchRequest(LookupError):
    """The run's record does not name it."""


def request_report(records: RequestRecords, name: str = "") -> RequestReport | None:
    """Return where requests spent their time, or None where the record names none.

    name: one to report on in particular; raises NoSuchRequest.
    """
    times = RequestTimes(records)
    if name and name not in times.lives.names:
        raise NoSuchRequest(f"no request {name!r} in this run")
    if not len(times):
        return None
    ns, waits, unsplit = np.zeros(len(CLASSES), np.int64), Counter[tuple[int, str]](), 0
    for low in range(0, len(times), AT_ONCE):
        ledger = times.ledger(low, min(low + AT_ONCE, len(times)))
        ns += ledger.sums().sum(axis=0)
        waits.update(ledger.waits())
        unsplit += ledger.unsplit_ns
    lives = times.lives
    complete = np.flatnonzero(lives.arrived & lives.ended)
    took = (lives.end - lives.begin)[complete]
    return RequestReport(
        num_requests=len(times),
        num_open=int((~lives.ended).sum()),
        num_unborn=int((~lives.arrived).sum()),
        ns=dict(zip(CLASSES, ns.tolist(), strict=True)),
        waits=dict(waits.most_common()),
        end_to_end_ns=tuple(np.sort(took).tolist()),
        unsplit_ns=unsplit,
        slowest=_one(times, int(complete[np.argmax(took)])) if len(took) else None,
        asked=_one(times, lives.names.index(name)) if name else None,
    )


def _one(times: RequestTimes, at: int) -> OneRequest:
    ledger = times.ledger(at, at + 1)
    return OneRequest(
        name=ledger.names[0],
        begin_ns=int(ledger.begin_ns[0]),
        end_ns=int(ledger.end_ns[0]),
        arrived=bool(ledger.arrived[0]),
        ended=bool(ledger.ended[0]),
        ns=dict(zip(CLASSES, ledger.sums()[0].tolist(), strict=True)),
        waits=ledger.waits(),
        spans=_joined(ledger),
    )


def _joined(ledger: RequestLedger) -> tuple[tuple[int, int, RequestClass, int, int], ...]:
    """Return the spans of a ledger of one request, neighbours that say the same joined."""
    columns = {name: ledger.spans[name] for name in ("cls", "rank", "doing")}
    changes = np.zeros(max(0, len(columns["cls"]) - 1), bool)
    for column in columns.values():
        changes |= column[1:] != column[:-1]
    first = np.concatenate([[True], changes])[: len(columns["cls"])]
    last = np.concatenate([changes, [True]])[: len(columns["cls"])]
    rows = zip(
        ledger.spans["begin"][first].tolist(),
        ledger.spans["end"][last].tolist(),
        (CLASSES[cls] for cls in columns["cls"][first].tolist()),
        columns["rank"][first].tolist(),
        columns["doing"][first].tolist(),
        strict=True,
    )
    return tuple(rows)


# -- the document ------------------------------------------------------------------------------------------------------


def to_json(found: RequestReport, clock: Timeline) -> dict[str, Any]:
    """Return the section `requests` of `insitu.stalls/1`."""
    return {
        "num_requests": found.num_requests,
        "num_open": found.num_open,
        "num_without_arrival": found.num_unborn,
        "seconds": _seconds(found.ns),
        "waits": _waits_json(found.waits),
        "end_to_end_s": {"p50": found.quantile_s(0.5), "p95": found.quantile_s(0.95)},
        "unsplit_s": found.unsplit_ns / 1e9,
        "slowest": None if found.slowest is None else _one_json(found.slowest, clock),
        "asked": None
        if found.asked is None
        else {**_one_json(found.asked, clock), "spans": _spans(found.asked, clock)},
    }


def _seconds(ns: dict[RequestClass, int]) -> dict[str, float]:
    return {str(cls): amount / 1e9 for cls, amount in ns.items()}


def _waits_json(waits: Waits) -> list[dict[str, Any]]:
    return [{"rank": rank, "class": doing, "seconds": ns / 1e9} for (rank, doing), ns in waits.items()]


def _one_json(one: OneRequest, clock: Timeline) -> dict[str, Any]:
    return {
        "request": one.name,
        "begin_unix_ns": clock.unix_ns(one.begin_ns),
        "end_unix_ns": clock.unix_ns(one.end_ns),
        "arrived": one.arrived,
        "ended": one.ended,
        "seconds": _seconds(one.ns),
        "waits": _waits_json(one.waits),
    }


def _spans(one: OneRequest, clock: Timeline) -> list[dict[str, Any]]:
    spans = []
    for begin, end, cls, rank, doing in one.spans:
        waits = cls is RequestClass.PIPELINE_WAIT
        of = {"rank": rank if waits else None, "doing": str(LEDGER_CLASSES[doing]) if waits else None}
        spans.append(
            {"begin_unix_ns": clock.unix_ns(begin), "end_unix_ns": clock.unix_ns(end), "class": str(cls), **of}
        )
    return spans


# -- for people --------------------------------------------------------------------------------------------------------


def to_lines(found: RequestReport) -> list[str]:
    """Return the same for people; of one request alone if it was asked for."""
    if found.asked is not None:
        return _one_lines(f"Request {found.asked.name}", found.asked)
    p50, p95 = found.quantile_s(0.5), found.quantile_s(0.95)
    took = "" if p50 is None or p95 is None else f"; end to end {p50:.2f} s (p50), {p95:.2f} s (p95)"
    lines = [f"Where requests' time went, {found.num_requests} requests{took}:", ""]
    lines += _class_lines(found.ns, found.waits)
    for count, what in ((found.num_open, "no end"), (found.num_unborn, "no arrival")):
        if count:
            lines.append(f"  Of {count} of them {what} is on record.")
    if found.unsplit_ns:
        lines.append(
            f"  {found.unsplit_ns / 1e9:.2f} s of decode were beside prompts and could not be split: no decode-only "
            "step of that size was near."
        )
    if found.slowest is not None:
        lines += ["", *_one_lines(f"The slowest, {found.slowest.name}", found.slowest)]
    return lines


def _one_lines(title: str, one: OneRequest) -> list[str]:
    took = f"{(one.end_ns - one.begin_ns) / 1e9:.3f} s"
    since = "" if one.arrived else "; its arrival is not on record"
    until = "" if one.ended else "; it is still open, or its end is not on record"
    return [f"{title}: {took}{since}{until}", "", *_class_lines(one.ns, one.waits)]


def _class_lines(ns: dict[RequestClass, int], waits: Waits) -> list[str]:
    total = max(1, sum(ns.values()))
    lines = []
    for cls in CLASSES:
        if ns[cls]:
            lines.append(_line(str(cls), ns[cls], total))
        if cls is RequestClass.PIPELINE_WAIT:
            lines += [_line(f"  rank {rank}, {doing}", part, total) for (rank, doing), part in _first(waits)]
    return lines


def _first(waits: Waits) -> Sequence[tuple[tuple[int, str], int]]:
    return list(waits.items())[:MOST_WAITS]


def _line(name: str, ns: int, total: int) -> str:
    return f"  {name:<30} {ns / 1e9:>9.3f} s {100 * ns / total:>6.1f}%"
