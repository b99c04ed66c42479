"""Judging every run of a store: what is new in, revisions of verdicts out, alerts told, and what stands in the end."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.judge.metrics import Snapshot
from insitu_collector.notify.alerts import Transitions
from insitu_collector.notify.delivery import Delivery
from insitu_collector.plugins import Plugins, load_plugins
from insitu_collector.rows.slices import (
    JUDGED,
    Group,
    Groups,
    clock_with,
    replicas_of_latest,
    seconds,
    short_name,
    span_ns,
)
from insitu_collector.verdicts.finding import OPEN, Verdict, standing

if TYPE_CHECKING:
    import pyarrow as pa

    from insitu_collector.store import Store

_log = logging.getLogger("insitu")

LOOK_EVERY_S: Final = 1.0
LOOK_WHEN_OPEN_S: Final = 0.25
"""While a heartbeat says that an interval has been open for over a second: a hang in the making."""
LONG_OPEN_NS: Final = 1_000_000_000
CATCH_UP_NS: Final = 2_500_000_000
"""A poll that spans more than this is judged a second at a time, as it would have come."""
OVER_AFTER_S: Final = 3600.0
"""A run of which nothing came for so long is over, however it ended: what was said of it is no alarm any more."""


class Sink(Protocol):
    """Where revisions of verdicts go; a session of the probe is one."""

    def append(self, table: str, row: Mapping[str, Any]) -> None: ...


class Judge:
    """Judges every run of one store. `look` is one poll; what it returns was also appended to the sink."""

    def __init__(
        self,
        store: Store,
        sink: Sink | None = None,
        plugins: Plugins | None = None,
        deliveries: Sequence[Delivery] = (),
    ) -> None:
        """plugins: rules of other packages; None: those that are installed. deliveries: who is told of incidents."""
        self.groups = Groups()
        self.judgements: dict[Group, Judgement] = {}
        self._tail = store.tail(JUDGED)
        self._sink = sink
        self._plugins = load_plugins() if plugins is None else plugins
        self._deliveries = deliveries
        stored = [Verdict.from_row(row) for row in store.table("verdicts").to_pylist()]
        self._revisions = revisions_of(stored)
        self._transitions = Transitions(stored)
        self._num_opened: Counter[str] = Counter()
        self._num_failed = 0
        self._look_s = 0.0
        for delivery in deliveries:
            delivery.resume(self._transitions.before.values())

    def look(self, *, live: bool = True, final: bool = False) -> list[Verdict]:
        """Read what is new, judge it, write what it means. `live`: stamp what opens now with the wall clock."""
        told, began = list[Verdict](), time.monotonic()
        for group, tables in self.groups.sort(self._tail.poll(final=final)).items():
            judgement = self.judgements.get(group)
            if judgement is None:
                judgement = self.judgements[group] = Judgement(short_name(group), self._revisions, self._plugins)
            told += _feed(judgement, tables, live=live, final=final)
        for verdict in told:
            _log.info("insitu: %s (%s)", verdict.text, verdict.state)
            if self._sink is not None:
                self._sink.append("verdicts", verdict.row())
        now_unix_ns = time.time_ns()
        for alert in self._transitions.take(told):
            self._num_opened[str(alert.verdict.kind)] += alert.state == OPEN
            self._event(*alert.event())
            for delivery in self._deliveries if not alert.is_late(now_unix_ns) else ():
                delivery.put(alert)
        for text in self._plugins.take_failures():
            self._num_failed += 1
            self._event("plugin_failed", text)
        self._look_s = time.monotonic() - began
        return told

    def snapshot(self) -> Snapshot:
        """Return what is shown to Prometheus: of runs that go on, what stands and how old its latest row is."""
        goes_on = {
            short_name(group): (judgement, lag_s)
            for group, judgement in self.judgements.items()
            if (lag_s := _lag_s(judgement)) is not None
        }
        places = [
            (run, str(found.kind), _label(found.on_stage), _label(found.on_rank))
            for run, (judgement, _) in goes_on.items()
            for found in judgement.incidents.standing()
        ]
        return Snapshot(
            standing=Counter(places),
            lag_s={run: lag_s for run, (_, lag_s) in goes_on.items()},
            look_s=self._look_s,
            incidents=dict(self._num_opened),
            deliveries={delivery.target: delivery.counts() for delivery in self._deliveries},
            num_plugins_failed=self._num_failed,
        )

    def _event(self, kind: str, text: str) -> None:
        if self._sink is not None:
            self._sink.append("events", {"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text})

    def pause_s(self) -> float:
        """Return how long to wait until the next look."""
        return LOOK_WHEN_OPEN_S if any(_hangs(judgement) for judgement in self.judgements.values()) else LOOK_EVERY_S

    def close(self) -> None:
        """Let go of the store's files, and of who is told once they have heard, within seconds."""
        self._tail.close()
        for delivery in self._deliveries:
            delivery.close()


