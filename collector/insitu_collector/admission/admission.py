"""Who may stream, how fast, and how much at once: quotas of tenants, and bounds of the process.

Nothing waits in a queue here: a stream that may not go on is not read, so that its peer waits by its window.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import grpc

from insitu.intake import Intake
from insitu.segments.retention import bytes_text
from insitu.vocabulary import DropReason, HangUp
from insitu_collector.admission.memory import give_back, resident_bytes
from insitu_collector.admission.tenant import TenantUse

WINDOW_BYTES: Final = 16 << 20
"""The most that a probe may have unacknowledged."""
SILENT_S: Final = 5.0
"""A stream that was silent for so long makes room for another where there is none: probes say something each second."""
CUT_S: Final = 5.0
"""How long a stream that was told to end may take, before it is cut."""
SWEEP_S: Final = 0.25

_log = logging.getLogger("insitu")


class Rejected(Exception):
    """The whole stream is refused."""

    def __init__(self, code: grpc.StatusCode, text: str, why: HangUp) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.why = why


@dataclass(frozen=True, slots=True)
class Load:
    """How much there is at one moment."""

    num_streams: int
    in_flight_bytes: int
    window_bytes: int
    """What the next stream may have unacknowledged; without a quota."""
    is_tight: bool


class Seat:
    """One stream's place. Its reader waits here; any thread may end that."""

    def __init__(self, admission: Admission, tenant: str, hang_up: Callable[[Rejected], None], now_s: float) -> None:
        self.tenant = tenant
        self.is_introduced = False
        """Its Hello came."""
        self.heard_s = now_s
        self.told_s: float | None = None
        """When it was told to end."""
        self.is_held_up = False
        """It waits for us, so that its silence is ours."""
        self.cut: Callable[[], object] = lambda: None
        """Ends the call, whatever the peer does."""
        self.hang_up = hang_up
        self._admission = admission
        self._is_over = threading.Event()

    def heard(self) -> None:
        """A message came."""
        self.heard_s = self._admission.now_s()

    def introduced(self) -> None:
        """Hello came, and was right."""
        self.is_introduced = True
        self.heard()

    def wait_for_room(self) -> bool:
        """Wait until another message may be received; False when the stream is over."""
        return self._admission.wait_for_room(self, self._is_over)

    def hold(self, num_bytes: int, num_rows: int) -> DropReason | None:
        """Take in a frame that was received, and wait for the quota; return why it has to come again later, if so.

        `let_go` follows in any case.
        """
        found = self._admission.book(self, num_bytes, num_rows)
        if isinstance(found, DropReason):
            return found
        self._is_over.wait(found)
        return None

    def let_go(self, num_bytes: int) -> None:
        """The frame is written, or refused."""
        self._admission.release(self, num_bytes)

    def window_bytes(self) -> int:
        """Return how much the peer may have unacknowledged from now on."""
        return self._admission.window_bytes(self.tenant)

    def end(self) -> None:
        """Nobody waits here any longer. Any thread; more than once does no harm."""
        self._is_over.set()
        self._admission.wake()

    def leave(self) -> None:
        """The call has ended."""
        self.end()
        self._admission.left(self)


