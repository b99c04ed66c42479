"""How far the periods of full steps are lengthened so that the probe keeps its budget. Pure.

Every period is lengthened by the same power of two. Whoever has doubled more often samples a subset of the steps of
whoever has doubled less (`hash64 % 4N == 0` is `hash64 % N == 0` too), so ranks that decide each for itself still have
steps in common, and no rank asks another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

MAX_DOUBLINGS: Final = 32
"""More would be no sampling at all: at a thousand steps a second one of 2^32 comes every seven weeks."""
FLOOR: Final = 0.1
"""Of the budget: what full steps may take however much the rest takes. Less, and a model so small that T0 alone is
over the budget would never tell a statistic."""
SLACK: Final = 0.7
"""Of what full steps may take: what they may take at half the period before it is halved. Nearer to 1, and a
measurement that is off by a tenth lengthens and shortens for ever."""
PATIENCE: Final = 3
"""Windows in a row that must say so before a period is halved. It is doubled at the first window that says so."""
MAX_PATIENCE: Final = 1024
"""A halving that had to be taken back doubles the patience, up to so many windows: a load that only looks light at the
longer period is tried less and less often."""
T0_WINDOWS: Final = 8
"""Windows in a row in which T0 alone is over the budget, after which it is said. Fewer would speak of a start."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the probe took in a stretch of steps, in ns."""

    step_ns: float
    """Of the steps themselves, without what full ones take on top: shares are of that."""
    t0_ns: float
    """What every step pays: taps, the work around a step, and the drain's for T0."""
    named_ns: float
    """Rows of requests that were asked for by name: never left out."""
    full_ns: float
    """Statistics, and rows that nobody asked for by name, had no period been lengthened."""
    is_blind: bool = False
    """Every step was full, and none like them was ever quiet: there is nothing to compare with."""

    @property
    def t0_share(self) -> float:
        return self.t0_ns / self.step_ns

    def allowance(self, budget: float) -> float:
        """Return the share of step time that full steps may take."""
        return max(budget - (self.t0_ns + self.named_ns) / self.step_ns, FLOOR * budget)

    def full_share(self, doublings: int) -> float:
        """Return the share of step time that full steps take at a period so often doubled."""
        return math.ldexp(self.full_ns / self.step_ns, -doublings)

    def share(self, doublings: int) -> float:
        """Return the share of step time that the probe takes in all."""
        return (self.t0_ns + self.named_ns) / self.step_ns + self.full_share(doublings)


@dataclass(frozen=True, slots=True)
class State:
    """What the governor has decided, and what it remembers of how it went."""

    doublings: int = 0
    """Every period is 2^doublings times the rule's."""
    num_calm: int = 0
    """Windows in a row in which half the period would have kept the budget."""
    patience: int = PATIENCE
    since_halved: int = MAX_PATIENCE
    """Windows since the last halving."""
    num_over: int = 0
    """Windows in a row in which T0 alone was over the budget."""

    @property
    def is_t0_over(self) -> bool:
        return self.num_over >= T0_WINDOWS


def decide(state: State, window: Window, budget: float) -> State:
    """Return the state after a window. budget: share of step time, in (0, 1]; 1 is no bound."""
    if budget >= 1:
        return state
    state = replace(
        state,
        since_halved=state.since_halved + 1,
        num_over=state.num_over + 1 if window.t0_share > budget else 0,
    )
    allowance = window.allowance(budget)
    needed = max(_needed(window, allowance), int(window.is_blind))
    if needed > state.doublings:
        return _lengthened(state, needed)
    if not state.doublings or window.full_share(state.doublings - 1) > SLACK * allowance:
        return replace(state, num_calm=0)
    num_calm = state.num_calm + 1
    if num_calm < state.patience:
        return replace(state, num_calm=num_calm)
    return _halved(state, num_calm)


def _needed(window: Window, allowance: float) -> int:
    """Return the fewest doublings that keep full steps within their allowance."""
    doublings = 0
    while window.full_share(doublings) > allowance and doublings < MAX_DOUBLINGS:
        doublings += 1
    return doublings


def _lengthened(state: State, doublings: int) -> State:
    """Lengthen at once. Soon after a halving, that one was a mistake: the next has to wait longer."""
    is_regret = state.since_halved <= state.patience
    patience = min(2 * state.patience, MAX_PATIENCE) if is_regret else PATIENCE
    return replace(state, doublings=doublings, num_calm=0, patience=patience, since_halved=MAX_PATIENCE)


def _halved(state: State, num_calm: int) -> State:
    """Halve the period; it is halved again at each further calm window."""
    return replace(state, doublings=state.doublings - 1, num_calm=num_calm, since_halved=0)
