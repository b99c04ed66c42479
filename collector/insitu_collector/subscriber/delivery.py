"""Bringing requests to one receiver: again and again, in halves, or to the dead letters. One thread, one at a time.

It waits as long as it has to: what waits is in the store, not here.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final

from insitu_collector.subscriber.account import TAKING, Account
from insitu_collector.subscriber.answers import Answer, Outcome
from insitu_collector.subscriber.dead import DeadLetters
from insitu_collector.subscriber.ends import End
from insitu_collector.subscriber.pace import Pace
from insitu_collector.subscriber.payloads import Payload, halves

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""Pauses double from the first to the longest, each cut at random to half: receivers that come back are not met by all
at once."""
SLOW_PAUSE_S: Final = 60.0
"""Where somebody has to do something first."""
HELD_EVENT: Final = "otlp_held"
"""`events.kind`: a receiver does not let us in, or cannot be trusted. Once, until it takes requests again."""

_log = logging.getLogger("insitu")

Wait = Callable[[float], bool]
"""Waits so many seconds; returns whether it was asked to stop."""
Tell = Callable[[str, str], None]
"""Takes kind and text of a row of `events`."""


class GaveUp(Exception):
    """The receiver took nothing for as long as it was given."""


class Delivery:
    """The way to one receiver."""

    def __init__(
        self,
        name: str,
        end: End,
        dead: DeadLetters,
        account: Account,
        *,
        pace: Pace,
        wait: Wait,
        tell: Tell,
        give_up_s: float | None = None,
        unwanted: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """name: of the receiver, for people. give_up_s: how long it may take nothing before `GaveUp`; None: for ever.
        unwanted: signals that it is not sent."""
        self._name = name
        self._end = end
        self._dead = dead
        self._account = account
        self._pace = pace
        self._wait = wait
        self._tell = tell
        self.changed: Callable[[], None] = lambda: None
        """Called when the account's state changed."""
        self._give_up_s = give_up_s
        self._unwanted = unwanted
        self._clock = clock
        self._jitter = jitter
        self._failing = ""
        """The reason of the last attempts; "" while requests are settled."""
        self._rejection = ""

    def deliver(self, payload: Payload) -> bool:
        """Return once a request is settled: taken, left out, or among the dead letters. False: asked to stop first.

        Raises GaveUp.
        """
        if payload.signal in self._unwanted:
            self._account.left_out[payload.signal] += payload.num_items
            return True
        parts = [payload]
        while parts:
            answer = self._settle(parts[-1])
            if answer is None:
                return False
            part = parts.pop()
            if answer.outcome is Outcome.SPLIT and part.num_items > 1:
                self._account.num_split += 1
                parts += reversed(halves(part))
            elif answer.outcome is Outcome.TAKEN:
                self._took(part, answer)
            elif not self._bury(part, answer):
                return False
        return True

    def _settle(self, payload: Payload) -> Answer | None:
        """Return the answer that is one for good; None where asked to stop first."""
        began_s, attempt = self._clock(), 0
        while True:
            while (pause_s := self._pace.wait_s()) > 0:
                if self._wait(pause_s):
                    return None
            self._pace.spend(len(payload.body))
            answer = self._end.send(payload)
            if answer.outcome not in (Outcome.AGAIN, Outcome.HELD):
                self._recovered()
                return answer
            self._failed(answer)
            if self._give_up_s is not None and self._clock() - began_s >= self._give_up_s:
                raise GaveUp(_why(answer))
            if self._wait(pause_after(answer, attempt, self._jitter())):
                return None
            attempt += 1

    def _took(self, payload: Payload, answer: Answer) -> None:
        num_rejected = min(answer.num_rejected, payload.num_items)
        self._account.took(payload.signal, payload.num_items - num_rejected, len(payload.body))
        if num_rejected or answer.text:
            self._account.rejected(payload.signal, num_rejected, answer.text)
            if answer.text != self._rejection or not self._rejection:
                self._rejection = answer.text or "no reason given"
                _log.warning(
                    "insitu: %s rejects %d of %d %s: %s",
                    *(self._name, num_rejected, payload.num_items, payload.signal, self._rejection),
                )

    def _bury(self, payload: Payload, answer: Answer) -> bool:
        """Put a request among the dead letters; False where asked to stop while there is no room for it."""
        attempt = 0
        while True:
            try:
                num_gone = self._dead.put(payload, answer.reason, answer.text)
                break
            except OSError as error:
                if not attempt:
                    _log.error("insitu: a dead letter cannot be kept (%s); nothing more is sent until it can", error)
                if self._wait(pause_after(answer, attempt, self._jitter())):
                    return False
                attempt += 1
        if self._account.buried(payload.signal, payload.num_items, answer.reason, num_gone):
            said = f"{self._name} refuses {payload.signal}: {answer.reason} {answer.text}".strip()
            _log.error("insitu: %s; see `insitu store dead ls STORE`", said)
        return True

    def _failed(self, answer: Answer) -> None:
        self._account.num_retried += 1
        if answer.reason == self._failing:
            return
        self._failing = answer.reason
        said = f"{self._name} takes nothing ({_why(answer)})"
        self._account.state(str(answer.outcome), said)
        _log.warning("insitu: %s; what it has not taken stays in the store and is sent when it does", said)
        self.changed()
        if answer.outcome is Outcome.HELD:
            self._tell(HELD_EVENT, said)

    def _recovered(self) -> None:
        if self._failing:
            self._failing = ""
            self._account.state(TAKING, "")
            self.changed()
            _log.warning("insitu: %s takes requests again", self._name)


def _why(answer: Answer) -> str:
    return f"{answer.reason}: {answer.text}" if answer.text else answer.reason


def pause_after(answer: Answer, attempt: int, jitter: float) -> float:
    """Return how long to wait after an attempt, the first being 0. jitter: from 0 to 1."""
    pause_s = (
        SLOW_PAUSE_S
        if answer.outcome is Outcome.HELD
        else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt, 16))
    )
    return max(answer.after_s, pause_s * (0.5 + 0.5 * jitter))
