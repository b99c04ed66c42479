"""What rules would take of stated traffic: rows, bytes, memory. Pure arithmetic; nothing here was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from insitu.row_forms import ITEM_BYTES, RowForm, form_of
from insitu.rules.first_match import matches_of
from insitu.rules.rule import ROWS, SUMMARY, Rule
from insitu.sites.site import Site

CAPTURE_BYTES: Final = 88
"""What a row of `captures` takes beside its values: identity, step, site, request, row, position, type, shape."""
STATISTICS_BYTES: Final = 995
"""A row of `statistics`."""
SUMMARY_BYTES: Final = 55
"""A row of `summaries` at a boundary."""
STEP_BYTES: Final = 52
"""A row of `steps` without its row map."""
ENTRY_BYTES: Final = 36
"""A request in a row map."""
INTERVAL_BYTES: Final = 65
NUM_INTERVALS: Final = 4
"""Intervals of a step that waits, computes and sends."""
PHASES: Final = ("decode", "prefill")
GIB_AN_HOUR: Final = 3600 / (1 << 30)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank is taken to run."""

    batch: int = 8
    """Requests in a decode step, a row each."""
    prompt: int = 512
    """Rows of a prefill step, all of one request."""
    decode_ms: float = 25.0
    prefill_ms: float = 100.0
    prefill_share: float = 0.05
    """Of steps."""
    opted_in: float = 0.01
    """Share of requests that ask for rows."""

    @property
    def steps_per_s(self) -> Mapping[str, float]:
        """By phase, of a rank that always has work."""
        mean_s = (self.prefill_share * self.prefill_ms + (1 - self.prefill_share) * self.decode_ms) / 1e3
        return {"decode": (1 - self.prefill_share) / mean_s, "prefill": self.prefill_share / mean_s}

    def num_requests(self, phase: str) -> int:
        return self.batch if phase == "decode" else 1

    def num_rows(self, axis: str, phase: str) -> int:
        """Valid rows of a site on this axis in a step."""
        return self.prompt if (axis, phase) == ("tokens", "prefill") else self.num_requests(phase)

    def chosen(self, rule: Rule) -> float:
        """Share of requests that a rule means."""
        if isinstance(rule.requests, str):
            return 1.0 if rule.requests == "all" else self.opted_in
        return rule.requests + (1 - rule.requests) * self.opted_in

    def rows_taken(self, rule: Rule, axis: str, phase: str) -> float:
        """Rows that a rule takes of a step, on average."""
        if rule.phase not in (None, phase):
            return 0.0
        requests = self.num_requests(phase)
        each = self.num_rows(axis, phase) // requests
        kind, _, number = rule.rows.partition(":")
        kept = {"all": each, "last": 1, "first": min(each, int(number or 0)), "every": each / int(number or 1)}
        return requests * self.chosen(rule) * (kept[kind] if axis != "samples" else 1)


@dataclass(frozen=True, slots=True)
class Line:
    """What one rule takes."""

    rule: Rule
    sites: tuple[Site, ...]
    """Those it is followed at: no earlier rule of its kind names them."""
    num_named: int
    unknown: tuple[str, ...]
    """Sites the width of whose rows is not known: left out of the bytes."""
    step_bytes: Mapping[str, float] = field(default_factory=dict)
    """By phase, on average."""
    bytes_per_s: float = 0.0
    asked_bytes_per_s: float = 0.0
    """Without `max_bytes_per_s`."""

    @property
    def is_bounded(self) -> bool:
        return self.bytes_per_s < self.asked_bytes_per_s


def lines_of(
    rules: Sequence[Rule], sites: Sequence[Site], shapes: Mapping[int, tuple[int, str]], traffic: Traffic
) -> list[Line]:
    """Return what each rule takes of these sites: the first of its kind that names a site is followed there."""
    return [_line(each.rule, each.sites, each.num_named, shapes, traffic) for each in matches_of(rules, sites)]


def _line(
    rule: Rule, sites: Sequence[Site], num_named: int, shapes: Mapping[int, tuple[int, str]], traffic: Traffic
) -> Line:
    unknown = [site.name for site in sites if rule.take == ROWS and site.number not in shapes]
    step_bytes = {}
    for phase in PHASES:
        if rule.take == ROWS:
            forms = forms_of(rule, sites, shapes)
            sizes = ((traffic.rows_taken(rule, site.axis, phase), forms.get(site.number)) for site in sites)
            step_bytes[phase] = sum(n * (form.num_bytes + CAPTURE_BYTES) for n, form in sizes if form is not None)
        elif rule.take == SUMMARY:
            counted = [site for site in sites if site.shard != "partial" and rule.phase in (None, phase)]
            step_bytes[phase] = len(counted) * STATISTICS_BYTES / rule.period
        else:
            step_bytes[phase] = 0.0
    asked = sum(step_bytes[phase] * traffic.steps_per_s[phase] for phase in PHASES)
    bound = asked if rule.rate is None else min(asked, rule.rate)
    return Line(rule, tuple(sites), num_named, tuple(unknown), step_bytes, bound, asked)


def forms_of(rule: Rule, sites: Sequence[Site], shapes: Mapping[int, tuple[int, str]]) -> dict[int, RowForm]:
    """Return how a rule keeps the rows of sites whose shape is known."""
    known = (site.number for site in sites if site.number in shapes and shapes[site.number][1] in ITEM_BYTES)
    return {number: form_of(rule, *shapes[number]) for number in known}


def always_bytes(num_boundaries: int, traffic: Traffic) -> dict[str, float]:
    """Return what a step takes without any rule, by phase: its summaries, its row map, its intervals."""
    fixed = num_boundaries * SUMMARY_BYTES + STEP_BYTES + NUM_INTERVALS * INTERVAL_BYTES
    return {phase: float(fixed + traffic.num_requests(phase) * ENTRY_BYTES) for phase in PHASES}


def per_s(step_bytes: Mapping[str, float], traffic: Traffic) -> float:
    """Return bytes a second of what takes so many a step."""
    return sum(step_bytes[phase] * traffic.steps_per_s[phase] for phase in PHASES)
