"""Static charts of a run for notebooks: at most `MOST_MARKS` marks each. Needs the package `altair` (extra `notebook`).

The same names, letters and colours as on the pages. Letters stand on what is wide enough, because classes that share a
colour are told apart by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import altair as alt
import numpy as np

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.palette import LOOKS
from insitu_collector.ledger.window import Ledger
from insitu_collector.requests.latency import Samples
from insitu_collector.rows.selection import as_time
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.spans import CLASSES, Spans, fitted

MOST_MARKS: Final = 2_000
"""Above this a browser needs more than a moment for a chart, and no eye tells the marks apart."""
MOST_LETTERS: Final = 200
WIDTH: Final = 860
LANE: Final = 44
"""Pixels of one rank."""
LETTER_PX: Final = 14
"""A span narrower than this carries no letter."""
_FADED: Final = 0.25
_WRAP: Final = 140
"""Letters of a title's line."""

Row = dict[str, Any]


Title = tuple[str, str]
"""What a chart says in a few words, and the rest of it."""


def timeline_chart(
    spans: Spans, lanes: Mapping[int, int], window: tuple[int, int], begin_unix_ns: int, title: Title, step: int | None
) -> alt.LayerChart:
    """Return what each rank did in a window (int64 ns, as the spans): a lane a rank, a bar an interval.

    lanes: rank -> stage, in the order of the spans' lanes. step: what is of another step is faded.
    """
    t0, t1 = window
    shown = fitted(spans, t0, t1, WIDTH, most=MOST_MARKS - MOST_LETTERS)
    names = [f"stage {stage}, rank {rank}" for rank, stage in lanes.items()]
    rows = _span_rows(shown, names, window, step)
    used = [cls for cls in CLASSES if any(row["class"] == _named(cls) for row in rows)]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("rank:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, ticks=False))
    )
    span_ms = (t1 - t0) / 1e6
    since = f"milliseconds since {as_time(begin_unix_ns)}"
    x = alt.X("t0:Q", title=since, scale=alt.Scale(domain=[0, span_ms], nice=False))
    bars = base.mark_bar(height=LANE - 10, stroke="#FFFFFF", strokeWidth=0.3, clip=True).encode(
        x=x,
        x2="t1:Q",
        color=_colours(used),
        opacity=alt.Opacity("opacity:Q", scale=None, legend=None),
        tooltip=[
            alt.Tooltip(f"{name}:N") for name in ("class", "rank", "duration", "step", "micro-batch", "waits for")
        ],
    )
    widest = sorted((row for row in rows if row["letter"]), key=lambda row: row["t0"] - row["t1"])[:MOST_LETTERS]
    layers = [bars, *_letters(widest, since, alt.Y("rank:N", sort=names))]
    return _finished(alt.LayerChart(layer=layers), title, height=LANE * len(names))


def _span_rows(shown: Spans, names: list[str], window: tuple[int, int], step: int | None) -> list[Row]:
    t0, t1 = window
    pixel = max(1, (t1 - t0) / WIDTH)
    rows: list[Row] = []
    columns = (shown.lane, shown.t0_ns, shown.t1_ns, shown.cls, shown.step, shown.mb, shown.peer, shown.merged)
    for lane, begin, end, place, of, mb, peer, merged in zip(*(each.tolist() for each in columns), strict=True):
        cls = CLASSES[place]
        drawn = (max(begin, t0), min(end, t1))
        is_faded = step is not None and of != step
        rows.append(
            {
                "rank": names[lane],
                "class": _named(cls),
                "t0": (drawn[0] - t0) / 1e6,
                "t1": (drawn[1] - t0) / 1e6,
                "middle": (sum(drawn) / 2 - t0) / 1e6,
                "letter": LOOKS[cls].letter if (drawn[1] - drawn[0]) / pixel >= LETTER_PX and not is_faded else "",
                "ink": LOOKS[cls].ink,
                "opacity": _FADED if is_faded else 1,
                "duration": f"{(end - begin) / 1e6:.2f} ms" + (f", {merged} intervals" if merged > 1 else ""),
                "step": of if of >= 0 else "",
                "micro-batch": mb if mb >= 0 else "",
                "waits for": f"rank {peer}" if peer >= 0 else "",
            }
        )
    return rows


