"""Which rule is followed at which site: the first of its kind that names it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from insitu.rules.rule import Rule
from insitu.rules.text import rule_text
from insitu.sites.site import Site, is_named


@dataclass(frozen=True, slots=True)
class Match:
    """Where one rule is followed."""

    rule: Rule
    sites: tuple[Site, ...]
    """No earlier rule of its kind (what it takes) names these."""
    num_named: int
    """Sites that it names, followed there or not."""


def matches_of(rules: Sequence[Rule], sites: Sequence[Site]) -> list[Match]:
    """Return where each rule is followed, in order of the rules."""
    taken: dict[str, set[int]] = {}
    found = []
    for rule in rules:
        before = taken.setdefault(rule.take, set())
        named = [site for site in sites if is_named(rule.sites, site)]
        followed = tuple(site for site in named if site.number not in before)
        before |= {site.number for site in followed}
        found.append(Match(rule, followed, len(named)))
    return found


def never_followed(rules: Sequence[Rule], sites: Sequence[Site]) -> dict[int, str]:
    """Return, by place, a line about each rule that takes nothing, since earlier ones are followed at all its sites."""
    return {
        place: f"rule {place + 1} ({rule_text(match.rule)}) takes nothing: earlier rules of its kind name all its sites"
        for place, match in enumerate(matches_of(rules, sites))
        if match.num_named and not match.sites
    }
