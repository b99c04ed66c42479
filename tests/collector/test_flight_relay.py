"""One rank's trigger reaches every rank of its run, once; whoever does not answer is told as missing."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest

from insitu.exporters import Batch
from insitu.exporters.window import Pending
from insitu.records import schema_of
from insitu.wire.insitu_pb2 import Dump, Frame, Hello, ToProbe
from insitu_collector.flight.relay import ANSWER_S, FORGET_S, MOST_OPEN, FlightRelay

RUN = "00112233445566ff"
NOW_NS = 1_800_000_000 * 10**9
S = 10**9


class Rig:
    """A relay with clocks that stand still, the rows it wrote, and what it said to each epoch."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.rows: list[dict[str, Any]] = []
        self.said: dict[int, list[Dump]] = {}
        self.full = False
        self.relay = FlightRelay(self.write, lambda: self.now_s, lambda: int(NOW_NS + (self.now_s - 1000) * S))
        self._pushes: dict[int, Any] = {}
        self._tenants: dict[int, str] = {}
        self._seq = 0

    def write(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        assert table == "incidents"
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        pa.RecordBatch.from_pylist([{**row, "epoch": 0} for row in rows], schema_of(table))  # as it is stored
        self.rows += [dict(row) for row in rows]

    def join(
        self, epoch: int, rank: int, run: str = RUN, replica: int = 0, role: str = "rank", tenant: str = ""
    ) -> None:
        def push(message: ToProbe) -> None:
            self.said.setdefault(epoch, []).append(message.dump)

        self._pushes[epoch] = push
        source = {"run": run, "replica": str(replica), "rank": str(rank), "role": role}
        self._tenants[epoch] = tenant
        self.relay.joined(Hello(protocol=1, epoch=epoch, source=source), push, tenant)

    def beat(self, epoch: int, *, closing: bool) -> None:
        self.take("health", epoch, t_ns=0, closing=closing)

    def leave(self, epoch: int) -> None:
        self.relay.left(epoch, self._pushes[epoch])

    def take(self, table: str, epoch: int, **row: Any) -> Frame:
        self._seq += 1
        full = {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": self._seq, **row}
        batch = Batch(epoch, self._seq, pa.RecordBatch.from_pylist([full], schema=schema_of(table)), table)
        frame = Pending.of(batch).frame()
        self.relay.took(epoch, frame, self._tenants[epoch])
        return frame

    def opened(self, epoch: int, name: str = "aa", at_ns: int = NOW_NS, **more: Any) -> Frame:
        row = {
            "incident": name,
            "state": "opened",
            "run": RUN,
            "reason": "nonfinite",
            "on_rank": 1,
            "on_stage": 1,
            "step_id": 412,
            "site": "L3.mlp_out",
            "trigger_unix_ns": at_ns,
            "window_start_unix_ns": at_ns - 10 * S,
            "window_end_unix_ns": at_ns + 2 * S,
        }
        return self.take("incidents", epoch, **row | more)

    def answer(self, epoch: int, name: str = "aa") -> None:
        times = dict.fromkeys(("trigger_unix_ns", "window_start_unix_ns", "window_end_unix_ns"), NOW_NS)
        self.take("incidents", epoch, incident=name, state="answered", run=RUN, reason="nonfinite", **times)

    def asked_in(self, row: Mapping[str, Any]) -> list[tuple[int, bool]]:
        return [(member["rank"], member["answered"]) for member in row["asked"]]


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.join(10, 0)
    made.join(11, 1)
    made.join(20, 0, run="ffff000011112222")
    made.join(30, -1, role="driver")
    return made


def test_a_trigger_reaches_the_other_ranks_of_its_run_and_their_answers_close_it(rig: Rig) -> None:
    rig.opened(11)
    assert list(rig.said) == [10], "not who told it, nor another run, nor a driver"
    (dump,) = rig.said[10]
    told = [getattr(dump, name) for name in ("incident", "reason", "site", "rank", "stage", "step_id")]
    assert told == ["aa", "nonfinite", "L3.mlp_out", 1, 1, 412]
    assert (dump.start_unix_ns, dump.end_unix_ns) == (NOW_NS - 10 * S, NOW_NS + 2 * S)
    rig.answer(11)
    assert rig.rows == []
    rig.answer(10)
    (closed,) = rig.rows
    assert (closed["incident"], closed["state"], closed["run"]) == ("aa", "closed", RUN)
    assert rig.asked_in(closed) == [(0, True), (1, True)]


def test_whoever_does_not_answer_in_time_is_missing(rig: Rig) -> None:
    rig.opened(11)
    rig.answer(11)
    rig.now_s += 2 + ANSWER_S - 0.1
    rig.relay.look()
    assert rig.rows == []
    rig.now_s += 0.2
    rig.relay.look()
    assert rig.asked_in(rig.rows[0]) == [(0, False), (1, True)]
    rig.answer(10)
    rig.relay.look()
    assert len(rig.rows) == 1, "late: its own row says so"


def test_a_rank_that_died_before_is_missing_and_one_that_took_its_leave_is_not(rig: Rig) -> None:
    rig.join(12, 2)
    for epoch, closing in ((10, False), (12, False), (12, True)):
        rig.beat(epoch, closing=closing)
    rig.leave(10)
    rig.leave(12)
    rig.opened(11)
    rig.answer(11)
    assert rig.said == {}
    rig.now_s += 60
    rig.relay.look()
    assert rig.asked_in(rig.rows[0]) == [(0, False), (1, True)]


def test_a_rank_that_was_started_again_takes_the_place_of_the_one_that_died(rig: Rig) -> None:
    rig.leave(10)
    rig.join(100, 0)
    rig.opened(11)
    rig.answer(11)
    rig.answer(100)
    assert rig.asked_in(rig.rows[0]) == [(0, True), (1, True)]


def test_a_connection_that_broke_long_ago_is_no_rank_any_more(rig: Rig) -> None:
    rig.leave(10)
    rig.now_s += FORGET_S + 1
    rig.join(12, 2)
    rig.opened(11, at_ns=NOW_NS + int((FORGET_S + 1) * S))
    rig.answer(11)
    rig.answer(12)
    assert rig.asked_in(rig.rows[0]) == [(1, True), (2, True)]


def test_a_rank_that_reconnects_before_it_answered_is_asked_again(rig: Rig) -> None:
    rig.opened(11)
    rig.leave(10)
    rig.join(10, 0)
    assert [dump.incident for dump in rig.said[10]] == ["aa", "aa"]
    rig.answer(10)
    rig.leave(10)
    rig.join(10, 0)
    assert len(rig.said[10]) == 2


def test_an_old_connection_that_ends_late_takes_nobody_away(rig: Rig) -> None:
    old = rig._pushes[10]
    rig.join(10, 0)
    rig.relay.left(10, old)
    rig.opened(11)
    assert len(rig.said[10]) == 1


def test_the_same_step_seen_by_two_ranks_and_a_frame_sent_twice_are_one_incident(rig: Rig) -> None:
    frame = rig.opened(11)
    rig.relay.took(11, frame)
    rig.opened(10, at_ns=NOW_NS + S)
    assert {epoch: len(dumps) for epoch, dumps in rig.said.items()} == {10: 1}
    rig.answer(10)
    rig.answer(11)
    assert len(rig.rows) == 1


def test_what_another_rank_opens_in_the_same_stretch_is_a_part_of_it(rig: Rig) -> None:
    rig.opened(11)
    rig.opened(10, "bb", at_ns=NOW_NS + S, reason="exception")
    (part,) = rig.rows
    assert (part["incident"], part["state"], part["part_of"]) == ("bb", "closed", "aa")
    assert list(rig.said) == [10], "nobody is asked twice for one stretch"
    rig.opened(10, "cc", at_ns=NOW_NS + 3 * S)
    assert [dump.incident for dump in rig.said[11]] == ["cc"]


def test_a_run_that_is_stuck_is_asked_once_and_one_that_was_is_not(rig: Rig) -> None:
    verdict = {
        "verdict": "00112233-stuck-r1-1",
        "revision": 0,
        "state": "open",
        "kind": "stuck",
        "on_rank": 1,
        "on_stage": 1,
        "text": "rank 1 is stuck.",
        "remedy": "Look at rank 1.",
        "window_start_unix_ns": NOW_NS - 3 * S,
        "window_end_unix_ns": NOW_NS,
        "detected_unix_ns": NOW_NS,
    }
    rig.take("verdicts", 30, **verdict)
    rig.take("verdicts", 30, **verdict | {"revision": 1})
    assert {epoch: len(dumps) for epoch, dumps in rig.said.items()} == {10: 1, 11: 1}
    dump = rig.said[10][0]
    assert (dump.reason, dump.text, dump.rank) == ("verdict", "rank 1 is stuck.", 1)
    assert dump.start_unix_ns < NOW_NS - 3 * S
    assert rig.rows[0]["state"] == "opened"
    rig.take("verdicts", 30, **verdict | {"verdict": "00112233-stuck-r1-2", "detected_unix_ns": NOW_NS - 3600 * S})
    rig.take("verdicts", 30, **verdict | {"verdict": "00112233-gc_pause-r1-1", "kind": "gc_pause"})
    rig.take("verdicts", 30, **verdict | {"verdict": "00112233-stuck-r1-3", "state": "closed"})
    assert {epoch: len(dumps) for epoch, dumps in rig.said.items()} == {10: 1, 11: 1}


def test_one_tenant_asks_no_other_tenants_ranks_and_silences_none() -> None:
    rig = Rig()
    for epoch, rank, tenant in ((10, 0, "a"), (11, 1, "a"), (20, 0, "b"), (21, 1, "b")):
        rig.join(epoch, rank, tenant=tenant)
    rig.join(30, -1, role="client", tenant="b")
    rig.join(40, -1, role="client")  # the judge, of no tenant
    rig.opened(20, "bb")
    assert list(rig.said) == [21], "a run of the same name is another's"
    rig.said.clear()
    verdict = {
        "verdict": "ffff-stuck-r1-1",
        "revision": 0,
        "state": "open",
        "kind": "stuck",
        "text": "rank 1 is stuck.",
        "remedy": "Look at rank 1.",
        "window_start_unix_ns": NOW_NS - 3 * S,
        "window_end_unix_ns": NOW_NS,
        "detected_unix_ns": NOW_NS,
    }
    rig.join(12, 0, run="ffff000011112222", tenant="a")
    rig.take("verdicts", 30, **verdict)
    assert rig.said == {}, "nor does a verdict that b forged about a run of a's reach it"
    rig.take("verdicts", 40, **verdict)
    assert list(rig.said) == [12], "and the judge is heard after it"


def test_a_full_disk_delays_the_word_and_a_stop_says_what_is_known(rig: Rig) -> None:
    rig.full = True
    rig.opened(11)
    rig.answer(11)
    rig.answer(10)
    rig.relay.look()
    rig.full = False
    rig.relay.look()
    assert rig.asked_in(rig.rows[0]) == [(0, True), (1, True)]
    rig.opened(11, "bb")
    rig.answer(11, "bb")
    rig.relay.finish()
    assert rig.asked_in(rig.rows[1]) == [(0, False), (1, True)]


def test_a_peer_that_sends_nonsense_moves_nobody(rig: Rig) -> None:
    rig.opened(11, at_ns=NOW_NS, trigger_unix_ns=None)
    rig.opened(11, None)  # type: ignore[arg-type]
    assert rig.said == {}
    for number in range(3 * MOST_OPEN):
        rig.opened(11, f"i{number}", at_ns=NOW_NS + number * 60 * S)
    assert len(rig.said[10]) == MOST_OPEN
