"""What flight recorders shipped, incident by incident: the rows of `incidents` put together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from insitu.vocabulary import IncidentState, Reason

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one process shipped of an incident."""

    epoch: int
    replica: int
    rank: int
    stage: int
    first_step_id: int | None
    last_step_id: int | None
    since_unix_ns: int | None
    """When the first step began of which anything was held; None: nothing was."""
    window_end_unix_ns: int
    """Earlier than the incident's where the process ended first."""
    num_summaries: int
    num_full_steps: int
    """Steps with raw rows."""
    rows_since_unix_ns: int | None
    num_captures: int
    num_steps_without_rows: int
    """Steps whose rows were wanted and not held: there was no room."""
    num_further: int
    further: list[str]
    """Other triggers while it was open, the first few."""


@dataclass(frozen=True, slots=True)
class FlightIncident:
    """A window of full detail, and which ranks it is whole of."""

    incident: str
    run: str
    reason: str
    text: str
    on_rank: int | None
    on_stage: int | None
    step_id: int | None
    site: str | None
    trigger_unix_ns: int
    window_unix_ns: tuple[int, int]
    answers: list[Answer]
    asked: list[tuple[int, int]] | None
    """(replica, rank) of every rank that the collector asked; None: it asked none, or never said."""
    missing: list[tuple[int, int]]
    """Those that were asked and have not answered."""
    num_suppressed: int
    """Triggers of this reason in the process that opened it, until then, that opened none."""
    parts: list[str]
    """Incidents that other ranks opened in the same stretch."""

    @property
    def num_captures(self) -> int:
        return sum(answer.num_captures for answer in self.answers)

    @property
    def num_summaries(self) -> int:
        return sum(answer.num_summaries for answer in self.answers)

    def to_json(self) -> Row:
        """Return it as in `insitu.incidents/1`."""
        ranks = {"asked": self.asked or [], "missing": self.missing}
        named = {name: [{"replica": p, "rank": r} for p, r in places] for name, places in ranks.items()}
        return {
            **asdict(self),
            **named,
            "asked": None if self.asked is None else named["asked"],
            "text": self.sentence(),
        }

    def sentence(self) -> str:
        """Return what happened and what there is of it, as a sentence or two."""
        return f"{self._what()}. {self._kept()}{self._who()}"

    def _what(self) -> str:
        at = "" if self.step_id is None else f" in step {self.step_id}"
        where = "" if self.on_rank is None or self.on_rank < 0 else f" on rank {self.on_rank}, stage {self.on_stage}"
        if self.reason == Reason.NONFINITE:
            return f"A value that is not finite at {self.site}{at}{where}"
        if self.reason == Reason.SLOW_STEP:
            return f"A slow step{f' {self.step_id}' if self.step_id is not None else ''}{where}: {self.text}"
        if self.reason == Reason.EXCEPTION:
            return f"{self.text} left the model{at}{where}"
        if self.reason == Reason.SIGNAL:
            return f"{self.text} came{where}"
        if self.reason == Reason.ASKED:
            return f"Asked for{where}: {self.text}"
        return self.text.rstrip(".") or self.reason

    def _kept(self) -> str:
        since = [answer.since_unix_ns for answer in self.answers if answer.since_unix_ns is not None]
        if not since:
            return "Nothing was held of it beyond what the store has anyway"
        before_s = max(0.0, (self.trigger_unix_ns - min(since)) / 1e9)
        end_ns = max(answer.window_end_unix_ns for answer in self.answers)
        after_s = max(0.0, (end_ns - self.trigger_unix_ns) / 1e9)
        rows = f"{self.num_captures} rows and " if self.num_captures else ""
        return f"{rows}{self.num_summaries} canaries are kept, from {before_s:.1f} s before to {after_s:.1f} s after"

    def _who(self) -> str:
        if self.asked is None:
            ranks = ", ".join(str(answer.rank) for answer in self.answers)
            return f"; of rank {ranks} alone: no collector asked the others." if ranks else "; nobody has answered yet."
        answered = f"; {len(self.asked) - len(self.missing)} of {len(self.asked)} ranks answered"
        if not self.missing:
            return f"{answered}."
        many = len({replica for replica, _ in self.asked}) > 1
        named = ", ".join(f"{f'{replica}/' if many else ''}{rank}" for replica, rank in self.missing)
        return f"{answered}, rank {named} did not."


def incidents_of(rows: pa.Table, sources: pa.Table) -> list[FlightIncident]:
    """Return the incidents of the tables `incidents` and `sources`, the first trigger first.

    One that another rank opened within the window of an earlier one is a part of that.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows.to_pylist():
        if row["incident"] is not None and row["run"] is not None and row["trigger_unix_ns"] is not None:
            found.setdefault((row["run"], row["incident"]), []).append(row)
    replicas = {row["epoch"]: row["replica"] or 0 for row in sources.select(["epoch", "replica"]).to_pylist()}
    parts: dict[tuple[str, str], list[str]] = {}
    for (run, name), told in found.items():
        for whole in {row["part_of"] for row in told} - {None}:
            if (run, whole) in found:
                parts.setdefault((run, whole), []).append(name)
    inside = {(run, name) for (run, _), names in parts.items() for name in names}
    whole_ones = [
        _incident(told, sorted(parts.get(key, [])), replicas) for key, told in found.items() if key not in inside
    ]
    return sorted(whole_ones, key=lambda incident: incident.trigger_unix_ns)


def _incident(told: Sequence[Row], parts: list[str], replicas: dict[int, int]) -> FlightIncident:
    order = {IncidentState.OPENED: 0, IncidentState.CLOSED: 1, IncidentState.ANSWERED: 2}
    first = min(told, key=lambda row: (order.get(row["state"], 3), row["trigger_unix_ns"]))
    answers = {row["epoch"]: _answer(row, replicas) for row in told if row["state"] == IncidentState.ANSWERED}
    asked = next((row["asked"] for row in told if row["asked"] is not None), None)
    missing = [m for m in asked or () if not m["answered"] and m["epoch"] not in answers]
    return FlightIncident(
        incident=first["incident"],
        run=first["run"],
        reason=first["reason"] or "",
        text=first["text"] or "",
        on_rank=first["on_rank"],
        on_stage=first["on_stage"],
        step_id=first["step_id"],
        site=first["site"],
        trigger_unix_ns=first["trigger_unix_ns"],
        window_unix_ns=(first["window_start_unix_ns"], first["window_end_unix_ns"]),
        answers=sorted(answers.values(), key=lambda answer: (answer.replica, answer.rank)),
        asked=None if asked is None else [_place(member) for member in asked],
        missing=[_place(member) for member in missing],
        num_suppressed=first["num_suppressed"] or 0,
        parts=parts,
    )


def _place(member: Row) -> tuple[int, int]:
    return member["replica"], member["rank"]


def _answer(row: Row, replicas: dict[int, int]) -> Answer:
    counts = ("num_summaries", "num_full_steps", "num_captures", "num_steps_without_rows", "num_further")
    return Answer(
        epoch=row["epoch"],
        replica=replicas.get(row["epoch"], 0),
        rank=row["rank"],
        stage=row["stage"],
        first_step_id=row["first_step_id"],
        last_step_id=row["last_step_id"],
        since_unix_ns=row["since_unix_ns"],
        window_end_unix_ns=row["window_end_unix_ns"],
        rows_since_unix_ns=row["rows_since_unix_ns"],
        further=row["further"] or [],
        **{name: row[name] or 0 for name in counts},
    )
