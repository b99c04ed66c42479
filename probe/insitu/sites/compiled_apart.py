"""Sites inside of a part that is compiled by itself, where no tap runs: said with what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMPILED_APART: Final = "compiled_apart"
"""`events.kind` of the row."""
MAX_PARTS: Final = 3
"""So many are named."""


class CompiledApart:
    """Remembers which sites of one session were said to lie in such parts."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, parts: Mapping[str, str]) -> str | None:
        """Return what to say of sites that were not told of yet, None of none. parts: site -> path of its part."""
        new = {site: part for site, part in parts.items() if site not in self._told}
        self._told.update(new)
        return why(new) if new else None


def why(parts: Mapping[str, str]) -> str:
    """Return why these sites never fire, and the remedy."""
    named = list(dict.fromkeys(parts.values()))
    more = f" and {len(named) - MAX_PARTS} more" if len(named) > MAX_PARTS else ""
    are = "is" if len(named) == 1 else "are"
    return (
        f"{len(parts)} sites are not observed, since {', '.join(named[:MAX_PARTS])}{more} {are} compiled by itself: "
        "compile the attached model as a whole, torch.compile(model)"
    )
