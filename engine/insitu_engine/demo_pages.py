"""The demo's dashboard: started beside the traffic, opened where there is a browser; the demo goes on without it."""

from __future__ import annotations

import os
import re
import sys
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from insitu.cli import command_name
from insitu_engine.processes import POLL_S, Child, Children

GUIDE: Final = (
    "  Live says what limits, since when and for whom; Pipeline shows a lane a rank, the newest on the right.",
    "  Blue C computes, orange U waits for the stage before it, brown D for the one after it; pale - has no work.",
    "  Your own model, two lines:  import insitu  and  session = insitu.attach(model)  fill ./insitu-store;",
    "  {insitu} judge ./insitu-store  and  {insitu} dashboard ./insitu-store  then show it as here.",
)


class DemoPages:
    """A dashboard over the demo's store."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.url: str | None = None
        self._say = say
        self._child: Child | None = None

    def start(self, children: Children, store: Path) -> None:
        """Start the dashboard; its address is told as soon as it is known. Raises Interrupted."""
        arguments = ["dashboard", str(store), "--port", "0"]
        self._child = children.start("the dashboard", arguments, on_stderr=self._on_line, vital=False)

    def _on_line(self, line: str) -> None:
        found = re.search(r"dashboard on (http://\S+)", line)
        if found is None:
            if line.startswith("Error: "):
                self._say(f"no dashboard: {line.removeprefix('Error: ')}")
            return
        self.url = found[1]
        for text in (f"the dashboard is on {self.url}", *GUIDE):
            self._say(text.format(insitu=command_name()))
        if has_display(os.environ):
            webbrowser.open(self.url)

    def stay(self, children: Children) -> None:
        """Keep the pages of what was recorded open until somebody ends it."""
        if self._child is None or self._child.ended or self.url is None:
            return
        self._say(f"the traffic is over; its pages stay on {self.url} until Ctrl-C")
        while not self._child.ended and not children.interrupted.wait(POLL_S):
            pass


def has_display(environment: Mapping[str, str]) -> bool:
    """Tell whether a browser could show itself to whoever started this."""
    if "SSH_CONNECTION" in environment:
        return False
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))