def ledger_bars(ledger: Ledger, title: Title) -> alt.LayerChart:
    """Return where each rank's time went: a bar a rank, a part a class, in percent of the window."""
    window = max(ledger.t1_ns - ledger.t0_ns, 1)
    rows: list[Row] = []
    stages = {row.rank: row.stage for row in ledger.rows}
    names = [f"stage {stages.get(rank, '?')}, rank {rank}" for rank in ledger.ranks]
    for rank, name in zip(ledger.ranks, names, strict=True):
        at = 0.0
        for cls in LedgerClass:
            share = 100 * ledger.ns(rank, cls) / window
            if share > 0:
                rows.append(_part(name, cls, at, share, ledger.ns(rank, cls) / 1e9))
                at += share
    used = [cls for cls in LedgerClass if any(row["class"] == _named(cls) for row in rows)]
    y = alt.Y("rank:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, ticks=False))
    percent = "percent of the window"
    x = alt.X("t0:Q", title=percent, scale=alt.Scale(domain=[0, 100]))
    bars = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(height=LANE - 10, stroke="#FFFFFF", strokeWidth=0.5)
        .encode(y=y, x=x, x2="t1:Q", color=_colours(used), tooltip=["rank:N", "class:N", "share:N", "seconds:N"])
    )
    layers = [bars, *_letters([row for row in rows if row["letter"]], percent, y)]
    return _finished(alt.LayerChart(layer=layers), title, height=LANE * len(names))


def _part(name: str, cls: LedgerClass, at: float, share: float, seconds: float) -> Row:
    look = LOOKS[cls]
    letter = f"{look.letter} {share:.0f} %" if share >= 6 else (look.letter if share >= 2 else "")
    return {
        "rank": name,
        "class": _named(cls),
        "t0": at,
        "t1": at + share,
        "middle": at + share / 2,
        "letter": letter,
        "ink": look.ink,
        "share": f"{share:.1f} %",
        "seconds": f"{seconds:.2f} s",
    }


LINES: Final = {
    "first": ("time to first token, ms", (("p50", 50, "#0072B2"), ("p95", 95, "#E69F00"))),
    "between": ("time between tokens, ms", (("p50", 50, "#0072B2"), ("p99", 99, "#9C2F00"))),
}
"""Panel -> its title, and (name, percentile, colour) of its lines."""
MOST_BUCKETS: Final = 300
_BUCKETS_S: Final = (1, 2, 5, 10, 30, 60, 300, 600, 3_600, 86_400)


def latency_lines(
    samples: Mapping[str, Samples], begin_ns: int, begin_unix_ns: int, verdicts: Iterable[Verdict], title: Title
) -> alt.VConcatChart:
    """Return what requests felt over time: percentiles by bucket, with the windows of verdicts as bands.

    samples: by panel of `LINES`; a bucket without any is a hole in the line. begin_ns: where the axis begins.
    """
    last = max((int(each.t_ns.max()) for each in samples.values() if len(each.t_ns)), default=begin_ns)
    long_s = (last - begin_ns) / 1e9
    bucket_s = next((each for each in _BUCKETS_S if long_s / each <= MOST_BUCKETS), _BUCKETS_S[-1])
    bands = _bands(verdicts, begin_unix_ns, long_s)
    panels = []
    for name, (label, lines) in LINES.items():
        rows = [row for line in lines for row in _percentiles(samples[name], begin_ns, bucket_s, *line)]
        panels.append(_panel(rows, bands, f"{label}, by {bucket_s} s", lines, begin_unix_ns, long_s))
    both = alt.VConcatChart(vconcat=panels, title=_title(title)).resolve_scale(
        color="independent", strokeDash="independent"
    )
    found: alt.VConcatChart = both.configure_view(stroke=None).configure_axis(grid=False)
    return found


