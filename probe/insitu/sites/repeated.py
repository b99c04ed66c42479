"""Sites whose module runs several times in a step: its last call is kept, and that it has others is said. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from insitu.sites.never_fired import SEPARATOR

REPEATED: Final = "site_repeated"
"""`events.kind` of the row."""


class Repeated:
    """Remembers which sites of one session were said to fire several times."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, fires: Mapping[str, int]) -> str | None:
        """Return what to say of sites that were not told of yet, None of none. fires: name -> times in a step."""
        new = [f"{name} x{times}" for name, times in fires.items() if name not in self._told]
        self._told.update(fires)
        return f"fires = k > 1 in the first step, and the last call is kept: {SEPARATOR.join(new)}" if new else None
