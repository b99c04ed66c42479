"""One rank's incident becomes every rank's: passes a trigger on to all ranks of its run, and writes who answered.

Whatever opens an incident comes as an ordinary row: of `incidents` from the rank that triggered, of `verdicts` from the
judge. What it leads to is written like any other row, too.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from insitu.records import table_spec
from insitu.vocabulary import IncidentState, Reason, Role, VerdictKind
from insitu.wire.insitu_pb2 import Dump, Frame, Hello, ToProbe
from insitu_collector.service.frame_check import checked_batch
from insitu_collector.verdicts.finding import OPEN

ANSWER_S: Final = 15.0
"""How long after the end of a window a rank may take to ship what it held of it."""
FORGET_S: Final = 600.0
"""A rank whose connection broke so long ago is no rank of its run any more."""
BEFORE_VERDICT_NS: Final = 5_000_000_000
AFTER_VERDICT_NS: Final = 1_000_000_000
"""What is asked for around a verdict: from before its window to after the judge saw it."""
OLD_NS: Final = 30_000_000_000
"""A window that ended longer ago is held by nobody any more: a judge that catches up asks for nothing."""
MOST_OPEN: Final = 16
"""Incidents at a time for which ranks are asked; further ones are their own rank's alone."""
MOST_REMEMBERED: Final = 1024

_INCIDENTS: Final = table_spec("incidents").stream
_VERDICTS: Final = table_spec("verdicts").stream
_HEALTH: Final = table_spec("health").stream
_SAME: Final = ("incident", "reason", "text", "on_rank", "on_stage", "step_id", "site")
_TIMES: Final = ("trigger_unix_ns", "window_start_unix_ns", "window_end_unix_ns")

_log = logging.getLogger("insitu")

Row = dict[str, Any]
Push = Callable[[ToProbe], None]


@dataclass(slots=True)
class Member:
    """A rank that has connected and has not taken its leave."""

    epoch: int
    run: str
    replica: int
    rank: int
    push: Push | None
    """Sends to it; None while its connection is broken."""
    broken_s: float = 0.0
    tenant: str = ""
    beat: Frame | None = None
    """Its last row of `health`: the very last of a process says so."""

    @property
    def place(self) -> tuple[str, int, int]:
        return self.run, self.replica, self.rank

    @property
    def is_closed(self) -> bool:
        """True when its process has said that it ends. How its connection ended tells nothing: a process that was
        killed may look like one that has said all it had to say."""
        if self.beat is None:
            return False
        said: list[bool | None] = checked_batch(self.epoch, self.beat).data.column("closing").to_pylist()
        return said[-1:] == [True]


@dataclass(slots=True)
class Asked:
    """An incident whose ranks were asked."""

    row: Row
    tenant: str
    dump: Dump
    members: list[Member]
    until_s: float
    answered: set[int] = field(default_factory=set)
    """Epochs."""

    @property
    def is_whole(self) -> bool:
        return all(member.epoch in self.answered for member in self.members)

    def closed(self) -> Row:
        """Return the row that says who answered."""
        asked = [
            {"epoch": m.epoch, "replica": m.replica, "rank": m.rank, "answered": m.epoch in self.answered}
            for m in sorted(self.members, key=lambda member: member.place)
        ]
        return {**self.row, "state": str(IncidentState.CLOSED), "asked": asked}


