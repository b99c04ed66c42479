"""The flight recorder of a process: holds what is not shipped of the last seconds, and ships a window of it if asked.

What is shipped of every step anyway (steps, intervals, boundaries) lies in the store already: an incident is the rest
of the same window, rows of `summaries` and `captures` like any other, and rows of `incidents` that say what it was.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from insitu.flight.buffer import Buffer, Canaries, FullSteps, Window
from insitu.flight.incident import OpenIncident
from insitu.flight.settings import LONGEST_S, Flight
from insitu.flight.triggers import Limiter, SlowSteps, Trigger, first_nonfinite, incident_id, shape_of
from insitu.identity import Source
from insitu.vocabulary import Reason

if TYPE_CHECKING:
    from insitu.session.step import StepRecord
    from insitu.slabs.harvest import Harvest, Seen
    from insitu.wire.insitu_pb2 import Dump

logger = logging.getLogger("insitu")

T0_BYTES: Final = 16 << 20
"""Most memory for canaries: five bytes a site and step, so 100 sites in 1,500 steps a second for twenty seconds."""
LATE_S: Final = 10.0
"""What is held beyond `pre_s`: a rank hears of another's trigger after a drain, a wire and a commit."""
MOST_TRIGGERS: Final = 64
MOST_REMEMBERED: Final = 256
"""Incidents that are not opened again, whoever asks."""
MOST_MISSED: Final = 16_384
ROOM_BYTES: Final = 4 << 20
"""With less room in the queue nothing of an incident is shipped: it waits here, where it is not dropped."""


