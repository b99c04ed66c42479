"""What makes a flight recorder ship what it holds: triggers, how often they may, and what a slow step is. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from insitu.identity import Source
from insitu.vocabulary import Reason

if TYPE_CHECKING:
    from insitu.slabs.harvest import Summaries

Ints = NDArray[np.int64]

PERCENTILE: Final = 99.0
HISTORY: Final = 512
"""Steps of one shape that its percentile is taken of: the newest."""
ENOUGH: Final = 100
"""Steps of one shape before any of them is called slow: of fewer, the percentile is the largest."""
SLOW_FLOOR_NS: Final = 50_000_000
"""A step that takes less than this beyond the percentile is not called slow, however short steps of its shape are."""
MOST_SHAPES: Final = 64
_OF_STEPS: Final = (Reason.NONFINITE, Reason.SLOW_STEP, Reason.EXCEPTION)
"""What a step did: ranks of a replica that see it in the same step mean the same incident."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """Something for which what is held is to be shipped. Times are of this host's CLOCK_MONOTONIC, in ns."""

    reason: str
    t_ns: int
    text: str = ""
    step_id: int = -1
    site: str | None = None
    rank: int | None = None
    """Where it came from; None: from no rank."""
    stage: int | None = None
    incident: str = ""
    """Its id, where it has one: another process has opened it."""
    window: tuple[int, int] | None = None
    """[t0_ns, t1_ns], where whoever asks says which; None: as this recorder is set."""
    since_ns: int | None = None
    """When the step began that is meant: it lies in the window, however long it took."""

    def __str__(self) -> str:
        at = f" at step {self.step_id}" if self.step_id >= 0 else ""
        said = ", ".join(word for word in (self.site, self.text) if word)
        return f"{self.reason}{at}{f': {said}' if said else ''}"


def incident_id(source: Source, trigger: Trigger) -> str:
    """Return 16 hex digits: the same on every rank of a replica for what a step did, else unlike any other."""
    if trigger.reason in _OF_STEPS and trigger.step_id >= 0:
        what = f"{source.run}/{source.replica}/{trigger.reason}/{trigger.step_id}"
    else:
        what = f"{source.epoch}/{trigger.reason}/{trigger.t_ns}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


class Limiter:
    """At most one incident of a reason in some time. Any thread."""

    def __init__(self, again_after_s: float) -> None:
        self.suppressed: Counter[str] = Counter()
        """Triggers by reason that opened none, since this process began."""
        self._every_ns = again_after_s * 1e9  # a float: it may be without end
        self._last: dict[str, int] = {}
        self._lock = Lock()

    def admits(self, reason: str, now_ns: int) -> bool:
        """Tell whether an incident may be opened, and remember that it was; count it where it may not."""
        with self._lock:
            last = self._last.get(reason)
            if last is not None and now_ns - last < self._every_ns:
                self.suppressed[reason] += 1
                return False
            self._last[reason] = now_ns
            return True

    def count(self, reason: str) -> None:
        """Count a trigger that opened none because one was open."""
        with self._lock:
            self.suppressed[reason] += 1


def first_nonfinite(summaries: Summaries) -> tuple[int, int] | None:
    """Return (step, site) of the first step with a boundary that is not finite, and the first such site of it."""
    bad = ~np.isfinite(summaries.canary) | (summaries.num_bad > 0)
    flagged = np.flatnonzero(bad & summaries.at_boundary)
    if not len(flagged):
        return None
    step_id = int(summaries.step_id[flagged[0]])
    return step_id, int(summaries.site[bad & (summaries.step_id == step_id)].min())


def slow_limit_ns(history_ns: Ints, factor: float) -> float | None:
    """Return beyond what a step of this shape is slow: `factor` times the 99th percentile of `history_ns`, int64[n].

    At least `SLOW_FLOOR_NS` beyond the percentile. None while there are too few to say.
    """
    if len(history_ns) < ENOUGH:
        return None
    usual = float(np.percentile(history_ns, PERCENTILE))
    return max(factor * usual, usual + SLOW_FLOOR_NS)


class SlowSteps:
    """Remembers how long steps of each shape took, and finds one that took far longer."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._history: dict[int, Ints] = {}

    def look(self, shape: Ints, took_ns: Ints) -> tuple[int, float] | None:
        """Return (index of the first slow step, its limit in ns), or None; then remember them all.

        shape: int64[n], a number for each shape (`shape_of`). A step is compared with those of earlier calls only.
        """
        found: tuple[int, float] | None = None
        for each in np.unique(shape).tolist():
            mine = np.flatnonzero(shape == each)
            history = self._history.get(each, np.empty(0, np.int64))
            limit = slow_limit_ns(history, self._factor)
            slow = mine[took_ns[mine] > limit] if limit is not None else mine[:0]
            if limit is not None and len(slow) and (found is None or slow[0] < found[0]):
                found = int(slow[0]), limit
            if each in self._history or len(self._history) < MOST_SHAPES:
                self._history[each] = np.concatenate([history, took_ns[mine]])[-HISTORY:]
        return found


def shape_of(phase: int | None, num_rows: int) -> int:
    """Return a number for the shape of a step: its phase, and its rows to the next power of two."""
    return (-1 if phase is None else phase) * 64 + max(0, num_rows).bit_length()
