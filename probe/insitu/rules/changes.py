"""Rules that change while a model runs: checked when they are set, at work from the next step on, over by themselves.

Only sites that were attached can be named: the graph, the slabs and what a quiet step costs stay as they are. Memory
for rows and statistics is made on the thread that sets the rules; the step thread only changes over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Final

from insitu.flight.settings import FlightRule
from insitu.rules.first_match import never_followed
from insitu.rules.in_force import InForce, Shapes
from insitu.rules.rule import ROWS, SUMMARY, Rule, RuleError, Standing, check_fit, check_time
from insitu.rules.text import rule_text
from insitu.sites.catalogue import Catalogue
from insitu.sites.site import SiteError
from insitu.slabs.rows import ROW_BUDGET_BYTES, slab_bytes_of

if TYPE_CHECKING:
    from insitu.session.step import StepRecord

logger = logging.getLogger("insitu")

BY_ATTACH: Final = "attach"
"""Who set version 0."""
Calibrate = Callable[[InForce], Mapping[int, int]]
Tell = Callable[[str, str, int], None]
"""Takes kind, text and step of an event."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Rules that were set, by whom, and for how long."""

    rules: InForce
    who: str
    for_s: float | None = None

    def text(self) -> str:
        what = "; ".join(map(rule_text, _set_rules(self.rules))) or "no rule"
        how_long = "" if self.for_s is None else f" for {self.for_s:g} s"
        return f"version {self.rules.version} by {self.who}{how_long}: {what}"


def _set_rules(rules: InForce) -> tuple[Rule, ...]:
    """Return the rules without what the flight recorder is armed with, which stays."""
    return tuple(rule for rule in rules.plan.rules if not isinstance(rule, FlightRule))


def _is_fixed(rule: Rule) -> bool:
    """Return whether a rule of attach stays whatever is set: its memory is made once."""
    return isinstance(rule, FlightRule) or rule.take not in (ROWS, SUMMARY)


