"""Which sites take a canary in every step: what the setting `t0` says. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from insitu.rules.rule import Rule
from insitu.sites.site import Site, is_named

ALL: Final = "all"
BOUNDARY: Final = "boundary"
TIERS: Final = (ALL, BOUNDARY)
"""What `t0` may be: canaries at all sites, or at stage boundaries and routers (whose loads rest on them) only."""


def is_kept(site: Site) -> bool:
    """Return whether a site has its canary whatever `t0` says."""
    return site.boundary or site.num_experts > 0


def tapped(sites: Sequence[Site], rules: Sequence[Rule], t0: str) -> tuple[Site, ...]:
    """Return the sites that are tapped, numbered anew: at `boundary` those that have a canary or that a rule names."""
    if t0 == ALL:
        return tuple(sites)
    left = [site for site in sites if is_kept(site) or any(is_named(rule.sites, site) for rule in rules)]
    return tuple(replace(site, number=number) for number, site in enumerate(left))


def without_canary(sites: Sequence[Site], t0: str) -> frozenset[int]:
    """Return the numbers of the sites that take nothing in a quiet step."""
    return frozenset() if t0 == ALL else frozenset(site.number for site in sites if not is_kept(site))
