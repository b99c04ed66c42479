"""The way to one receiver: in order, once, again after a failure, never longer than useful, never in anybody's way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import Queue

import pytest
from alert_kit import alert

from insitu_collector.notify import delivery as module
from insitu_collector.notify.alerts import GIVEN_UP, LATE_NS, SENT, Alert
from insitu_collector.notify.delivery import Delivery, Unsent


class Receiver:
    """Takes, or refuses as it was told to; can be held until it is let go."""

    target = "http://there (1234abcd)"

    def __init__(self, *refusals: Unsent) -> None:
        self.refusals = list(refusals)
        self.took: Queue[Alert] = Queue()
        self.attempts: Queue[str] = Queue()
        self.free = threading.Event()
        self.free.set()

    def send(self, alert: Alert) -> None:
        self.attempts.put(alert.id)
        self.free.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        self.took.put(alert)

    def close(self) -> None:
        self.free.set()


class Told:
    """Rows of `events`."""

    def __init__(self) -> None:
        self.rows: Queue[tuple[str, str]] = Queue()

    def __call__(self, kind: str, text: str) -> None:
        self.rows.put((kind, text))

    def next(self) -> tuple[str, str]:
        kind, text = self.rows.get(timeout=10)
        return kind, json.loads(text)["id"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.004)


LATER = "HTTP 500"


def test_alerts_come_in_order_and_leave_rows() -> None:
    receiver, told = Receiver(), Told()
    with closing(Delivery(receiver, told)) as delivery:
        alerts = [alert("a"), alert("b"), alert("a", 1, "closed")]
        for each in alerts:
            delivery.put(each)
        assert [receiver.took.get(timeout=10) for _ in alerts] == alerts
        assert [told.next() for _ in alerts] == [(SENT, "a#0"), (SENT, "b#0"), (SENT, "a#1")]
        assert delivery.counts() == {"sent": 3, "failed": 0, "given_up": 0, "dropped": 0}


def test_what_fails_is_tried_again_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    receiver, told = Receiver(*[Unsent(LATER, again=True) for _ in range(5)]), Told()
    with closing(Delivery(receiver, told)) as delivery:
        delivery.put(alert("a"))
        assert told.next() == (SENT, "a#0")
    assert [record.message for record in caplog.records] == [
        "insitu: http://there (1234abcd) does not take alerts: HTTP 500; retrying",
        "insitu: http://there (1234abcd) takes alerts again",
    ]
    assert delivery.counts() == {"sent": 1, "failed": 5, "given_up": 0, "dropped": 0}


def test_pauses_double_up_to_a_bound_and_are_cut_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Recording(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return self.is_set()

    receiver, told = Receiver(*[Unsent(LATER, again=True) for _ in range(5)]), Told()
    receiver.refusals[-1].after_s = 60.0
    cuts: Iterator[float] = iter([0.0, 1.0, 0.5, 1.0, 1.0])
    delivery = Delivery(receiver, told, jitter=lambda: next(cuts))
    monkeypatch.setattr(delivery, "_abandoned", Recording())
    with closing(delivery):
        delivery.put(alert("a"))
        told.next()
    assert waits == pytest.approx([0.0005, 0.002, 0.003, 0.004, 60.0])


def test_what_will_never_be_taken_is_given_up_and_the_next_one_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    receiver, told = Receiver(Unsent("HTTP 400", again=False)), Told()
    with closing(Delivery(receiver, told)) as delivery:
        for each in (alert("a"), alert("a", 1, "closed"), alert("b")):
            delivery.put(each)
        assert [told.next(), told.next()] == [(GIVEN_UP, "a#0"), (SENT, "b#0")]
    assert receiver.took.get_nowait().incident == "b"  # nobody there knows of a, so its end is no news
    assert receiver.took.empty()
    assert "was not told that a is open: HTTP 400" in caplog.text


def test_an_error_nobody_thought_of_harms_one_alert_only() -> None:
    class Broken(Receiver):
        def send(self, alert: Alert) -> None:
            if alert.incident == "a":
                raise UnicodeError("label too long")
            super().send(alert)

    receiver, told = Broken(), Told()
    with closing(Delivery(receiver, told)) as delivery:
        for each in (alert("a"), alert("b")):
            delivery.put(each)
        assert [told.next(), told.next()] == [(GIVEN_UP, "a#0"), (SENT, "b#0")]


def test_a_new_judge_takes_up_what_is_still_news_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_QUEUED", 5)
    receiver, told = Receiver(), Told()
    over = [alert(f"old-{number}", 1, "closed") for number in range(50)]
    long_ago = alert("long-ago", window_end_unix_ns=0, detected_unix_ns=0)
    with closing(Delivery(receiver, told, {"old-7": "open", "known": "open"})) as delivery:
        delivery.resume([*over, long_ago, alert("known"), alert("new")])
        assert [told.next(), told.next()] == [(SENT, "old-7#1"), (SENT, "new#0")]
    assert delivery.counts() == {"sent": 2, "failed": 0, "given_up": 0, "dropped": 0}


def test_an_alert_that_is_too_old_is_given_up_but_an_end_is_not() -> None:
    times: list[int] = [0]
    receiver, told = Receiver(), Told()
    clock: Callable[[], int] = lambda: times[0]  # noqa: E731
    with closing(Delivery(receiver, told, {"b": "open"}, clock=clock)) as delivery:
        late, over = alert("a"), alert("b", 1, "closed")
        times[0] = late.unix_ns + LATE_NS + 1
        delivery.put(late)
        delivery.put(over)
        assert [told.next(), told.next()] == [(GIVEN_UP, "a#0"), (SENT, "b#1")]


def test_what_an_earlier_judge_sent_is_not_sent_again() -> None:
    receiver, told = Receiver(), Told()
    with closing(Delivery(receiver, told, {"a": "open", "b": "closed"})) as delivery:
        for each in (alert("a"), alert("b", 3), alert("a", 1, "closed"), alert("c", 0, "closed")):
            delivery.put(each)
        assert [told.next(), told.next()] == [(SENT, "b#3"), (SENT, "a#1")]
    assert receiver.attempts.qsize() == 2


def test_a_receiver_that_hangs_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_QUEUED", 10)
    receiver, told = Receiver(), Told()
    receiver.free.clear()
    delivery = Delivery(receiver, told)
    delivery.put(alert("first"))
    assert receiver.attempts.get(timeout=10) == "first#0"  # it hangs in there now
    for number in range(15):
        delivery.put(alert(f"more-{number}"))
    assert delivery.counts()["dropped"] == 5
    assert [record.message for record in caplog.records].count(
        "insitu: http://there (1234abcd) takes no alerts and 10 wait; more are dropped"
    ) == 1
    began = time.monotonic()
    delivery.close(0.05)
    assert time.monotonic() - began < 5
    assert receiver.attempts.empty()  # what is left is for the next judge: nothing is tried any more
    assert receiver.took.qsize() == told.rows.qsize() == 1


def test_close_waits_for_what_can_be_sent() -> None:
    receiver, told = Receiver(), Told()
    delivery = Delivery(receiver, told)
    for number in range(100):
        delivery.put(alert(f"a-{number}"))
    delivery.close(10)
    assert receiver.took.qsize() == 100
