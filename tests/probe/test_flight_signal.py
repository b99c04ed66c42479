"""A signal reaches every session that listens, and who listened before; afterwards nothing of ours is left."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from insitu.flight.signals import on_signal

NUMBER = signal.SIGUSR2


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[str]]:
    """What a handler heard that was there before."""
    found: list[str] = []
    before = signal.signal(NUMBER, lambda number, frame: found.append("before"))
    yield found
    signal.signal(NUMBER, before)


def come() -> None:
    os.kill(os.getpid(), NUMBER)


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_sessions_listen_together_and_leave_in_any_order(heard: list[str], first_to_leave: int) -> None:
    there = signal.getsignal(NUMBER)
    undo = [on_signal(NUMBER, lambda name, who=who: heard.append(f"{who} {name}")) for who in ("a", "b")]  # type: ignore[misc]
    come()
    assert heard == ["a SIGUSR2", "b SIGUSR2", "before"]
    undo.pop(first_to_leave)()
    heard.clear()
    come()
    assert heard == [f"{'ba'[first_to_leave]} SIGUSR2", "before"]
    undo.pop()()
    assert signal.getsignal(NUMBER) is there
    undo.append(on_signal(NUMBER, heard.append))
    heard.clear()
    come()
    assert heard == ["SIGUSR2", "before"]
    undo.pop()()


def test_who_comes_after_and_calls_on_is_left_as_it_is(heard: list[str]) -> None:
    leave = on_signal(NUMBER, heard.append)
    ours = signal.getsignal(NUMBER)
    assert callable(ours)

    def later(number: int, frame: object) -> None:
        heard.append("later")
        ours(number, None)

    signal.signal(NUMBER, later)
    leave()
    assert signal.getsignal(NUMBER) is later
    again = on_signal(NUMBER, heard.append)
    come()
    assert heard == ["SIGUSR2", "later", "before"], "each once, and no circle"
    again()
    assert signal.getsignal(NUMBER) is later


def test_away_from_the_main_thread_nothing_is_set_and_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    there = signal.getsignal(NUMBER)
    with caplog.at_level(logging.WARNING, "insitu"):
        thread = threading.Thread(target=lambda: on_signal(NUMBER, print)())
        thread.start()
        thread.join()
    assert "SIGUSR2 opens no incident: only the main thread can listen to it" in caplog.text
    assert signal.getsignal(NUMBER) is there
