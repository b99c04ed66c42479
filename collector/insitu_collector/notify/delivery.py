"""Bringing alerts to one receiver: a bounded queue and a thread, so that judging never waits for anybody.

What cannot be sent is tried again, later each time, until it is too old to be of use; the first failure and the
recovery are said, all are counted. What a judge did not get rid of before it stopped, its successor sends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from insitu_collector.notify.alerts import GIVEN_UP, SENT, Alert, outcome
from insitu_collector.verdicts.finding import CLOSED

_log = logging.getLogger("insitu")

MOST_QUEUED: Final = 1_000
"""Alerts that may wait for one receiver; more are counted as `dropped`."""
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
"""Pauses between attempts double from the first to the longest; each is cut at random to half, so that receivers that
come back are not met by everybody at once."""
CLOSE_S: Final = 2.0
"""How long a judge that ends waits for what is still queued."""
LET_GO_S: Final = 0.5

Tell = Callable[[str, str], None]
"""Takes kind and text of a row of `events`; from any thread."""


class Unsent(Exception):
    """A receiver did not take an alert. `again`: it may later, not sooner than `after_s`."""

    def __init__(self, why: str, *, again: bool, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.again = again
        self.after_s = after_s


class Receiver(Protocol):
    """Who gets alerts. Called by one thread."""

    @property
    def target(self) -> str:
        """Its name in rows and lines: the same after a restart, and without anything secret."""
        ...

    def send(self, alert: Alert) -> None:
        """Return once the alert was taken. Raises `Unsent`, and within seconds."""
        ...

    def close(self) -> None:
        """Let go; an attempt under way ends soon. Any thread."""
        ...


class Delivery:
    """The way to one receiver. `put` and `counts` from any thread."""

    def __init__(
        self,
        receiver: Receiver,
        tell: Tell,
        before: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], int] = time.time_ns,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """before: incident -> the state that was sent last, by an earlier judge. clock: Unix, ns."""
        self.target = receiver.target
        self._receiver = receiver
        self._tell = tell
        self._sent = dict(before or {})
        self._clock = clock
        self._jitter = jitter
        self._queue: deque[Alert] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._abandoned = threading.Event()
        self._failing = False
        self._counts: Counter[str] = Counter(sent=0, failed=0, given_up=0, dropped=0)
        self._thread = threading.Thread(target=self._run, name=f"insitu-alerts-{self.target}", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """Return how many alerts were `sent`, `given_up` and `dropped`, and how many attempts `failed`."""
        with self._changed:
            return dict(self._counts)

    def put(self, alert: Alert) -> None:
        """Queue an alert; never waits."""
        with self._changed:
            if len(self._queue) < MOST_QUEUED:
                self._queue.append(alert)
                self._changed.notify()
                return
            self._counts["dropped"] += 1
            first = self._counts["dropped"] == 1
        if first:
            _log.warning("insitu: %s takes no alerts and %d wait; more are dropped", self.target, MOST_QUEUED)

    def resume(self, alerts: Iterable[Alert]) -> None:
        """Queue those of an earlier judge's last alerts that are still to be told here. Before any `put`."""
        for alert in alerts:
            if self._is_wanted(alert) and not alert.is_late(self._clock()):
                self.put(alert)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """End once everything queued was sent, or the time is over. What is left, the next judge sends."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        self._abandoned.set()
        self._receiver.close()
        self._thread.join(LET_GO_S)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (alert := self._next()) is not None:
            if self._is_wanted(alert):
                self._deliver(alert)
            if self._abandoned.is_set():
                return

    def _next(self) -> Alert | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            return self._queue.popleft() if self._queue else None

    def _is_wanted(self, alert: Alert) -> bool:
        """Tell whether it is news there: who never heard that it opened need not hear that it is over."""
        return alert.state != self._sent.get(alert.incident, CLOSED)

    def _deliver(self, alert: Alert) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._abandoned.is_set():
            if alert.is_late(self._clock()):
                return self._give_up(alert, "it was too late to be told when it could have been")
            try:
                self._send(alert)
            except Unsent as error:
                if self._abandoned.is_set():
                    return None
                self._failed(error)
                if not error.again:
                    return self._give_up(alert, str(error))
                self._abandoned.wait(max(error.after_s, pause_s * (0.5 + 0.5 * self._jitter())))
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
            else:
                return self._took(alert)
        return None

    def _send(self, alert: Alert) -> None:
        try:
            self._receiver.send(alert)
        except Unsent:
            raise
        except Exception as error:  # a bug must not end the thread: the next alert may be one it does not touch
            raise Unsent(f"{type(error).__name__}: {error}", again=False) from error

    def _took(self, alert: Alert) -> None:
        self._sent[alert.incident] = alert.state
        self._tell(SENT, outcome(alert, self.target))
        with self._changed:
            self._counts["sent"] += 1
        if self._failing:
            self._failing = False
            _log.warning("insitu: %s takes alerts again", self.target)

    def _failed(self, error: Unsent) -> None:
        with self._changed:
            self._counts["failed"] += 1
        if not self._failing:
            self._failing = True
            _log.warning("insitu: %s does not take alerts: %s%s", self.target, error, "; retrying" * error.again)

    def _give_up(self, alert: Alert, why: str) -> None:
        self._tell(GIVEN_UP, outcome(alert, self.target))
        with self._changed:
            self._counts["given_up"] += 1
        _log.warning("insitu: %s was not told that %s is %s: %s", self.target, alert.incident, alert.state, why)
