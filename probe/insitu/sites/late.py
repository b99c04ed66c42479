"""Sites that did not fire in the first step: a rare branch, an expert nobody chose, a head in steps that sample.

What the first step tells of the others, dtype and width, such a site tells when it fires first.
"""

from __future__ import annotations

from collections.abc import Iterable


class LateSites:
    """Which sites have yet to fire, and whether one has since. Taps write it on the step thread; the drain reads."""

    def __init__(self) -> None:
        self.silent: set[int] = set()
        """Empty before the first step is over."""
        self.has_news = False
        """Whether one fired for which memory for rows may be made; who makes it puts this down."""

    def expect(self, sites: Iterable[int]) -> None:
        """The first step is over, and these sites did not fire in it."""
        self.silent.update(sites)

    def fired(self, site: int) -> None:
        """A site has fired; one of them, perhaps."""
        if site in self.silent:
            self.silent.discard(site)
            self.has_news = True

    def give_up(self, site: int) -> None:
        """One of them was called and gave nothing that has a sum."""
        self.silent.discard(site)