class Admission:
    """Gives seats, and keeps count. Safe for several threads."""

    def __init__(
        self,
        intake: Intake | None = None,
        clock: Callable[[], float] = time.monotonic,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        """clock: seconds. resident: this process's memory in bytes."""
        intake = intake or Intake()
        self.limits = intake.limits
        self.now_s = clock
        self._quotas = intake.quotas
        self._resident = resident
        self._changed = threading.Condition()
        self._tenants: dict[str, TenantUse] = {}
        self._seats: set[Seat] = set()
        self._in_flight = 0
        self._is_tight = False
        self._next_sweep_s = -1.0

    # -- streams ---------------------------------------------------------------------------------------------------

    def seat(self, tenant: str, hang_up: Callable[[Rejected], None]) -> Seat:
        """Return a place for one more stream of a tenant. Raises Rejected when there is none.

        hang_up: ends that stream, from any thread, without waiting.
        """
        with self._changed:
            of_tenant = self._tenant(tenant)
            mine = [seat for seat in self._sitting() if seat.tenant == tenant]
            evicted = self._make_room(mine, of_tenant.quota.streams, "you have", "your quota")
            evicted = evicted or self._make_room(self._sitting(), self.limits.streams, "there are", "its limit")
            seat = Seat(self, tenant, hang_up, self.now_s())
            self._seats.add(seat)
        if evicted is not None:
            text = "another stream needed the place of one that was silent"
            evicted.hang_up(Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, text, HangUp.MADE_ROOM))
        return seat

    def _make_room(self, seats: Iterable[Seat], most: int, who: str, what: str) -> Seat | None:
        """Return the stream that has to go so that there are fewer than `most`, if any. Raises Rejected."""
        taken = list(seats)
        if len(taken) < most:
            return None
        longest = min(taken, key=lambda seat: seat.heard_s)
        if self.now_s() - longest.heard_s < SILENT_S or longest.is_held_up:
            text = f"{who} {len(taken)} streams, {what}; end one, or raise it with `insitu collect` (docs/collector.md)"
            raise Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, text, HangUp.NUM_STREAMS)
        longest.told_s = self.now_s()
        return longest

    def _sitting(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.told_s is None]

    def left(self, seat: Seat) -> None:
        """A stream has ended."""
        with self._changed:
            self._seats.discard(seat)
            tenant = self._tenants.get(seat.tenant)
            is_last = all(other.tenant != seat.tenant for other in self._seats)
            if is_last and tenant is not None and not tenant.in_flight and not tenant.wait_s(self.now_s()):
                del self._tenants[seat.tenant]

    def sweep(self) -> None:
        """End streams that say nothing, and look at this process's memory. Called every now and then."""
        now = self.now_s()
        if now < self._next_sweep_s:
            return
        self._next_sweep_s = now + SWEEP_S
        self._look_at_memory()
        with self._changed:
            seats = list(self._seats)
        for seat in seats:
            if seat.told_s is not None:
                if now - seat.told_s >= CUT_S:
                    seat.cut()
            elif (rejected := self._overdue(seat, now)) is not None:
                seat.told_s = now
                seat.hang_up(rejected)

    def _overdue(self, seat: Seat, now: float) -> Rejected | None:
        silent_s = 0.0 if seat.is_held_up else now - seat.heard_s
        if not seat.is_introduced and silent_s >= self.limits.handshake:
            text = f"no Hello within {self.limits.handshake:g} s"
            return Rejected(grpc.StatusCode.DEADLINE_EXCEEDED, text, HangUp.HANDSHAKE)
        if silent_s >= max(self.limits.idle, self.limits.handshake):
            text = f"nothing came for {self.limits.idle:g} s; a probe says something each second"
            return Rejected(grpc.StatusCode.DEADLINE_EXCEEDED, text, HangUp.IDLE)
        return None

    # -- frames ----------------------------------------------------------------------------------------------------

    def wait_for_room(self, seat: Seat, is_over: threading.Event) -> bool:
        """Wait until one more frame may be received; False when the stream is over."""
        with self._changed:
            if self._is_crowded():
                seat.is_held_up = True
                self._changed.wait_for(lambda: is_over.is_set() or not self._is_crowded())
                seat.is_held_up = False
                seat.heard()
        return not is_over.is_set()

    def _is_crowded(self) -> bool:
        """Whoever waits holds nothing, so those who hold something go on, and it ends."""
        return self._in_flight > 0 if self._is_tight else self._in_flight >= self.limits.in_flight // 2

    def book(self, seat: Seat, num_bytes: int, num_rows: int) -> float | DropReason:
        """Count a frame that was received; return how long it has to wait, or why it has to come again later."""
        with self._changed:
            tenant, now = self._tenant(seat.tenant), self.now_s()
            seat.is_held_up = True
            others, others_of_tenant = self._in_flight, tenant.in_flight
            self._in_flight += num_bytes
            tenant.in_flight += num_bytes
            if others and self._in_flight > self.limits.in_flight:
                return DropReason.REFUSED_MEMORY
            if others_of_tenant and tenant.in_flight > tenant.quota.in_flight:
                return DropReason.REFUSED_QUOTA
            wait_s = tenant.wait_s(now)
            if wait_s > self.limits.grace:
                return DropReason.REFUSED_QUOTA
            tenant.book(num_bytes, num_rows, now)
            return wait_s

    def release(self, seat: Seat, num_bytes: int) -> None:
        """A frame that was booked is in memory no longer."""
        with self._changed:
            self._in_flight -= num_bytes
            self._tenant(seat.tenant).in_flight -= num_bytes
            seat.is_held_up = False
            seat.heard()
            self._changed.notify_all()

    # -- requests that are no stream's -----------------------------------------------------------------------------

    def take(self, name: str, num_bytes: int) -> DropReason | None:
        """Count bytes of a tenant's request that are received; return why there is no room for them, if so.

        `give` follows, unless a reason was returned.
        """
        with self._changed:
            tenant = self._tenant(name)
            others = self._in_flight
            if others and (self._is_tight or others + num_bytes > self.limits.in_flight):
                return DropReason.REFUSED_MEMORY
            if tenant.in_flight and tenant.in_flight + num_bytes > tenant.quota.in_flight:
                return DropReason.REFUSED_QUOTA
            self._in_flight += num_bytes
            tenant.in_flight += num_bytes
            return None

    def give(self, name: str, num_bytes: int) -> None:
        """They are in memory no longer."""
        with self._changed:
            self._in_flight -= num_bytes
            self._tenant(name).in_flight -= num_bytes
            self._changed.notify_all()

    def charge(self, name: str, num_bytes: int, num_rows: int) -> float:
        """Book a whole request, and return 0; or book nothing, and return how long its tenant has to wait."""
        with self._changed:
            tenant, now = self._tenant(name), self.now_s()
            wait_s = tenant.wait_s(now)
            if not wait_s:
                tenant.book(num_bytes, num_rows, now)
            return wait_s

    def window_bytes(self, name: str) -> int:
        """Return how much one stream of a tenant may have unacknowledged; at least 1: one frame.

        It is a fair part of what may be in flight and of what the quota gives in a second; beyond that, one frame.
        """
        with self._changed:
            tenant = self._tenant(name)
            if self._is_tight or tenant.wait_s(self.now_s()) > 0:
                return 1
            num_mine = max(1, sum(seat.tenant == name for seat in self._seats))
            most = [WINDOW_BYTES, self.limits.in_flight // max(1, len(self._seats)), tenant.quota.in_flight // num_mine]
            if tenant.quota.bytes_per_s is not None:
                most.append(tenant.quota.bytes_per_s // num_mine)
            return max(1, min(most))

    def wake(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def load(self) -> Load:
        """Return how much there is now."""
        with self._changed:
            share = 1 if self._is_tight else self.limits.in_flight // max(1, len(self._seats))
            return Load(len(self._seats), self._in_flight, min(WINDOW_BYTES, share), self._is_tight)

    def _tenant(self, name: str) -> TenantUse:
        if name not in self._tenants:
            self._tenants[name] = TenantUse(self._quotas.of(name), self.now_s())
        return self._tenants[name]

    def _look_at_memory(self) -> None:
        most = self.limits.memory
        if most is None:
            return
        resident = self._resident()
        is_tight = resident > most
        if is_tight:
            give_back()
        if is_tight != self._is_tight:
            words = f"{bytes_text(resident >> 20 << 20)} resident, limit {bytes_text(most)}"
            what = "frames are received one at a time" if is_tight else "frames are received as before"
            _log.warning("insitu: %s: %s", words, what)
        with self._changed:
            self._is_tight = is_tight
            self._changed.notify_all()
