"""`insitu top` in a terminal: the picture of a run, made anew each second."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from insitu_collector.ledger.palette import LOOKS
from insitu_collector.rows.slices import full_name
from insitu_dashboard import top_text
from insitu_dashboard.hub import Hub
from insitu_dashboard.notices import Level, State
from insitu_dashboard.picture import DEFAULT_WINDOW_S, blank_picture

EVERY_S: Final = 1.0
SOUND: Final = "#3B7A57"
"""The edge of a verdict that says nothing is wrong, ..."""
WRONG: Final = "#C4501B"
"""... and of one that says something is."""
_QUIET: Final = ("healthy", "inconclusive")


class Top(App[None]):
    """One run of one store. It reads what the hub holds and asks nothing else of anybody."""

    TITLE = "insitu top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; }
    #strip { height: auto; background: $panel; padding: 0 1; }
    #notice { height: auto; padding: 0 1; color: $warning; display: none; }
    #verdict { height: auto; max-height: 50%; padding: 0 1; border-left: outer $accent; margin: 1 0; }
    #numbers { height: auto; padding: 0 1; margin-bottom: 1; }
    #rest { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p", "pause", "Pause"),
        Binding("r", "next_run", "Next run"),
    ]

    def __init__(self, hub: Hub, run: str | None = None) -> None:
        super().__init__()
        self._hub = hub
        self._run = run
        self._is_paused = False
        self._picture: dict[str, Any] = blank_picture(State.LOADING)

    def compose(self) -> ComposeResult:
        yield Static(id="strip")
        yield Static(id="notice")
        yield Static(id="verdict")
        yield Static(id="numbers")
        with VerticalScroll(id="rest"):
            yield Static(id="ranks")
            yield Static(id="alarms")
        yield Footer()

    def on_mount(self) -> None:
        self.look()
        self.set_interval(EVERY_S, self.look)

    def on_resize(self) -> None:
        self._draw()

    def look(self) -> None:
        """Take the newest picture, unless paused."""
        if not self._is_paused:
            self._picture = json.loads(self._hub.picture(self._run, DEFAULT_WINDOW_S))
        self._draw()

    def action_pause(self) -> None:
        """Hold the picture still, or go on."""
        self._is_paused = not self._is_paused
        self.look()

    def action_next_run(self) -> None:
        """Show the next of the store's recent runs."""
        runs = self._hub.runs()
        if runs:
            shown = full_name((self._picture["run"], self._picture["replica"]))
            place = runs.index(shown) if shown in runs else -1
            self._run = runs[(place + 1) % len(runs)]
            self._is_paused = False
            self.look()

    # -- what is drawn: Text, never markup, since names come from records -------------------------------------------

    def _draw(self) -> None:
        picture = self._picture
        head = Text(top_text.headline(picture))
        if self._is_paused:
            head.append("  PAUSED", style="bold reverse")
        self._put("strip", head)
        banner = top_text.notice(picture)
        self.query_one("#notice", Static).display = banner is not None
        self._put("notice", Text(banner or "", style="red" if _is_error(picture) else ""))
        self._draw_verdict(picture)
        self._put("numbers", Text(top_text.numbers(picture)))
        self._put("ranks", self._ranks(picture))
        lines = top_text.alarms(picture)
        self._put("alarms", Text("\n".join(["", "Alarms, newest first", *lines]) if lines else ""))

    def _draw_verdict(self, picture: dict[str, Any]) -> None:
        paragraphs = top_text.verdicts(picture)
        wrong = any(each["kind"] not in _QUIET for each in picture["verdicts"])
        panel = self.query_one("#verdict", Static)
        panel.display = bool(paragraphs)
        panel.styles.border_left = ("outer", WRONG if wrong else SOUND)
        self._put("verdict", Text("\n".join(paragraphs)))

    def _ranks(self, picture: dict[str, Any]) -> Text:
        rows = top_text.ranks(picture, self.size.width - 4)
        text = Text("What each rank does now (last 5 s)\n" if rows else "")
        for line, cells in rows:
            text.append(line)
            for cls, count in cells:
                look = LOOKS[cls]
                text.append(look.letter * count, style=f"{look.ink} on {look.colour}")
            text.append("\n")
        return text.append(top_text.legend([cells for _, cells in rows]))

    def _put(self, name: str, text: Text) -> None:
        self.query_one(f"#{name}", Static).update(text)


def _is_error(picture: dict[str, Any]) -> bool:
    return picture["notice"] is not None and picture["notice"]["level"] == Level.ERROR
