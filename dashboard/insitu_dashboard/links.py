"""What a page's address says: which run, which window, what is chosen. Pure, both ways; times are Unix nanoseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from insitu.vocabulary import LedgerClass
from insitu_dashboard.picture import DEFAULT_WINDOW_S, WINDOWS_S

LONGEST_RUN: Final = 40
NAMES: Final = ("run", "win", "live", "t0", "t1", "stage", "rank", "cls", "sel", "table")


@dataclass(frozen=True, slots=True)
class Selected:
    """The span a card is open for."""

    rank: int
    t0_ns: int
    cls: str
    step: int = -1


@dataclass(frozen=True, slots=True)
class Link:
    """What an address asks for; what it does not say, or says wrongly, is the default."""

    run: str | None = None
    window_s: int = DEFAULT_WINDOW_S
    is_live: bool = True
    t0_ns: int | None = None
    t1_ns: int | None = None
    """With `t0_ns` the window of the timeline; alone the time at which the page was paused."""
    stages: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    """What to show; empty: all."""
    selected: Selected | None = None
    with_table: bool = False

    @property
    def paused_ns(self) -> int | None:
        return None if self.is_live else self.t1_ns


def parse(query: Mapping[str, str]) -> Link:
    """Return what an address's query says. Never raises: an address is written by anybody."""
    t0, t1 = _number(query.get("t0")), _number(query.get("t1"))
    window = _number(query.get("win"))
    run = query.get("run", "")
    known = {str(cls) for cls in LedgerClass}
    return Link(
        run=run[:LONGEST_RUN] or None,  # an unknown one is said to be unknown
        window_s=window if window in WINDOWS_S else DEFAULT_WINDOW_S,
        is_live=query.get("live") != "0" or t1 is None,
        t0_ns=t0 if t0 is not None and t1 is not None and t0 < t1 else None,
        t1_ns=t1,
        stages=_numbers(query.get("stage")),
        ranks=_numbers(query.get("rank")),
        classes=tuple(cls for cls in query.get("cls", "").split(",") if cls in known),
        selected=_selected(query.get("sel", "")),
        with_table=query.get("table") == "1",
    )


def query(link: Link) -> dict[str, str]:
    """Return the query of an address that says so; what is the default is left out."""
    selected = link.selected
    said: dict[str, Any] = {
        "run": link.run,
        "win": link.window_s if link.window_s != DEFAULT_WINDOW_S else None,
        "live": None if link.is_live else 0,
        "t0": link.t0_ns,
        "t1": link.t1_ns,
        "stage": ",".join(map(str, link.stages)),
        "rank": ",".join(map(str, link.ranks)),
        "cls": ",".join(link.classes),
        "sel": f"{selected.rank}.{selected.step}.{selected.t0_ns}.{selected.cls}" if selected else None,
        "table": 1 if link.with_table else None,
    }
    return {name: str(value) for name, value in said.items() if value not in (None, "")}


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None


def _numbers(text: str | None) -> tuple[int, ...]:
    found = [_number(part) for part in (text or "").split(",")]
    return tuple(number for number in found if number is not None)


def _selected(text: str) -> Selected | None:
    parts = text.split(".")
    if len(parts) != 4 or parts[3] not in {str(cls) for cls in LedgerClass}:
        return None
    rank, begin = _number(parts[0]), _number(parts[2])
    step = _number(parts[1])
    return None if rank is None or begin is None else Selected(rank, begin, parts[3], -1 if step is None else step)
