"""Recall by size of the fault as a picture: a panel for each kind whose faults have sizes, with its detection limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import altair as alt
import numpy as np
from recall_cases import KINDS
from recall_figures import Outcome, by_size, figures

WIDTH: Final = 270
HEIGHT: Final = 130
"""Pixels of a panel."""
COLUMNS: Final = 3
FOUND: Final = "#1f5f99"
LIMIT: Final = "#c2500a"
FONT: Final = "Helvetica, Arial, sans-serif"
SURE: Final = 1.96
"""Deviations on both sides of a share between which 95 % lie."""
FEWEST_TICKS: Final = 3
MOST_TICKS: Final = 7
SPARE: Final = 1.15
"""Times beyond the smallest and the largest size an axis goes on."""


def interval(share: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `num` cases (Wilson 1927: it stays within 0 and 1)."""
    middle = (share + SURE**2 / (2 * num)) / (1 + SURE**2 / num)
    half = SURE / (1 + SURE**2 / num) * float(np.sqrt(share * (1 - share) / num + SURE**2 / (4 * num**2)))
    return max(0.0, middle - half), min(1.0, middle + half)


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven sizes to write at a logarithmic axis: round ones where there are so many."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for values in (np.outer(decades, (1, 2, 5)).reshape(-1), decades):
        inside = values[(values >= low * 0.999) & (values <= high * 1.001)]
        if FEWEST_TICKS <= len(inside) <= MOST_TICKS:
            return [float(f"{value:.3g}") for value in inside]
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, FEWEST_TICKS + 1)]


def limits(outcomes: Sequence[Outcome], name: str) -> tuple[float, float] | None:
    """Return the smallest and the largest detection limit among the cases of a kind; None: promised of none."""
    found = [outcome.limit for outcome in outcomes if outcome.kind == name and outcome.limit is not None]
    return (min(found), max(found)) if found else None


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw recall by size, and into the heading what kinds without a size come to."""
    names = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    sized = [name for name in names if KINDS[name].sizes[0] < KINDS[name].sizes[1]]
    chart = alt.concat(*(_panel(outcomes, name) for name in sized), columns=COLUMNS, spacing=26)
    chart = chart.properties(background="white", padding=14, title=_heading(outcomes, names, sized))
    chart = chart.configure_axis(
        labelFont=FONT, titleFont=FONT, labelFontSize=12, titleFontSize=12, gridColor="#e4e4e4"
    )
    chart.configure_title(font=FONT, subtitleFont=FONT, anchor="start").configure_view(stroke="#999999").save(str(path))


def _heading(outcomes: Sequence[Outcome], names: Sequence[str], sized: Sequence[str]) -> alt.TitleParams:
    without = [
        f"{each.kind} {each.num_found} of {each.num_cases}" for each in figures(outcomes) if each.kind not in sized
    ]
    return alt.TitleParams(
        "How often a fault is told, by its size",
        subtitle=[
            f"{len(outcomes)} simulated runs of {len(names)} kinds of fault. Dots: share of the runs of a size in "
            "which the verdict was told; bars: its 95 % interval.",
            "Orange: the stated detection limit, from which on at least 98 % must be told; a band where it depends on "
            "the run.",
            *([f"Faults without a size: {', '.join(without)}."] if without else []),
        ],
        fontSize=20,
        subtitleFontSize=13,
        offset=18,
    )


def _panel(outcomes: Sequence[Outcome], name: str) -> Any:
    low, high = KINDS[name].sizes
    rows = []
    for begin, end, num, share in by_size(outcomes, name):
        least, most = interval(share, num)
        rows.append({"size": float(np.sqrt(begin * end)), "share": share, "least": least, "most": most})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X(
            "size:Q",
            title=KINDS[name].unit,
            scale=alt.Scale(type="log", domain=[low / SPARE, high * SPARE], nice=False),
            axis=alt.Axis(format="~g", values=ticks(low, high)),
        )
    )
    shares = alt.Y(
        "share:Q", title="told", axis=alt.Axis(format="%", values=[0, 0.5, 1]), scale=alt.Scale(domain=[0, 1])
    )
    layers = [
        *_limit_marks(limits(outcomes, name), low, high),
        base.mark_rule(color=FOUND, opacity=0.5, strokeWidth=2).encode(y="least:Q", y2="most:Q"),
        base.mark_line(color=FOUND, strokeWidth=2).encode(y=shares),
        base.mark_circle(color=FOUND, size=60, opacity=1).encode(y=shares),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=_title(outcomes, name))


def _title(outcomes: Sequence[Outcome], name: str) -> alt.TitleParams:
    (found,) = (each for each in figures(outcomes) if each.kind == name)
    return alt.TitleParams(
        name,
        subtitle=f"limit {_limit_text(limits(outcomes, name))}: {found.num_found_above} of {found.num_above} told",
        fontSize=15,
        subtitleFontSize=12,
        subtitleColor=LIMIT,
    )


def _limit_text(found: tuple[float, float] | None) -> str:
    if found is None:
        return "none"
    low, high = (f"{limit:.3g}" if limit < 1000 else f"{limit:,.0f}" for limit in found)
    return "any size" if found == (0, 0) else low if low == high else f"{low} to {high}"


def _limit_marks(found: tuple[float, float] | None, low: float, high: float) -> list[alt.Chart]:
    """Return a line at the detection limit, or a band from the smallest to the largest, where the axis has it."""
    if found is None or found[1] < low / SPARE or found[0] > high * SPARE:
        return []
    begin, end = max(found[0], low / SPARE), min(found[1], high * SPARE)
    data: Any = alt.InlineData(values=[{"begin": begin, "end": end}])
    line = alt.Chart(data).mark_rule(color=LIMIT, strokeWidth=2, strokeDash=[6, 3]).encode(x="begin:Q")
    band = alt.Chart(data).mark_rect(color=LIMIT, opacity=0.18).encode(x="begin:Q", x2="end:Q")
    return [band, line] if end > begin else [line]
