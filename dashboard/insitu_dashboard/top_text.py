"""What `insitu top` says, from the picture that pages draw: lines of text, and bars of letters. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.palette import LABELS, LETTERS
from insitu_dashboard.notices import length

Picture = Mapping[str, Any]
Bar = list[tuple[LedgerClass, int]]
"""Classes from left to right, and how many cells of a terminal each takes."""

MOST_ALARMS: Final = 8
ALARM_WIDTH: Final = 96
"""Characters of an alarm's text: one line of a usual terminal; `insitu stalls` tells the rest."""
MIN_BAR: Final = 10
NAME_WIDTH: Final = 52
"""Cells of a rank's line in front of its bar: stage, rank, what it mostly does, and how much of the time."""
_NUMBERS: Final = (
    ("tokens_per_s", "tokens/s", 1),
    ("requests_per_s", "requests/s", 1),
    ("running", "running", 1),
    ("failed", "failed in 30 s", 1),
    ("steps_per_s", "steps/s", 1),
    ("ttft_p95_s", "ms to first token p95", 1000),
    ("itl_p50_s", "ms between tokens p50", 1000),
    ("itl_p99_s", "p99", 1000),
)


def headline(picture: Picture) -> str:
    """Return what the numbers below are worth: how old, of what, and what is missing."""
    head = picture["header"]
    age = "" if head["age_s"] is None else f" {length(head['age_s'])} old"
    parts = [f"{head['state'].upper()}{age}"]
    if picture["run"]:
        parts.append(f"run {picture['run']} {head['replica']}".rstrip())
        parts.append(
            f"{head['model'] or 'a model'}, {_count(head['stages'], 'stage')}, {_count(head['ranks'], 'rank')}"
        )
        parts.append(f"clock: {head['clock']}")
        parts.append(f"drops {head['drops']}")
    if head["overhead"] is not None:
        parts.append(f"probe {100 * head['overhead']:.1f} % of step time")
    return "  ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def notice(picture: Picture) -> str | None:
    """Return the banner and what to do about it, if there is one."""
    found = picture["notice"]
    return None if found is None else f"{found['text']} {found['remedy']}".strip()


def verdicts(picture: Picture) -> list[str]:
    """Return a paragraph a verdict: what is so, what helps, and for whom."""
    return [
        f"{each['text']}\n  What helps: {each['remedy']}\n"
        f"  confidence {100 * each['confidence']:.0f} %{_affected(each['num_requests'])}"
        for each in picture["verdicts"]
    ]


def _affected(num_requests: int) -> str:
    return f", {_count(num_requests, 'request')} affected" if num_requests else ""


def numbers(picture: Picture) -> str:
    """Return rates and percentiles in one line; what is not known is left out."""
    found = picture["numbers"]
    shown = [(found.get(name), label, factor) for name, label, factor in _NUMBERS]
    return "  ".join(f"{value * factor:.4g} {label}" for value, label, factor in shown if value is not None)


def bar(classes: Mapping[str, float], width: int) -> Bar:
    """Return `width` cells shared out by time, the largest class first; rounding goes to the largest remainders."""
    known = {LedgerClass(name): share for name, share in classes.items()}
    total = sum(known.values())
    if total <= 0 or width <= 0:
        return []
    order = sorted(known, key=lambda cls: (-known[cls], cls))
    exact = {cls: width * known[cls] / total for cls in order}
    cells = {cls: int(exact[cls]) for cls in order}
    for cls in sorted(order, key=lambda cls: (cells[cls] - exact[cls], cls))[: width - sum(cells.values())]:
        cells[cls] += 1
    return [(cls, cells[cls]) for cls in order if cells[cls]]


def rank_line(cell: Mapping[str, Any]) -> str:
    """Return what a rank mostly does, and for how long something has been open, without its bar."""
    place = f"stage {cell['stage']}  rank {cell['rank']}"
    if cell["open"] is not None:
        return f"{place}  {cell['open']['text']} {cell['open']['s']:.1f} s"
    if cell["cls"] is None:
        return f"{place}  nothing recorded"
    return f"{place}  {LABELS[LedgerClass(cell['cls'])]} {100 * cell['share']:.0f} %"


def ranks(picture: Picture, width: int) -> list[tuple[str, Bar]]:
    """Return a line and a bar a rank, the line cut or filled to `NAME_WIDTH`."""
    room = max(MIN_BAR, width - NAME_WIDTH)
    return [
        (f"{rank_line(cell)[: NAME_WIDTH - 1]:<{NAME_WIDTH}}", bar(cell["classes"], room)) for cell in picture["grid"]
    ]


def legend(bars: Sequence[Bar]) -> str:
    """Return what the letters of these bars mean."""
    shown = {cls for each in bars for cls, _ in each}
    return "  ".join(f"{LETTERS[cls]} {LABELS[cls]}" for cls in LedgerClass if cls in shown)


def alarms(picture: Picture) -> list[str]:
    """Return what was found so far, newest first, a line each."""
    found = picture["alarms"]
    lines = [f"{_clock(each['detected'])}  {_state(each)}  {_one_line(each['text'])}" for each in found[:MOST_ALARMS]]
    left_out = len(found) - MOST_ALARMS
    return lines + ([f"and {left_out} older ones: `insitu stalls STORE`"] if left_out > 0 else [])


def _state(verdict: Mapping[str, Any]) -> str:
    return "now " if verdict["state"] == "open" else "over"


def _clock(unix_ns: str) -> str:
    return time.strftime("%H:%M:%S", time.localtime(int(unix_ns) // 1_000_000_000))


def _one_line(text: str) -> str:
    return text if len(text) <= ALARM_WIDTH else f"{text[: ALARM_WIDTH - 1]}…"


def plain(picture: Picture, width: int) -> str:
    """Return the whole as plain text, for a pipe or a file."""
    shown = ranks(picture, width)
    lines = [headline(picture)]
    if (banner := notice(picture)) is not None:
        lines.append(banner)
    lines += ["", *verdicts(picture)]
    if found := numbers(picture):
        lines += ["", found]
    if shown:
        lines += ["", "What each rank does now (last 5 s)"]
        lines += [line + "".join(LETTERS[cls] * cells for cls, cells in each) for line, each in shown]
        lines.append(legend([each for _, each in shown]))
    if picture["alarms"]:
        lines += ["", "Alarms, newest first", *alarms(picture)]
    return "\n".join(lines)