class FlightRecorder:
    """Holds, and ships when something triggers. The drain's, but for `ask`, `asked`, `signalled`, `note_exception`."""

    def __init__(self, flight: Flight, source: Source) -> None:
        self.flight = flight
        self.triggers: deque[Trigger] = deque(maxlen=MOST_TRIGGERS)
        """What other threads, and signals, ask for."""
        self.is_urgent = False
        """True when an incident was opened that nobody else knows of yet."""
        self._source = source
        self._canaries = Buffer[Canaries](T0_BYTES)
        self._rows = Buffer[FullSteps](flight.row_bytes)
        self._limiter = Limiter(flight.again_after_s)
        self._slow = None if flight.slow_factor is None else SlowSteps(flight.slow_factor)
        self._open: tuple[OpenIncident, ...] = ()
        """Replaced, never changed: other threads read it."""
        self._remembered: deque[str] = deque(maxlen=MOST_REMEMBERED)
        self._missed: deque[int] = deque(maxlen=MOST_MISSED)
        """When steps began whose rows were wanted and are not there."""
        self._told: list[dict[str, Any]] = []
        self._num_incidents = 0
        self._looked_ns = 0
        self._is_ending = False

    # -- other threads -------------------------------------------------------------------------------------------

    def ask(self, why: str, step_id: int) -> str | None:
        """Return the incident that is opened, or open already; None when one was asked for too recently."""
        trigger = Trigger(Reason.ASKED, time.monotonic_ns(), why, step_id)
        running = self._running(trigger.t_ns)
        if running is not None:
            self.triggers.append(trigger)  # to be noted there
            return running.name
        if not self._limiter.admits(trigger.reason, trigger.t_ns):
            return None
        trigger = replace(trigger, incident=incident_id(self._source, trigger))
        self.triggers.append(trigger)
        return trigger.incident

    def asked(self, dump: Dump) -> None:
        """Take a message of the collector: another rank's incident, or one that a verdict opened."""
        latest_ns = time.monotonic_ns() + int(LONGEST_S * 1e9)  # what a window wants is let go of for nothing newer
        self.triggers.append(
            Trigger(
                reason=dump.reason,
                t_ns=self._mono_ns(dump.trigger_unix_ns),
                text=dump.text,
                step_id=dump.step_id if dump.HasField("step_id") else -1,
                site=dump.site or None,
                rank=dump.rank if dump.HasField("rank") else None,
                stage=dump.stage if dump.HasField("stage") else None,
                incident=dump.incident,
                window=(self._mono_ns(dump.start_unix_ns), min(latest_ns, self._mono_ns(dump.end_unix_ns))),
            )
        )

    def signalled(self, name: str) -> None:
        """A signal came. Appends to a deque and nothing else: it runs in the middle of anything."""
        self.triggers.append(Trigger(Reason.SIGNAL, time.monotonic_ns(), name))

    def note_exception(self, kind: type[BaseException], record: StepRecord) -> None:
        """An exception left a step. Its message may quote what a user typed, so only its type is kept."""
        if self.flight.exception and issubclass(kind, Exception):
            text = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            self.triggers.append(Trigger(Reason.EXCEPTION, time.monotonic_ns(), text, record.step_id))

    # -- the drain -----------------------------------------------------------------------------------------------

    def look(self, finished: Sequence[StepRecord], harvest: Harvest) -> None:
        """Find triggers in what was just harvested of finished steps, and hold what is not shipped otherwise."""
        self._looked_ns = time.monotonic_ns()
        if self.flight.rows is not None:
            self._missed.extend(record.t0_ns for record in finished if record.row_slab is None)
        seen, harvest.seen = harvest.seen, []
        for each in seen:
            self._find(each)
        while self.triggers:
            self._take(self.triggers.popleft())
        windows = [incident.window for incident in self._open]
        for each in seen:
            self._hold(each, windows)
        before_ns = self._looked_ns - int((self.flight.pre_s + LATE_S) * 1e9)
        self._canaries.forget(before_ns, windows)
        self._rows.forget(before_ns, windows)

    def _find(self, seen: Seen) -> None:
        bad = first_nonfinite(seen.summaries) if self.flight.nonfinite else None
        if bad is not None:
            record = next(record for record in seen.records if record.step_id == bad[0])
            self._take(_of_step(Reason.NONFINITE, record, site=seen.name_of(bad[1])))
        if self._slow is None:
            return
        most = seen.reading.count[:, list(seen.plan.boundaries)].max(1, initial=0).tolist()
        rows = [n if r.num_rows is None else r.num_rows for r, n in zip(seen.records, most, strict=True)]
        shape = np.array([shape_of(r.phase, n) for r, n in zip(seen.records, rows, strict=True)], np.int64)
        took = np.array([r.t1_ns - r.t0_ns for r in seen.records], np.int64)
        if (slow := self._slow.look(shape, took)) is not None:
            place, limit_ns = slow
            text = f"{took[place] / 1e6:.0f} ms, and {limit_ns / 1e6:.0f} ms is the limit for its shape"
            self._take(_of_step(Reason.SLOW_STEP, seen.records[place], text))

    def _take(self, trigger: Trigger) -> None:
        """Open an incident for a trigger; none where it is known, one is open, or the last was too recently."""
        if trigger.window is not None:
            if trigger.incident not in self._remembered:
                self._begin(trigger, trigger.window)
            return
        running = self._running(trigger.t_ns)
        if running is not None and not trigger.incident:
            running.note(trigger)
            self._limiter.count(trigger.reason)
            return
        if not trigger.incident:
            if not self._limiter.admits(trigger.reason, trigger.t_ns):
                return
            trigger = replace(trigger, incident=incident_id(self._source, trigger))
        if trigger.incident in self._remembered:  # another rank saw the same step, and told first
            return
        trigger = replace(trigger, rank=self._source.rank, stage=self._source.stage)
        begin_ns = min(trigger.t_ns - int(self.flight.pre_s * 1e9), trigger.since_ns or trigger.t_ns)
        incident = self._begin(trigger, (begin_ns, trigger.t_ns + int(self.flight.post_s * 1e9)))
        self._told.append(incident.opened(self._source, self._limiter.suppressed[trigger.reason]))
        self.is_urgent = True
        logger.warning("insitu: incident %s (%s): what the flight recorder holds is shipped", incident.name, trigger)

    def _begin(self, trigger: Trigger, window: Window) -> OpenIncident:
        incident = OpenIncident(trigger.incident, trigger, *window)
        self._open = (*self._open, incident)
        self._remembered.append(trigger.incident)
        self._num_incidents += 1
        return incident

    def _running(self, t_ns: int) -> OpenIncident | None:
        return next((each for each in self._open if each.t0_ns <= t_ns <= each.t1_ns), None)

    def _hold(self, seen: Seen, windows: list[Window]) -> None:
        """Keep what was read from slabs and is not shipped: canaries of inner sites, and rows of the armed sites."""
        t_ns = np.array([record.t0_ns for record in seen.records], np.int64)
        untold = seen.reading.fired.copy()
        untold[:, list(seen.plan.boundaries)] = False
        whole = np.unique(seen.summaries.step_id[~seen.summaries.at_boundary])
        untold[np.isin(seen.reading.step_id, whole)] = False  # of a flagged step every site was told
        if untold.any():
            self._canaries.add(Canaries(seen.reading.step_id, t_ns, seen.reading.canary, untold), windows)
        if seen.held:
            full = np.array([record.row_slab is not None for record in seen.records], bool)
            maps = tuple(tuple(r.rows) if r.rows else None for r in seen.records if r.row_slab is not None)
            axes = {part.site: seen.plan.sites[part.site].axis for part in seen.held}
            part = FullSteps(seen.reading.step_id[full], t_ns[full], maps, tuple(seen.held), axes)
            self._missed.extend(self._rows.add(part, windows))

    def release(self, harvest: Harvest, max_bytes: int) -> None:
        """Add what open incidents want to what is shipped next, about `max_bytes` of it; end those that are over."""
        has_room = max_bytes >= ROOM_BYTES or self._is_ending
        windows = [incident.window for incident in self._open] if has_room else []
        for canaries in self._canaries.take(windows, max_bytes):
            max_bytes -= canaries.num_bytes
            harvest.summaries.append(canaries.summaries())
            for incident in self._open:
                incident.count_canaries(canaries)
        for full in self._rows.take(windows, max_bytes):
            captures = list(full.named())
            harvest.captures += captures
            steps = np.concatenate([np.empty(0, np.int64), *(part.step_id for part in captures)])
            found, counts = np.unique(steps, return_counts=True)
            num_rows = dict(zip(found.tolist(), counts.tolist(), strict=True))
            for incident in self._open:
                incident.count_rows(full, num_rows)
        self._answer()

    def _answer(self) -> None:
        over = tuple(self._over())
        for incident in over:
            missed = sum(incident.t0_ns <= t_ns <= incident.t1_ns for t_ns in self._missed)
            suppressed = self._limiter.suppressed[incident.trigger.reason]
            self._told.append(incident.answered(self._source, suppressed, missed))
        self._open = tuple(incident for incident in self._open if incident not in over)

    def _over(self) -> Iterator[OpenIncident]:
        for incident in self._open:
            wants = self._canaries.wants([incident.window]) or self._rows.wants([incident.window])
            if self._is_ending or (incident.t1_ns < self._looked_ns and not wants):
                yield incident

    def finish(self) -> None:
        """The process ends: so does every window."""
        self._is_ending = True
        for incident in self._open:
            incident.t1_ns = min(incident.t1_ns, self._looked_ns)

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the rows of `incidents` that are to be shipped."""
        self.is_urgent = False
        told, self._told = self._told, []
        return told

    def _mono_ns(self, unix_ns: int) -> int:
        return self._source.mono_anchor_ns + (unix_ns - self._source.unix_anchor_ns)

    def stats(self) -> dict[str, int]:
        """Return what is held, in bytes as counted part by part, and what came of triggers."""
        return {
            "t0_bytes": self._canaries.num_bytes,
            "t0_peak_bytes": self._canaries.peak_bytes,
            "t0_max_bytes": self._canaries.max_bytes,
            "row_bytes": self._rows.num_bytes,
            "row_peak_bytes": self._rows.peak_bytes,
            "row_max_bytes": self._rows.max_bytes if self.flight.rows else 0,
            "num_incidents": self._num_incidents,
            "num_suppressed": sum(self._limiter.suppressed.values()),
        }


def _of_step(reason: Reason, record: StepRecord, text: str = "", site: str | None = None) -> Trigger:
    ended_ns = max(record.t0_ns, record.t1_ns)
    return Trigger(reason, ended_ns, text, record.step_id, site, since_ns=record.t0_ns)
