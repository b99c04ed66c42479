"""What a page says of the state it is in: each state one sentence, and each says what to do next."""

from __future__ import annotations

import pytest

from insitu_dashboard.notices import STALE_AFTER_S, Level, Notice, State, notice_of, state_of


@pytest.mark.parametrize(
    ("age_s", "is_closed", "state"),
    [
        (None, False, State.EMPTY),
        (0.0, False, State.LIVE),
        (STALE_AFTER_S, False, State.LIVE),
        (STALE_AFTER_S + 0.1, False, State.STALE),
        (500.0, True, State.ENDED),
    ],
)
def test_the_state_follows_from_the_newest_record(age_s: float | None, is_closed: bool, state: State) -> None:
    assert state_of(age_s, is_closed=is_closed) is state


def said(state: State, age_s: float | None = 0.5, *, judged: bool = True, steps: bool = True, **missing: int) -> Notice:
    found = notice_of(state, age_s, missing, is_judged=judged, has_steps=steps)
    assert found is not None
    return found


def test_every_state_says_what_to_do() -> None:
    for found in (
        said(State.LOADING),
        said(State.EMPTY, None),
        said(State.STALE, 12.3),
        said(State.LIVE, queue_full=7),
        said(State.LIVE, steps=False),
        said(State.LIVE, judged=False),
    ):
        assert found.text.endswith(".")
        assert found.remedy.endswith(".")


def test_the_sentences_name_what_they_speak_of() -> None:
    assert "12 s" in said(State.STALE, 12.3).text
    assert "7 queue_full" in said(State.LIVE, queue_full=7).text
    assert "insitu demo" in said(State.EMPTY, None).remedy
    assert "insitu judge" in said(State.LIVE, judged=False).remedy


def test_what_stopped_is_said_before_what_is_missing() -> None:
    assert said(State.STALE, 60.0, queue_full=7).text.startswith("Stale")
    assert said(State.ENDED, 60.0, queue_full=7).level is Level.WARNING


def test_files_that_cannot_be_read_are_said() -> None:
    found = notice_of(State.LIVE, 0.1, {}, is_judged=True, has_steps=True, num_damaged=2)
    assert found is not None
    assert "2 places" in found.text


@pytest.mark.parametrize("state", [State.LIVE, State.ENDED])
def test_nothing_is_said_when_all_is_well(state: State) -> None:
    assert notice_of(state, 0.2, {}, is_judged=True, has_steps=True) is None
