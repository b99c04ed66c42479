"""The states a page can be in, and what it says of them: always what it means and what to do next. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

STALE_AFTER_S: Final = 5.0
"""A rank's heartbeat comes once a second, with or without traffic: this much silence means that something stopped."""


class State(StrEnum):
    """What the newest record of a run says of it."""

    LOADING = "loading"
    EMPTY = "empty"
    LIVE = "live"
    STALE = "stale"
    ENDED = "ended"
    ERROR = "error"


class Level(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Notice:
    """One banner: what is so, and what to do about it."""

    level: Level
    text: str
    remedy: str = ""


def state_of(age_s: float | None, *, is_closed: bool) -> State:
    """Return a run's state from the age of its newest record (None: it has none)."""
    if age_s is None:
        return State.EMPTY
    if is_closed:
        return State.ENDED
    return State.STALE if age_s > STALE_AFTER_S else State.LIVE


def length(seconds: float) -> str:
    """Return a length of time as a person says it."""
    if seconds < 120:
        return f"{round(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{round(seconds / 3600)} h"


def notice_of(
    state: State,
    age_s: float | None,
    missing: Mapping[str, int],
    *,
    is_judged: bool,
    has_steps: bool,
    num_damaged: int = 0,
) -> Notice | None:
    """Return what most needs to be said, or None when all is well. `num_damaged`: places of the store's files."""
    if state is State.LOADING:
        return Notice(Level.INFO, "Reading the store.", "A large one takes some seconds.")
    if state is State.EMPTY:
        return Notice(
            Level.INFO,
            "No record of any rank yet.",
            "Start one: `insitu demo`, `insitu serve --to ...` or `insitu.attach(model)`. This page goes on by itself.",
        )
    if state is State.STALE:
        return Notice(
            Level.WARNING,
            f"Stale: no record for {length(age_s or 0.0)}. What is shown is from then.",
            "The collector or the served process has stopped, or they lost each other: look whether both run.",
        )
    if missing:
        counted = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(missing.items()))
        return Notice(
            Level.WARNING,
            f"Partial: rows are missing from the record ({counted}).",
            "Shares and percentiles leave them out. `insitu stalls STORE` says which tables.",
        )
    if num_damaged:
        return Notice(
            Level.WARNING,
            f"Partial: {num_damaged} places of the store's files cannot be read, and are left out.",
            "`insitu collect` repairs its own files when it starts; if it does not help, look at the disk.",
        )
    if state is State.LIVE and not has_steps:
        return Notice(Level.INFO, "Attached, and no step was seen yet.", "Send the model a request.")
    if state is not State.ENDED and not is_judged and has_steps:
        return Notice(
            Level.INFO,
            "Nothing was judged yet.",
            "A verdict needs some seconds of traffic, and a judge: `insitu judge STORE`, or `insitu collect --judge`.",
        )
    return None