class RuleChanges:
    """Which rules a session follows. `turn` and `learn` run on the step thread; the others on any."""

    def __init__(self, first: InForce, calibrate: Calibrate = lambda rules: {}) -> None:
        """calibrate: measures what the statistics of rules take, by site."""
        self._calibrate = calibrate
        self.tell: Tell = lambda kind, text, step_id: None
        """Where to say that other rules are in force; the session gives it."""
        self.fixed = ""
        """Why these rules cannot change, where they cannot."""
        self._base = self._now = _Order(first, BY_ATTACH)
        self._temporary: _Order | None = None
        self._deadline_ns = 0
        self._last_version = 0
        self._roomier: dict[_Order, _Order] = {}
        """The same rules with memory for rows of more sites; the step thread changes over."""
        self._shapes: Shapes | None = None
        self._lock = Lock()
        self._setting = Lock()

    def start_over(self) -> None:
        """Be a forked child's: nobody holds its locks, and steps on their way are the parent's."""
        self._lock, self._setting = Lock(), Lock()
        for order in (self._base, self._now, self._temporary):
            if order is not None:
                order.rules.start_over()

    # -- step thread ---------------------------------------------------------------------------------------------

    def turn(self, record: StepRecord) -> InForce:
        """Return the rules that a step begins with."""
        if self._roomier:
            self._change_over()
        order = self._due_at(record.t0_ns)
        if order is not self._now:
            self._change_to(order, record.step_id)
        return order.rules

    def _change_over(self) -> None:
        with self._lock:
            roomier, self._roomier = self._roomier, {}
            self._base, self._now = roomier.get(self._base, self._base), roomier.get(self._now, self._now)
            if self._temporary is not None:
                self._temporary = roomier.get(self._temporary, self._temporary)

    def _due_at(self, t_ns: int) -> _Order:
        temporary = self._temporary
        return self._base if temporary is None or t_ns >= self._deadline_ns else temporary

    def _change_to(self, order: _Order, step_id: int) -> None:
        before = self._now
        with self._lock:
            self._now = order
            if before is self._temporary and order is self._base:
                self._temporary = None
        if before.for_s is not None and order.rules.version < before.rules.version:
            text = f"version {order.rules.version} again: the time of version {before.rules.version} is over"
        else:
            text = f"{order.text()} (was version {before.rules.version})"
        self.tell("rules_in_force", text, step_id)

    def learn(self, shapes: Shapes) -> None:
        """The first step is over: widths are known."""
        for order in self._all_orders(shapes):
            order.rules.learn(shapes)

    def _all_orders(self, shapes: Shapes) -> set[_Order]:
        """Return what is and will be in force, and take note of shapes for what is set from now on."""
        with self._lock:
            self._shapes = shapes
            return {order for order in (self._base, self._now, self._temporary) if order is not None}

    # -- any thread ----------------------------------------------------------------------------------------------

    def make_room(self, shapes: Shapes) -> None:
        """Sites fired that had not so far: rules that take their rows get memory for them, from the next step on."""
        with self._setting:
            orders = self._all_orders(shapes)
            renewed = {order: replace(order, rules=order.rules.renewed(shapes)) for order in orders}
            self._roomier = {old: new for old, new in renewed.items() if new.rules is not old.rules}

    def standing(self) -> Standing:
        """Return what is in force, and what is next."""
        now, t_ns = self._now, time.monotonic_ns()
        left_s = None if now.for_s is None else max(0, self._deadline_ns - t_ns) / 1e9
        return Standing(now.rules.version, _set_rules(now.rules), left_s, self._due_at(t_ns).rules.version)

    def unnamed(self, rules: Sequence[Rule]) -> dict[int, str]:
        """Return, by place, why rules name no site here, with the nearest names."""
        attached = Catalogue(self._base.rules.plan.sites, {}, {})
        found = {}
        for number, rule in enumerate(rules):
            try:
                attached.find(rule.sites)
            except SiteError as error:
                found[number] = f"{error}; only sites that were attached can be named (attach takes them as rules)"
        return found

    def never_followed(self, rules: Sequence[Rule]) -> dict[int, str]:
        """Return, by place, a line about each rule that takes nothing here behind earlier ones."""
        return never_followed(rules, self._base.rules.plan.sites)

    def check(self, rules: Sequence[Rule]) -> InForce:
        """Return the rules as they would be at work, without memory for rows. Raises RuleError.

        Rules that name no site here are no error: another rank may have it.
        """
        if self.fixed:
            raise RuleError(self.fixed)
        now = self._base.rules
        check_fit(rules, now.plan.max_rows)
        kept = [rule for rule in now.plan.rules if _is_fixed(rule)]
        asked = [rule for rule in rules if rule not in kept]
        for rule in filter(_is_fixed, asked):
            raise RuleError(f"take={rule.take!r}: statistics of other packages are those that attach was given")
        fresh = InForce(replace(now.plan, rules=(*asked, *kept)), now.device, self._last_version + 1)
        needed = 2 * slab_bytes_of(fresh.forms(self._shapes or {}), now.plan.max_rows)
        most = max(ROW_BUDGET_BYTES, now.row_slabs.num_bytes if now.row_slabs else 0)
        if needed > most:
            raise RuleError(
                f"the rows of two steps would take {needed >> 20} MiB, and a session has {most >> 20}: name fewer "
                "sites, use cast= or topk=, or attach with a smaller max_rows"
            )
        return fresh

    def set_here(self, rules: Sequence[Rule], who: str, for_s: float | None) -> int:
        """As `set`, where this session is all there is: each rule has to name a site of it."""
        for why in self.unnamed(rules).values():
            raise RuleError(why)
        return self.set(rules, who, for_s)

    def set(self, rules: Sequence[Rule], who: str, for_s: float | None = None, version: int | None = None) -> int:
        """Put rules in force from the next step on; return their version (one more than the last, if not given).

        for_s: for so long, then what was set without an end is in force again. A version that is not newer than the
        last changes nothing. Raises RuleError, and nothing changes.
        """
        check_time(for_s)
        with self._setting:
            if version is not None and version <= self._last_version:
                return self._last_version
            fresh = self.check(rules)
            fresh.version = self._last_version + 1 if version is None else version
            for line in self.never_followed(rules).values():
                logger.warning("insitu: %s", line)
            if self._shapes is not None:
                fresh.learn(self._shapes)
                fresh.statistics_ns = self._calibrate(fresh)
            self._put(_Order(fresh, who, for_s))
            return fresh.version

    def _put(self, order: _Order) -> None:
        with self._lock:
            if self._shapes is not None and not order.rules.is_learned:  # the first step ended meanwhile
                order.rules.learn(self._shapes)
            self._last_version = order.rules.version
            if order.for_s is None:
                self._base = order
                self._temporary = None
            else:
                self._deadline_ns = time.monotonic_ns() + int(order.for_s * 1e9)
                self._temporary = order
