"""The two canvases: their JavaScript and CSS as Streamlit components, one a page."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import streamlit as st

WEB: Final = Path(__file__).with_name("web")
SHARED: Final = ("stream.js", "draw.js", "strip.js")
PIPELINE: Final = (
    "span_store.js",
    "viewport.js",
    "timeline.js",
    "timeline_input.js",
    "span_card.js",
    "heat.js",
    "breakdown.js",
    "timeline_panel.js",
    "pipeline.js",
)
PARTS: Final = {"live": (*SHARED, "live.js"), "pipeline": (*SHARED, *PIPELINE)}
STYLES: Final = ("style.css", "pipeline.css")


def script_of(page: str) -> str:
    """Return the JavaScript of a page's component: one module, the shared parts first."""
    return "\n".join((WEB / name).read_text() for name in PARTS[page])


def style() -> str:
    """Return the CSS of all components."""
    return "\n".join((WEB / name).read_text() for name in STYLES if (WEB / name).exists())


@cache
def component(page: str) -> Callable[..., Any]:
    """Return the component of a page (`live`, `pipeline`), registered once a process."""
    registered: Callable[..., Any] = st.components.v2.component(
        f"insitu_{page}", css=style(), js=script_of(page), isolate_styles=True
    )
    return registered
