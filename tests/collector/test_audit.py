"""What is told of refusals and changes: each reason and host soon, then a count a minute. A full disk delays it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.access.audit import AGAIN_S, HANDSHAKE_S, MOST_COUNTED, Audit, Handshakes, Why


class Told(list[str]):
    is_full = False

    def __call__(self, text: str) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.append(text)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def audit(told: Told, clock: Clock) -> Audit:
    return Audit(told, clock)


def test_the_first_of_a_reason_and_host_is_told_at_once_then_a_count_a_minute(
    audit: Audit, told: Told, clock: Clock
) -> None:
    audit.refused(Why.NO_TOKEN, "10.0.0.7")
    audit.refused(Why.ROLE, "10.0.0.7")
    audit.look()
    assert told == ["refused 1 of 10.0.0.7: no_token", "refused 1 of 10.0.0.7: role"]
    for _ in range(1000):
        audit.refused(Why.NO_TOKEN, "10.0.0.7")
        audit.look()
    assert len(told) == 2
    clock.now += AGAIN_S
    audit.look()
    assert told[2:] == ["refused 1000 of 10.0.0.7: no_token"]
    audit.refused(Why.ROLE, "10.0.0.7")
    audit.look(is_last=True)
    assert told[3:] == ["refused 1 of 10.0.0.7: role"], "at the end whatever is left"


def test_many_hosts_are_counted_together(audit: Audit, told: Told) -> None:
    for number in range(MOST_COUNTED + 50):
        audit.refused(Why.UNKNOWN_TOKEN, f"host-{number}")
    audit.look()
    assert len(told) == MOST_COUNTED + 1
    assert told[-1] == "refused 50 of others: unknown_token"


def test_what_the_store_does_not_take_is_told_later(audit: Audit, told: Told) -> None:
    told.is_full = True
    audit.note("the certificate changed")
    audit.refused(Why.EXPIRED, "h", 3)
    audit.look()
    told.is_full = False
    audit.look()
    assert told == ["the certificate changed", "refused 3 of h: expired"]
    audit.look()
    assert len(told) == 2


def test_old_counts_are_forgotten_so_that_new_hosts_have_room(audit: Audit, told: Told, clock: Clock) -> None:
    for number in range(MOST_COUNTED):
        audit.refused(Why.NO_TOKEN, f"old-{number}")
    audit.look()
    clock.now += AGAIN_S + 1
    audit.look()
    audit.refused(Why.NO_TOKEN, "new")
    audit.look()
    assert told[-1] == "refused 1 of new: no_token"


def test_a_handshake_after_which_nobody_calls_has_failed() -> None:
    handshakes = Handshakes()
    handshakes.called("ipv4:10.0.0.7:1")
    assert handshakes.failed(lambda: 3, 0.0) == 0, "two more may call yet"
    handshakes.called("ipv4:10.0.0.7:2")
    handshakes.called("ipv4:10.0.0.7:2")
    assert handshakes.failed(lambda: 0, HANDSHAKE_S - 1) == 0
    assert handshakes.failed(lambda: 0, HANDSHAKE_S) == 1
    assert handshakes.failed(lambda: 0, 10 * HANDSHAKE_S) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_all_handshakes_either_called_or_failed(steps: list[tuple[int, int]]) -> None:
    """Whoever calls has shaken hands before, and within the time."""
    handshakes, now, num_waiting, num_failed, number = Handshakes(), 0.0, 0, 0, 0
    expected = 0
    for begun, calling in steps:
        num_waiting += begun
        for _ in range(min(calling, num_waiting)):
            handshakes.called(f"ipv4:10.0.0.7:{number}")
            number += 1
            num_waiting -= 1
        num_failed += handshakes.failed(lambda begun=begun: begun, now)  # type: ignore[misc]
        now += 0.1
    expected = num_waiting
    num_failed += handshakes.failed(lambda: 0, now + HANDSHAKE_S)
    assert num_failed == expected