class FlightRelay:
    """Knows the ranks that are connected, and the incidents that are open. Safe for several threads."""

    def __init__(
        self,
        write: Callable[[str, Sequence[Row]], None],
        clock: Callable[[], float] = time.monotonic,
        unix_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """write: takes rows of a table; raises OSError where it cannot now. clock: seconds."""
        self._write = write
        self._clock = clock
        self._unix_clock_ns = unix_clock_ns
        self._lock = threading.RLock()
        self._members: dict[int, Member] = {}
        self._open: dict[str, Asked] = {}
        self._known: deque[tuple[str, str]] = deque(maxlen=MOST_REMEMBERED)
        """Incidents and verdicts that nobody is asked about again, and whose: one tenant's word silences no other's."""
        self._owed: list[Row] = []
        """Rows for which there was no room."""

    # -- connections ---------------------------------------------------------------------------------------------

    def joined(self, hello: Hello, push: Push, tenant: str = "") -> None:
        """A process of a tenant has said who it is. A rank that was asked and has not answered is asked again.

        It may not know.
        """
        source = hello.source
        if source.get("role") != Role.RANK:
            return
        try:
            place = source["run"], int(source["replica"]), int(source["rank"])
        except (KeyError, ValueError):
            return
        with self._lock:
            now = self._clock()
            for old in [m for m in self._members.values() if m.push is None]:
                if (old.tenant, old.place) == (tenant, place) or now - old.broken_s > FORGET_S:
                    del self._members[old.epoch]
            self._members[hello.epoch] = Member(hello.epoch, *place, push, tenant=tenant)
            for asked in self._open.values():
                epochs = {member.epoch for member in asked.members} - asked.answered
                if hello.epoch in epochs:
                    push(ToProbe(dump=asked.dump))

    def left(self, epoch: int | None, push: Push) -> None:
        """A connection is over. A process that has taken its leave is a rank of its run no more."""
        with self._lock:
            member = self._members.get(-1 if epoch is None else epoch)
            if member is None or member.push != push:  # it has connected anew meanwhile
                return
            if member.is_closed:
                del self._members[member.epoch]
            else:
                member.push, member.broken_s = None, self._clock()

    # -- records -------------------------------------------------------------------------------------------------

    def took(self, epoch: int, frame: Frame, tenant: str = "") -> None:
        """A frame of a tenant's was stored, perhaps not for the first time. Nobody asks another tenant's ranks.

        Who has no tenant is the collector's owner, whose judge speaks of the runs of all.
        """
        member = self._members.get(epoch) if frame.stream == _HEALTH else None
        if member is not None:
            member.beat = frame
        if frame.stream not in (_INCIDENTS, _VERDICTS):
            return
        rows = checked_batch(epoch, frame).data.to_pylist()
        with self._lock:
            for row in rows:
                if frame.stream == _VERDICTS:
                    self._take_verdict(row, tenant)
                elif None in (row["incident"], row["run"], *(row[name] for name in _TIMES)):
                    continue
                elif row["state"] == IncidentState.OPENED:
                    self._take_opened(row, tenant)
                elif row["state"] == IncidentState.ANSWERED:
                    self._take_answered(row)

    def _take_opened(self, row: Row, tenant: str) -> None:
        if (tenant, row["incident"]) in self._known:
            return
        self._known.append((tenant, row["incident"]))
        told = {name: row[name] for name in ("run", *_SAME, *_TIMES)}
        within = self._open_at(row["run"], tenant, row["trigger_unix_ns"])
        if within is not None:  # all ranks ship that stretch already
            self._tell([told | {"state": str(IncidentState.CLOSED), "part_of": within.row["incident"]}])
            return
        self._ask(told, tenant, {row["epoch"]})

    def _take_verdict(self, row: Row, tenant: str) -> None:
        name, end_ns = row["verdict"] or "", (row["detected_unix_ns"] or 0) + AFTER_VERDICT_NS
        if row["kind"] != VerdictKind.STUCK or row["state"] != OPEN or (tenant, name) in self._known:
            return
        self._known.append((tenant, name))
        prefix = name.partition("-")[0].partition(".")[0]
        of_run = (member for member in self._members.values() if member.run.startswith(prefix))
        member = next((member for member in of_run if tenant in ("", member.tenant)), None)
        if member is None or end_ns < self._unix_clock_ns() - OLD_NS:
            return
        run = member.run
        if self._open_at(run, member.tenant, end_ns) is not None:
            return
        begin_ns = (row["window_start_unix_ns"] or end_ns) - BEFORE_VERDICT_NS
        opened = {
            "run": run,
            "incident": hashlib.sha256(name.encode()).hexdigest()[:16],
            "reason": str(Reason.VERDICT),
            **{column: row[column] for column in ("text", "on_rank", "on_stage", "step_id", "site")},
            "trigger_unix_ns": row["detected_unix_ns"],
            "window_start_unix_ns": begin_ns,
            "window_end_unix_ns": end_ns,
        }
        self._tell([opened | {"state": str(IncidentState.OPENED)}])
        self._ask(opened, member.tenant, set())

    def _take_answered(self, row: Row) -> None:
        asked = self._open.get(row["incident"])
        if asked is not None:
            asked.answered.add(row["epoch"])
            self._close_those_over()

    def _open_at(self, run: str, tenant: str, unix_ns: int) -> Asked | None:
        for asked in self._open.values():
            if (asked.tenant, asked.row["run"]) == (
                tenant,
                run,
            ) and asked.dump.start_unix_ns <= unix_ns <= asked.dump.end_unix_ns:
                return asked
        return None

    def _ask(self, row: Row, tenant: str, openers: set[int]) -> None:
        if len(self._open) >= MOST_OPEN:
            return
        dump = Dump(
            incident=row["incident"],
            reason=row["reason"],
            text=row["text"] or "",
            trigger_unix_ns=row["trigger_unix_ns"],
            start_unix_ns=row["window_start_unix_ns"],
            end_unix_ns=row["window_end_unix_ns"],
            rank=row["on_rank"],
            stage=row["on_stage"],
            step_id=row["step_id"],
            site=row["site"] or "",
        )
        whose = tenant, row["run"]
        members = [member for member in self._members.values() if (member.tenant, member.run) == whose]
        left_s = max(0.0, (row["window_end_unix_ns"] - self._unix_clock_ns()) / 1e9)
        self._open[row["incident"]] = Asked(
            row, tenant, dump, members, self._clock() + min(left_s, FORGET_S) + ANSWER_S
        )
        for member in members:
            if member.push is not None and member.epoch not in openers:
                member.push(ToProbe(dump=dump))
        _log.info("insitu: incident %s (%s): %d ranks are asked", row["incident"], row["reason"], len(members))

    # -- time ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Close what every rank has answered, and what has waited long enough."""
        with self._lock:
            self._close_those_over()
            owed, self._owed = self._owed, []
            self._tell(owed)

    def finish(self) -> None:
        """The collector ends: write who has answered so far."""
        with self._lock:
            self._close(list(self._open.values()))

    def _close_those_over(self) -> None:
        now = self._clock()
        self._close([asked for asked in self._open.values() if asked.is_whole or asked.until_s <= now])

    def _close(self, over: Iterable[Asked]) -> None:
        for asked in over:
            del self._open[asked.row["incident"]]
            self._tell([asked.closed()])
            silent = sorted(member.place for member in asked.members if member.epoch not in asked.answered)
            missing = ", ".join(str(rank) for _, _, rank in silent)
            said = f"rank {missing} did not answer" if silent else "every rank answered"
            _log.info("insitu: incident %s: %s", asked.row["incident"], said)

    def _tell(self, rows: list[Row]) -> None:
        try:
            if rows:
                self._write("incidents", rows)
        except OSError:  # no room now: at the next look, perhaps
            self._owed += rows
