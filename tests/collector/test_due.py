"""When it is time for a commit: at once where much waits, soon where somebody waits, else a little later."""

from __future__ import annotations

import threading

import pytest

from insitu_collector.service import due
from insitu_collector.service.due import COMMIT_BYTES, Due


@pytest.fixture(autouse=True)
def _never_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMIT_S", "AWAITED_S", "IDLE_TICK_S"):
        monkeypatch.setattr(due, name, 600.0)


def waiting(found: Due, unsynced_bytes: int) -> threading.Thread:
    thread = threading.Thread(target=found.wait, args=(lambda: unsynced_bytes,))
    thread.start()
    return thread


def test_much_that_waits_is_committed_at_once() -> None:
    found = Due()
    thread = waiting(found, COMMIT_BYTES)
    found.appended()
    thread.join(30)
    assert not thread.is_alive()


def test_who_is_awaited_waits_for_others_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due, "AWAITED_S", 0.0)
    found = Due()
    thread = waiting(found, 1)
    found.appended(is_awaited=True)
    thread.join(30)
    assert not thread.is_alive()


def test_a_little_waits_for_more_and_for_no_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due, "COMMIT_S", 0.0)
    found = Due()
    found.appended()
    found.wait(lambda: 1)
    monkeypatch.setattr(due, "IDLE_TICK_S", 0.0)
    found.wait(lambda: 0)


def test_nobody_waits_once_it_stops() -> None:
    found = Due()
    found.appended(is_awaited=True)
    thread = waiting(found, 1)
    found.stop()
    thread.join(30)
    assert not thread.is_alive()
    found.wait(lambda: 0)
