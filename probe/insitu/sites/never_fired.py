"""Sites that do not fire: said once the model has had steps enough, and taken back should they fire after all. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

ENOUGH_STEPS: Final = 10
"""Steps in which a site could have fired, after which it is said that it did not. Fewer than one round of a scheduler's
kinds of step (a prompt in pieces, a decode) would speak of branches that are just about to run."""
NEVER_FIRED: Final = "site_never_fired"
FIRED: Final = "site_fired"
"""`events.kind` of the rows; their text is the names of sites, in order of execution."""
SEPARATOR: Final = ", "


class NeverFired:
    """Remembers which sites of one session were said not to fire."""

    def __init__(self) -> None:
        self._told: dict[str, None] = {}

    def look(self, silent: Iterable[str]) -> list[tuple[str, str]]:
        """Return kind and text of the rows to write. silent: the sites that, by now, should have fired and have not."""
        now = list(silent)
        new = [name for name in now if name not in self._told]
        back = [name for name in self._told if name not in now]
        self._told = dict.fromkeys(now)
        rows = ((NEVER_FIRED, new), (FIRED, back))
        return [(kind, SEPARATOR.join(names)) for kind, names in rows if names]