def _percentiles(samples: Samples, begin_ns: int, bucket_s: int, name: str, percent: int, _: str) -> list[Row]:
    bucket = (samples.t_ns - begin_ns) // (bucket_s * 1_000_000_000)
    rows = []
    for place in range(int(bucket.max(initial=-1)) + 1):
        inside = samples.seconds[bucket == place]
        value = float(np.percentile(inside, percent)) * 1e3 if len(inside) else None
        rows.append({"t": (place + 0.5) * bucket_s, "value": value, "line": name, "samples": len(inside)})
    return rows


def _bands(verdicts: Iterable[Verdict], begin_unix_ns: int, long_s: float) -> list[Row]:
    rows = []
    for verdict in verdicts:
        at = [(t - begin_unix_ns) / 1e9 for t in (verdict.window_start_unix_ns, verdict.window_end_unix_ns)]
        t0, t1 = max(at[0], 0.0), min(at[1], long_s)
        if t1 > t0:
            rows.append({"t0": t0, "t1": t1, "kind": str(verdict.kind), "text": verdict.text})
    return rows


def _panel(
    rows: list[Row], bands: list[Row], label: str, lines: Iterable[tuple[str, int, str]], begin: int, long_s: float
) -> alt.LayerChart:
    names, colours = [name for name, _, _ in lines], [colour for _, _, colour in lines]
    x = alt.X(
        "t:Q", title=f"seconds since {as_time(begin)}", scale=alt.Scale(domain=[0, max(long_s, 1e-3)], nice=False)
    )
    shade = alt.Chart(alt.InlineData(values=bands)).mark_rect(color="#6B6B6B", opacity=0.15)
    name = alt.Chart(alt.InlineData(values=bands)).mark_text(align="left", baseline="top", dx=3, dy=3, color="#555555")
    line = alt.Chart(alt.InlineData(values=rows)).mark_line(point=alt.OverlayMarkDef(size=12))
    drawn = line.encode(
        x=x,
        y=alt.Y("value:Q", title="ms", scale=alt.Scale(zero=True)),
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=colours), legend=alt.Legend(title=None)),
        strokeDash=alt.StrokeDash("line:N", scale=alt.Scale(domain=names, range=[[1, 0], [5, 3]]), legend=None),
        tooltip=["line:N", alt.Tooltip("value:Q", format=".1f"), "samples:Q"],
    )
    under = [
        shade.encode(x=alt.X("t0:Q"), x2="t1:Q", tooltip=["text:N"]),
        name.encode(x=alt.X("t0:Q"), y=alt.value(0), text="kind:N"),
    ]
    return alt.LayerChart(layer=[*under, drawn]).properties(width=WIDTH, height=140, title=label)


def _letters(rows: list[Row], x_title: str, y: alt.Y) -> list[alt.Chart]:
    """Return the letters: a layer an ink, since a mark's ink cannot come from a scale that the bars' colour has."""
    found = []
    for ink in sorted({row["ink"] for row in rows}):
        data = alt.InlineData(values=[row for row in rows if row["ink"] == ink])
        text = alt.Chart(data).mark_text(color=ink, fontSize=11, fontWeight="bold", clip=True)
        found.append(text.encode(x=alt.X("middle:Q", title=x_title), y=y, text="letter:N"))
    return found


def _named(cls: LedgerClass) -> str:
    return f"{LOOKS[cls].letter}  {LOOKS[cls].label}"


def _colours(used: list[LedgerClass]) -> alt.Color:
    scale = alt.Scale(domain=[_named(cls) for cls in used], range=[LOOKS[cls].colour for cls in used])
    return alt.Color(
        "class:N", scale=scale, legend=alt.Legend(title=None, orient="bottom", columns=6, symbolType="square")
    )


def _title(title: Title) -> alt.TitleParams:
    """Return a title with what it says below, wrapped at words: half of a verdict is worse than none."""
    lines, line = [], ""
    for word in title[1].split():
        if line and len(line) + len(word) >= _WRAP:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return alt.TitleParams(
        title[0], subtitle=[*lines, line], anchor="start", fontSize=15, subtitleFontSize=12, offset=10
    )


def _finished(chart: alt.LayerChart, title: Title, height: int) -> alt.LayerChart:
    sized = chart.properties(width=WIDTH, height=height, title=_title(title))
    found: alt.LayerChart = sized.configure_view(stroke=None).configure_axis(grid=False)
    return found
