"""Who may stream, how fast and how much at once: no clock but the test's, no socket."""

from __future__ import annotations

import threading

import grpc
import pytest
from wait_kit import until

from insitu.intake import Intake, IntakeLimits, Quota, Quotas
from insitu.vocabulary import DropReason, HangUp
from insitu_collector.admission.admission import CUT_S, SILENT_S, SWEEP_S, WINDOW_BYTES, Admission, Rejected, Seat

MIB = 1 << 20


class Desk:
    """An admission with a clock that the test moves, and what its streams were told."""

    def __init__(self, limits: IntakeLimits | None = None, quotas: Quotas | None = None) -> None:
        self.now_s = 100.0
        self.resident = 0
        self.told: list[tuple[str, HangUp]] = []
        intake = Intake(limits or IntakeLimits(), quotas or Quotas())
        self.admission = Admission(intake, lambda: self.now_s, lambda: self.resident)

    def seat(self, tenant: str = "", name: str = "") -> Seat:
        seat = self.admission.seat(tenant, lambda rejected: self.told.append((name, rejected.why)))
        seat.introduced()
        return seat

    def passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.admission.sweep()


def booked(desk: Desk, seat: Seat, num_bytes: int, num_rows: int = 1) -> float | DropReason:
    """Take in a frame and write it at once; return how long it would have waited."""
    found = desk.admission.book(seat, num_bytes, num_rows)
    seat.let_go(num_bytes)
    return found


def test_without_a_quota_nobody_waits() -> None:
    desk = Desk()
    seat = desk.seat()
    assert [booked(desk, seat, 32 * MIB) for _ in range(100)] == [0.0] * 100
    assert seat.window_bytes() == WINDOW_BYTES


def test_over_its_quota_a_tenant_is_slowed_then_refused_and_another_is_not() -> None:
    desk = Desk(IntakeLimits(grace=2.0), Quotas(Quota(bytes_per_s=MIB)))
    flooding, other = desk.seat("a"), desk.seat("b")
    waits = [booked(desk, flooding, MIB) for _ in range(6)]
    assert waits == [0.0, 0.0, 1.0, 2.0, DropReason.REFUSED_QUOTA, DropReason.REFUSED_QUOTA]
    assert flooding.window_bytes() == 1, "one frame at a time"
    assert (booked(desk, other, MIB), other.window_bytes()) == (0.0, MIB)
    desk.passes(3.0)
    assert flooding.window_bytes() == MIB, "a second's worth"
    assert booked(desk, flooding, MIB) == 0.0


@pytest.mark.parametrize("quota", [Quota(rows_per_s=100), Quota(frames_per_s=1)])
def test_rows_and_frames_have_a_quota_too(quota: Quota) -> None:
    desk = Desk(quotas=Quotas(quota))
    seat = desk.seat()
    assert [booked(desk, seat, 10, num_rows=100) for _ in range(3)] == [0.0, 0.0, 1.0]


def test_a_frame_larger_than_a_seconds_quota_gets_through() -> None:
    desk = Desk(quotas=Quotas(Quota(bytes_per_s=MIB)))
    seat = desk.seat()
    assert booked(desk, seat, 32 * MIB) == 0.0
    assert booked(desk, seat, 32 * MIB) is DropReason.REFUSED_QUOTA
    desk.passes(31.0)
    assert booked(desk, seat, 32 * MIB) == 0.0, "tried again, it is let in"


def test_what_a_tenant_and_all_have_in_flight_is_bounded() -> None:
    desk = Desk(IntakeLimits(in_flight=96 * MIB))
    mine, also_mine, other = desk.seat("a"), desk.seat("a"), desk.seat("b")
    assert desk.admission.book(mine, 60 * MIB, 1) == 0.0
    assert desk.admission.book(also_mine, 20 * MIB, 1) is DropReason.REFUSED_QUOTA, "64 MiB a tenant"
    also_mine.let_go(20 * MIB)
    assert desk.admission.book(other, 60 * MIB, 1) is DropReason.REFUSED_MEMORY
    other.let_go(60 * MIB)
    mine.let_go(60 * MIB)
    assert desk.admission.load().in_flight_bytes == 0
    assert booked(desk, other, 60 * MIB) == 0.0


def test_a_single_frame_is_taken_whatever_the_bounds() -> None:
    desk = Desk(quotas=Quotas(Quota(in_flight=MIB)))
    assert booked(desk, desk.seat(), 32 * MIB) == 0.0


