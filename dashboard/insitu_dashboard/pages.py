"""The pages, as Streamlit runs them: once when opened and when something is chosen, not while data flows.

A page hands its canvas a first picture and the address of the stream, and the canvas draws by itself from then on.
Only when a browser cannot open the stream does the page run again each second and hand over a new picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlencode

import streamlit as st

from insitu_dashboard import tables
from insitu_dashboard.components import component
from insitu_dashboard.hub import Hub
from insitu_dashboard.links import NAMES, Link, Selected, parse, query
from insitu_dashboard.notices import State
from insitu_dashboard.picture import WINDOWS_S

LOAD_S: Final = 20.0
"""How long a page waits for the first look into a large store before it says that it is still reading."""
FALLBACK_S: Final = 1.0
TABLE_S: Final = 2.0
TIMELINE_S: Final = 10
MOST_PIXELS: Final = 1_600
WINDOW_NAMES: Final = {10: "10 s", 60: "60 s", 300: "5 min", 3600: "1 h"}

LAYOUT: Final = ".stMainBlockContainer { padding: 3.8rem 2rem 2rem; max-width: 100rem; }"
"""Streamlit leaves a hand's breadth above a page; here that is where the answer belongs."""

_hub: Hub | None = None


def use(hub: Hub) -> None:
    """Let all pages of this process read from `hub`."""
    global _hub
    _hub = hub


def run() -> None:
    """Draw the page that the address names."""
    assert _hub is not None, "the dashboard's server gives the pages their hub before the first one is opened"
    st.set_page_config(page_title="insitu", layout="wide")
    st.html(f"<style>{LAYOUT}</style>")
    _hub.wait_loaded(LOAD_S)
    pages = [
        st.Page(live, title="Live", url_path="live", default=True),
        st.Page(pipeline, title="Pipeline", url_path="pipeline"),
    ]
    st.navigation(pages, position="top").run()


def live() -> None:
    """Is it healthy; if not, where and why."""
    hub, link = _opened()
    link = _controls("live", hub, link)
    _mount(lambda: _canvas("live", hub))
    _twins(link, lambda: _live_twins(*_opened()))


def pipeline() -> None:
    """Who waits for whom, a rank a lane."""
    hub, link = _opened()
    link = _controls("pipeline", hub, link)
    link = _filters(hub, link)
    _mount(lambda: _canvas("pipeline", hub))
    _twins(link, lambda: _pipeline_twins(*_opened()))


# -- what a page is made of -------------------------------------------------------------------------------------------


def _opened() -> tuple[Hub, Link]:
    assert _hub is not None, "run() was called first"
    return _hub, parse(st.query_params.to_dict())


def _go(link: Link) -> None:
    """Write what is chosen into the address, so that it can be sent to somebody."""
    wanted = query(link)
    for name in NAMES:
        if name in st.query_params and name not in wanted:
            del st.query_params[name]
    for name, value in wanted.items():
        if st.query_params.get(name) != value:
            st.query_params[name] = value


def _run_name(name: str) -> str:
    run, _, replica = name.partition(".")
    return f"run {run}" + (f", replica {replica}" if replica else "")


def _controls(page: str, hub: Hub, link: Link) -> Link:
    runs = hub.runs()
    left, right = st.columns([3, 2], vertical_alignment="center")
    with left:
        window = st.segmented_control(
            "Window of heat map and breakdown" if page == "pipeline" else "Window",
            WINDOWS_S,
            format_func=lambda seconds: WINDOW_NAMES[seconds],
            default=link.window_s,
            key=f"window-{link.window_s}",
            label_visibility="visible" if page == "pipeline" else "collapsed",
        )
    shown = link.run or (runs[0] if runs else None)
    with right:
        choices = runs if shown is None or shown in runs else [shown, *runs]
        chosen = st.selectbox(
            "Run",
            choices,
            index=choices.index(shown) if shown else None,
            format_func=lambda name: _run_name(name) + (" (latest)" if runs and name == runs[0] else ""),
            key=f"run-{link.run}",
            label_visibility="collapsed",
            placeholder="the latest run",
        )
    changed = replace(link, window_s=window or link.window_s)
    if chosen is not None and chosen != shown:
        changed = replace(changed, run=chosen, t0_ns=None, t1_ns=None, is_live=True, selected=None)
    if changed != link:
        _go(changed)
        st.rerun()
    return changed


def _filters(hub: Hub, link: Link) -> Link:
    grid = json.loads(hub.picture(link.run, link.window_s))["grid"]
    stages, ranks = sorted({cell["stage"] for cell in grid}), sorted(cell["rank"] for cell in grid)
    if len(ranks) < 3:
        return link
    left, right = st.columns(2)
    with left:
        some = st.multiselect(
            "Stages", stages, default=[s for s in link.stages if s in stages], placeholder="all stages"
        )
    with right:
        few = st.multiselect("Ranks", ranks, default=[r for r in link.ranks if r in ranks], placeholder="all ranks")
    changed = replace(link, stages=tuple(some), ranks=tuple(few))
    if changed != link:
        _go(changed)
    return changed


def _mount(canvas: Callable[[], None]) -> None:
    every = FALLBACK_S if st.session_state.get("fallback") else None

    def drawn() -> None:
        if every is None and st.session_state.get("fallback"):
            st.rerun()  # the whole page: only so does the canvas get its clock
        canvas()

    st.fragment(drawn, run_every=every)()


