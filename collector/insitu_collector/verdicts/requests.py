"""What requests waited for lately: the verdicts `kv_starved` and `prefill_delays_decode` over one window. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from insitu.vocabulary import Phase, RequestEvent, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.requests.records import RequestRecords, records_of_evidence
from insitu_collector.requests.times import RequestTimes
from insitu_collector.rows.row_maps import WARMUP_PREFIX
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts import kv_starved, prefill_delays_decode
from insitu_collector.verdicts.finding import Finding

WINDOW_NS: Final = 10_000_000_000
MIN_WINDOW_NS: Final = 3_000_000_000
"""Requests are looked at over the last stretch of the first length, once there is the second."""
EVERY_NS: Final = 3_000_000_000
"""The ledger of a window costs the judge some 40 ms of a busy server; nothing in it changes much sooner than this."""
MOST_UNKNOWN: Final = 0.2
"""Share of the requests that decode whose first token no row tells of: beyond it their time is not known."""
REACH_NS: Final = 2_000_000_000
"""How far before the window steps and intervals are read, so that its first steps are whole."""


class RequestWatch:
    """Looks at where requests' time went now and then, and says in between what it said last."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._looked_ns = 0

    def look(
        self,
        evidence: Evidence,
        baseline: Baseline,
        traffic: Mapping[int, StepTimes],
        is_open: Callable[[VerdictKind], bool],
        *,
        contended: bool,
    ) -> list[Finding]:
        """Return what delays requests (see `look`), at most `EVERY_NS` old."""
        if not 0 <= evidence.now_ns - self._looked_ns < EVERY_NS:  # a clock may have gone back
            self._looked_ns = evidence.now_ns
            self._found = look(evidence, baseline, traffic, is_open, contended=contended)
        return self._found


def look(
    evidence: Evidence,
    baseline: Baseline,
    traffic: Mapping[int, StepTimes],
    is_open: Callable[[VerdictKind], bool],
    *,
    contended: bool,
) -> list[Finding]:
    """Return what delays requests. traffic: rank -> its steps, without warm-up; `is_open`: whether a kind is said now.

    The ledger costs more than the question whether it can hold anything, which comes first.
    """
    window = recent_window(evidence)
    if window is None:
        return []
    starved = kv_starved.is_possible(evidence)
    delayed = prefill_delays_decode.is_possible(traffic, window[0])
    if not starved and not delayed:
        return []
    records = records_of_evidence(evidence, window[0] - REACH_NS)
    if records.lossy or unknown_share(records) > MOST_UNKNOWN:
        return []  # shares of what is left would be shares of anything
    times = RequestTimes(records)
    ledger = times.ledger(0, len(times), window)
    found = []
    if starved:
        found += kv_starved.look(evidence, ledger, window, already=is_open(VerdictKind.KV_STARVED))
    if delayed:
        already = is_open(VerdictKind.PREFILL_DELAYS_DECODE)
        fits = [baseline.expectation(rank) for rank in evidence.stages]
        found += prefill_delays_decode.look(times, ledger, window, fits, contended=contended, already=already)
    return found


def unknown_share(records: RequestRecords) -> float:
    """Return the share of the requests seen decoding whose first token is not recorded: their events got lost."""
    entries, events = records.entries, records.events
    decoding = set(entries["request"][entries["phase"] == Phase.DECODE].tolist())
    decoding = {name for name in decoding if name is not None and not name.startswith(WARMUP_PREFIX)}
    begun = set(events["request"][events["event"] == RequestEvent.FIRST_TOKEN].tolist())
    return len(decoding - begun) / max(1, len(decoding))


def recent_window(evidence: Evidence) -> tuple[int, int] | None:
    """Return the last stretch of traffic that every rank has reported; None if it is too short."""
    if evidence.traffic_ns is None or not evidence.stages:
        return None
    rows = evidence.intervals.between(evidence.now_ns - 2 * WINDOW_NS)
    t1 = min(int(rows["t"][rows["rank"] == rank].max(initial=0)) for rank in evidence.stages)
    t0 = max(t1 - WINDOW_NS, evidence.traffic_ns[0], evidence.warmup_end_ns or 0)
    return (t0, t1) if t1 - t0 >= MIN_WINDOW_NS else None