def test_windows_are_a_fair_part_of_what_may_be_in_flight() -> None:
    desk = Desk(IntakeLimits(in_flight=64 * MIB), Quotas(by_tenant={"a": Quota(in_flight=4 * MIB)}))
    seats = [desk.seat("a"), desk.seat("a"), *(desk.seat("b") for _ in range(6))]
    assert [seats[0].window_bytes(), seats[2].window_bytes()] == [2 * MIB, 8 * MIB]
    for seat in seats[1:]:
        seat.leave()
    assert seats[0].window_bytes() == 4 * MIB


def test_a_crowd_is_not_received_until_there_is_room() -> None:
    desk = Desk(IntakeLimits(in_flight=64 * MIB))
    holder, waiter = desk.seat(), desk.seat()
    desk.admission.book(holder, 40 * MIB, 1)
    went_on: list[bool] = []
    waiting = threading.Thread(target=lambda: went_on.append(waiter.wait_for_room()))
    waiting.start()
    until(lambda: waiter.is_held_up)
    assert went_on == []
    desk.passes(100.0)
    assert desk.told == [], "who waits for us is not silent"
    holder.let_go(40 * MIB)
    waiting.join(10)
    assert went_on == [True]


def test_who_waits_is_let_go_when_its_stream_ends() -> None:
    desk = Desk(quotas=Quotas(Quota(bytes_per_s=1)))
    holder, crowded, slowed = desk.seat("a"), desk.seat("b"), desk.seat("c")
    desk.admission.book(holder, 200 * MIB, 1)
    booked(desk, slowed, 4)
    ended: list[object] = []
    threads = [
        threading.Thread(target=lambda: ended.append(crowded.wait_for_room())),
        threading.Thread(target=lambda: ended.append(slowed.hold(1, 1))),
    ]
    for thread in threads:
        thread.start()
    until(lambda: crowded.is_held_up and slowed.is_held_up)
    for seat in (crowded, slowed):
        seat.leave()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, ended)) == ["False", "None"]


def test_with_too_much_memory_frames_are_received_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(IntakeLimits(memory=100 * MIB))
    one, two = desk.seat(), desk.seat()
    desk.resident = 101 * MIB
    desk.passes(SWEEP_S)
    assert one.window_bytes() == desk.admission.load().window_bytes == 1
    assert one.wait_for_room(), "whoever is first goes on"
    desk.admission.book(one, 10, 1)
    waiting = threading.Thread(target=two.wait_for_room)
    waiting.start()
    until(lambda: two.is_held_up)
    one.let_go(10)
    waiting.join(10)
    assert not waiting.is_alive()
    desk.resident = 99 * MIB
    desk.passes(SWEEP_S)
    assert one.window_bytes() == WINDOW_BYTES
    assert [record.message for record in caplog.records] == [
        "insitu: 101MiB resident, limit 100MiB: frames are received one at a time",
        "insitu: 99MiB resident, limit 100MiB: frames are received as before",
    ]


def test_more_streams_than_may_be_are_not_let_in_unless_one_was_silent() -> None:
    desk = Desk(IntakeLimits(streams=2))
    first, second = desk.seat(name="first"), desk.seat(name="second")
    with pytest.raises(Rejected, match="there are 2 streams, its limit") as rejected:
        desk.seat()
    assert (rejected.value.code, rejected.value.why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, HangUp.NUM_STREAMS)
    desk.now_s += SILENT_S
    second.heard()
    third = desk.seat(name="third")
    assert desk.told == [("first", HangUp.MADE_ROOM)]
    with pytest.raises(Rejected):
        desk.seat()
    for seat in (first, second, third):
        seat.leave()
    assert desk.admission.load().num_streams == 0


def test_a_tenant_has_its_own_number_of_streams_and_evicts_only_its_own() -> None:
    desk = Desk(quotas=Quotas(by_tenant={"a": Quota(streams=1)}))
    desk.seat("b", "b")
    desk.seat("a", "a")
    with pytest.raises(Rejected, match="you have 1 streams, your quota"):
        desk.seat("a")
    desk.now_s += SILENT_S
    desk.seat("a", "a again")
    assert desk.told == [("a", HangUp.MADE_ROOM)]


def test_streams_that_say_nothing_are_ended_and_then_cut() -> None:
    desk = Desk(IntakeLimits(handshake=5.0, idle=60.0))
    cut: list[str] = []
    mute = desk.admission.seat("", lambda rejected: desk.told.append(("mute", rejected.why)))
    mute.cut = lambda: cut.append("mute")
    silent, alive = desk.seat(name="silent"), desk.seat(name="alive")
    desk.passes(4.5)
    assert desk.told == []
    desk.passes(0.5)
    assert desk.told == [("mute", HangUp.HANDSHAKE)]
    desk.passes(CUT_S)
    assert cut == ["mute"]
    alive.heard()
    desk.passes(50.0)
    assert desk.told[1:] == [("silent", HangUp.IDLE)]
    assert silent.told_s is not None
    assert alive.told_s is None
