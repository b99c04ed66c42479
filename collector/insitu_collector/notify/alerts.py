"""Alerts: an incident that opens and one that is over, each once. Pure: revisions of verdicts in, alerts out.

The `verdicts` table is what they are derived from, and the `events` table says which were sent (`SENT`): a judge that
starts again reads both and repeats nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from insitu.vocabulary import VerdictKind
from insitu_collector.verdicts.finding import CLOSED, OPEN, Verdict

SCHEMA: Final = "insitu.alert/1"
EVENT_KINDS: Final[Mapping[str, str]] = {OPEN: "incident_opened", CLOSED: "incident_closed"}
"""`events.kind` of the row an alert leaves, by its state."""
SENT: Final = "alert_sent"
GIVEN_UP: Final = "alert_given_up"
"""`events.kind` of the rows that say what became of an alert at one receiver."""
LATE_NS: Final = 900_000_000_000
"""Nobody is told any more that something opened so long ago; that something is over is never too late to be told."""
QUIET: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)
"""Kinds that are no alarm."""


@dataclass(frozen=True, slots=True)
class Alert:
    """An incident that opened, opened again, or is over; `verdict` is the revision that said so."""

    verdict: Verdict

    @property
    def incident(self) -> str:
        return self.verdict.verdict

    @property
    def state(self) -> str:
        """`open` or `closed`; what was withdrawn is closed."""
        return OPEN if self.verdict.state == OPEN else CLOSED

    @property
    def id(self) -> str:
        """The same each time this alert is sent: what a receiver tells repetitions by."""
        return f"{self.incident}#{self.verdict.revision}"

    @property
    def unix_ns(self) -> int:
        """When it was so."""
        return max(self.verdict.detected_unix_ns, self.verdict.window_end_unix_ns)

    def is_late(self, now_unix_ns: int) -> bool:
        """Tell whether it is no longer worth telling."""
        return self.state == OPEN and now_unix_ns - self.unix_ns > LATE_NS

    def to_json(self) -> dict[str, Any]:
        """Return the document of a webhook."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "incident": self.incident,
            "state": self.state,
            "run": self.verdict.run,
            "replica": self.verdict.replica,
            "verdict": self.verdict.to_json(),
        }

    def event(self) -> tuple[str, str]:
        """Return kind and text of its row in `events`."""
        return EVENT_KINDS[self.state], f"{self.incident}: {self.verdict.text}"


class Transitions:
    """The state each incident was last said to be in. Give it every revision once, in order."""

    def __init__(self, stored: Iterable[Verdict] = ()) -> None:
        """stored: revisions that were told before, by an earlier judge."""
        self._state: dict[str, str] = {}
        self.before = {alert.incident: alert for alert in self.take(sorted(stored, key=lambda v: v.revision))}
        """The last alert of each incident of which earlier judges told."""

    def take(self, told: Iterable[Verdict]) -> list[Alert]:
        """Return an alert for each revision that changes its incident's state; sharpened ones change nothing."""
        alerts = []
        for verdict in told:
            alert = Alert(verdict)
            if verdict.kind not in QUIET and alert.state != self._state.get(verdict.verdict, CLOSED):
                self._state[verdict.verdict] = alert.state
                alerts.append(alert)
        return alerts


def outcome(alert: Alert, target: str) -> str:
    """Return the text of a `SENT` or `GIVEN_UP` row. target: which receiver, without what is secret in its address."""
    return json.dumps({"id": alert.id, "incident": alert.incident, "state": alert.state, "target": target})


def sent_before(rows: Iterable[Mapping[str, Any]], target: str) -> dict[str, str]:
    """Return incident -> the state that was last sent to a receiver, from rows of `events`."""
    found: dict[str, tuple[int, str]] = {}
    for row in rows:
        if row["kind"] != SENT:
            continue
        text = json.loads(row["text"])
        if text["target"] == target:
            revision = int(text["id"].rpartition("#")[2])
            found[text["incident"]] = max((revision, text["state"]), found.get(text["incident"], (-1, "")))
    return {incident: state for incident, (_, state) in found.items()}