def revisions_of(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return the highest revision of each verdict."""
    found: dict[str, int] = {}
    for verdict in verdicts:
        found[verdict.verdict] = max(verdict.revision, found.get(verdict.verdict, -1))
    return found


def _lag_s(judgement: Judgement) -> float | None:
    """Return how old a run's latest row is; None when it is over or has not begun."""
    evidence = judgement.evidence
    beats = evidence.last_beats()
    lag_s = (time.time_ns() - evidence.timeline.unix_ns(evidence.now_ns)) / 1e9 if evidence.now_ns else OVER_AFTER_S
    has_ended = bool(beats) and all(beat.closing for beat in beats.values())
    return None if has_ended or lag_s >= OVER_AFTER_S else max(0.0, lag_s)


def _label(number: int | None) -> str:
    return "" if number is None else str(number)


def _feed(judgement: Judgement, tables: dict[str, pa.Table], *, live: bool, final: bool) -> list[Verdict]:
    told: list[Verdict] = []
    clock = clock_with(judgement.evidence, tables)
    parts = list(seconds(tables, clock=clock)) if span_ns(tables, clock) > CATCH_UP_NS else [tables]
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        stamp = time.time_ns() if live and is_last else None
        told += judgement.look(part, stamp, final=final and is_last)
    return told


def _hangs(judgement: Judgement) -> bool:
    if judgement.incidents.is_open(VerdictKind.STUCK):
        return True
    beats = judgement.evidence.last_beats().values()
    return any(
        beat.open_cls not in (None, IntervalClass.IDLE)
        and not beat.closing
        and beat.t_ns - beat.open_since_ns > LONG_OPEN_NS
        for beat in beats
    )


def final_verdicts(store: Store, run: str = "") -> list[Verdict]:
    """Return what stands of a store's latest run: most severe first, `healthy` alone only if nothing else stands.

    run: the latest of those whose name begins so; all its replicas.

    Reads the `verdicts` table; a replica that was never judged is judged here, and nothing is written.
    """
    told = [Verdict.from_row(row) for row in store.table("verdicts").to_pylist()]
    groups = replicas_of_latest(Groups().sort({"sources": store.table("sources")}), run)
    if not groups:  # a store that holds verdicts alone: those of the run judged last
        last = max(told, key=lambda verdict: verdict.detected_unix_ns, default=None)
        return standing([verdict for verdict in told if last is not None and verdict.run == last.run])
    is_judged = all(of_group(told, group) for group in groups)
    found = {} if is_judged else Groups().sort({name: store.table(name) for name in JUDGED})
    return standing([verdict for group in groups for verdict in of_group(told, group) or _judged(group, found[group])])


def replica_verdicts(told: Sequence[Verdict], group: Group, tables: dict[str, pa.Table]) -> list[Verdict]:
    """Return what stands of one replica, by what was told of all; one of which nothing was is judged by its tables."""
    return standing(of_group(told, group) or _judged(group, tables))


def of_group(told: Sequence[Verdict], group: Group) -> list[Verdict]:
    """Return the revisions that speak of one replica of a run."""
    return [verdict for verdict in told if group[0].startswith(verdict.run) and verdict.replica == group[1]]


def judged(store: Store, run: str = "") -> list[Verdict]:
    """Judge the latest run (whose name begins with `run`) from its records, a second at a time; every revision."""
    found = Groups().sort({name: store.table(name) for name in JUDGED})
    return [verdict for group in replicas_of_latest(found, run) for verdict in _judged(group, found[group])]


def _judged(group: Group, tables: dict[str, pa.Table]) -> list[Verdict]:
    return _feed(Judgement(short_name(group), plugins=load_plugins()), tables, live=False, final=True)
