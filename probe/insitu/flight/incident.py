"""An incident that is open in this process: its window, and what was shipped of it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from insitu.flight.buffer import Canaries, FullSteps, Window
from insitu.flight.triggers import Trigger
from insitu.identity import Source
from insitu.vocabulary import IncidentState

if TYPE_CHECKING:
    from insitu.slabs.harvest import Ints

MOST_FURTHER: Final = 8
"""Further triggers of an incident that are named; all are counted."""


@dataclass
class OpenIncident:
    """A window that is being shipped."""

    name: str
    trigger: Trigger
    t0_ns: int
    t1_ns: int
    num_steps: int = 0
    first_step_id: int | None = None
    last_step_id: int | None = None
    since_ns: int | None = None
    """When the first step began of which anything was shipped."""
    rows_since_ns: int | None = None
    num_summaries: int = 0
    num_captures: int = 0
    further: list[str] = field(default_factory=list)
    num_further: int = 0

    @property
    def window(self) -> Window:
        return self.t0_ns, self.t1_ns

    def note(self, trigger: Trigger) -> None:
        """Remember another trigger, which opens nothing of its own."""
        self.num_further += 1
        if len(self.further) < MOST_FURTHER:
            self.further.append(str(trigger))

    def count_canaries(self, part: Canaries) -> None:
        """Count what is shipped of T0."""
        inside = (self.t0_ns <= part.t_ns) & (part.t_ns <= self.t1_ns)
        if inside.any():
            self.num_summaries += int(part.untold[inside].sum())
            self._reach(part.step_id[inside], part.t_ns[inside])

    def count_rows(self, part: FullSteps, num_rows: Mapping[int, int]) -> None:
        """Count what is shipped of raw rows; num_rows: step -> how many of its rows are."""
        inside = (self.t0_ns <= part.t_ns) & (part.t_ns <= self.t1_ns)
        if inside.any():
            steps = part.step_id[inside]
            self.num_steps += len(steps)
            self.num_captures += sum(num_rows.get(step, 0) for step in set(steps.tolist()))
            first_ns = int(part.t_ns[inside].min())
            self.rows_since_ns = first_ns if self.rows_since_ns is None else min(first_ns, self.rows_since_ns)
            self._reach(steps, part.t_ns[inside])

    def _reach(self, step_id: Ints, t_ns: Ints) -> None:
        first, last, since = int(step_id.min()), int(step_id.max()), int(t_ns.min())
        self.first_step_id = first if self.first_step_id is None else min(first, self.first_step_id)
        self.last_step_id = last if self.last_step_id is None else max(last, self.last_step_id)
        self.since_ns = since if self.since_ns is None else min(since, self.since_ns)

    def opened(self, source: Source, num_suppressed: int) -> dict[str, Any]:
        """Return its first row of `incidents`: this process opened it."""
        trigger, unix = self.trigger, source.unix_ns
        return {
            "incident": self.name,
            "state": str(IncidentState.OPENED),
            "run": source.run,
            "reason": trigger.reason,
            "text": trigger.text,
            "on_rank": trigger.rank,
            "on_stage": trigger.stage,
            "step_id": trigger.step_id if trigger.step_id >= 0 else None,
            "site": trigger.site,
            "trigger_unix_ns": unix(trigger.t_ns),
            "window_start_unix_ns": unix(self.t0_ns),
            "window_end_unix_ns": unix(self.t1_ns),
            "num_suppressed": num_suppressed,
        }

    def answered(self, source: Source, num_suppressed: int, num_missed: int) -> dict[str, Any]:
        """Return its last row: what this process shipped of it."""
        unix = source.unix_ns
        return self.opened(source, num_suppressed) | {
            "state": str(IncidentState.ANSWERED),
            "first_step_id": self.first_step_id,
            "last_step_id": self.last_step_id,
            "since_unix_ns": None if self.since_ns is None else unix(self.since_ns),
            "num_summaries": self.num_summaries,
            "num_full_steps": self.num_steps,
            "rows_since_unix_ns": None if self.rows_since_ns is None else unix(self.rows_since_ns),
            "num_captures": self.num_captures,
            "num_steps_without_rows": num_missed,
            "num_further": self.num_further,
            "further": self.further,
        }