def _canvas(page: str, hub: Hub) -> None:
    link = parse(st.query_params.to_dict())  # of now: what the canvas says runs this part alone again
    picture = hub.picture(link.run, link.window_s, link.paused_ns)
    fallback = bool(st.session_state.get("fallback"))
    wanted = {"win": str(link.window_s)} | ({"run": link.run} if link.run else {})
    stream = f"/api/live?{urlencode(wanted | ({'spans': '1'} if page == 'pipeline' else {}))}"
    component(page)(
        key=f"insitu-{page}",
        data={
            "stream": None if fallback or not link.is_live else stream,
            "spans_url": f"/api/spans?{urlencode(wanted)}",
            "picture": json.loads(picture),
            "spans": _first_spans(hub, link) if page == "pipeline" else None,
            "view": {"t0": str(link.t0_ns), "t1": str(link.t1_ns)} if link.t0_ns is not None else None,
            "selected": _selected_json(link.selected),
            "paused": not link.is_live,
            "filter": {
                "stages": list(link.stages) or None,
                "ranks": list(link.ranks) or None,
                "classes": list(link.classes) or None,
            },
            "window_s": TIMELINE_S if page == "pipeline" else link.window_s,
        },
        on_view_change=lambda: _on_view(page),
        on_selected_change=lambda: _on_selected(page),
        on_paused_change=lambda: _on_paused(page),
        on_fallback_change=_on_fallback,
    )


def _first_spans(hub: Hub, link: Link) -> Any:
    if link.is_live:
        found = hub.live_spans(link.run)
        return None if found is None else json.loads(found[1])
    end = link.t1_ns or 0
    text = hub.spans(link.run, link.t0_ns or end - TIMELINE_S * 1_000_000_000, end, MOST_PIXELS)
    return None if text is None else json.loads(text)


def _selected_json(selected: Selected | None) -> dict[str, Any] | None:
    if selected is None:
        return None
    return {"rank": selected.rank, "step": selected.step, "cls": selected.cls, "t0": str(selected.t0_ns)}


# -- what the canvas says ---------------------------------------------------------------------------------------------


def _said(page: str, name: str) -> Any:
    return getattr(st.session_state.get(f"insitu-{page}"), name, None)


def _on_view(page: str) -> None:
    said = _said(page, "view")
    link = parse(st.query_params.to_dict())
    if said:
        _go(replace(link, t0_ns=int(said["t0"]), t1_ns=int(said["t1"])))
    elif link.is_live:
        _go(replace(link, t0_ns=None, t1_ns=None))
    else:
        _go(replace(link, t0_ns=None))


def _on_selected(page: str) -> None:
    said = _said(page, "selected")
    selected = (
        Selected(int(said["rank"]), int(said["t0"]), str(said["cls"]), int(said.get("step", -1))) if said else None
    )
    _go(replace(parse(st.query_params.to_dict()), selected=selected))


def _on_paused(page: str) -> None:
    said = _said(page, "paused")
    link = parse(st.query_params.to_dict())
    if said and said.get("t1"):
        _go(replace(link, is_live=False, t1_ns=link.t1_ns or int(said["t1"])))
    else:
        _go(replace(link, is_live=True, t0_ns=None, t1_ns=None))


def _on_fallback() -> None:
    st.session_state["fallback"] = True


# -- table twins ------------------------------------------------------------------------------------------------------


def _twins(link: Link, draw: Callable[[], None]) -> None:
    wanted = st.toggle("The same as tables", value=link.with_table, key=f"table-{link.with_table}")
    if wanted != link.with_table:
        _go(replace(link, with_table=wanted))
        st.rerun()
    if wanted:
        st.fragment(draw, run_every=TABLE_S if link.is_live else None)()


def _table(title: str, rows: Any, key: str) -> None:
    st.subheader(title, anchor=False)
    if rows.num_rows:
        st.dataframe(rows, key=key, hide_index=True)
    else:
        st.caption("Nothing yet.")


def _live_twins(hub: Hub, link: Link) -> None:
    picture = json.loads(hub.picture(link.run, link.window_s, link.paused_ns))
    _table("What each rank does now, % of the last 5 s", tables.shares_table(picture, part="grid"), "table-grid")
    window = WINDOW_NAMES[link.window_s]
    _table(f"Where the time went, % of the last {window}", tables.shares_table(picture, part="mix"), "table-mix")
    _table("Latency", tables.latency_table(picture), "table-latency")
    _table("Alarms", tables.alarms_table(picture), "table-alarms")


def _pipeline_twins(hub: Hub, link: Link) -> None:
    picture = json.loads(hub.picture(link.run, link.window_s, link.paused_ns))
    if picture["header"]["state"] in (State.EMPTY, State.ERROR, State.LOADING):
        st.caption("Nothing yet.")
        return
    spans = _window_spans(hub, link)
    if spans is not None:
        _table(f"Timeline, newest {tables.MOST_ROWS:,} at most", tables.spans_table(spans), "table-spans")
    _table("Heat map", tables.heat_table(picture), "table-heat")
    _table("Breakdown, % of the window", tables.shares_table(picture, part="mix"), "table-breakdown")


def _window_spans(hub: Hub, link: Link) -> Any:
    if link.t0_ns is None or link.t1_ns is None:
        return _first_spans(hub, link)
    text = hub.spans(link.run, link.t0_ns, link.t1_ns, MOST_PIXELS)
    return None if text is None else json.loads(text)
