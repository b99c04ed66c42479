"""Keeps one model's probe within its budget: measures what steps cost, lets the governor decide, and says what it did.

Steps are timed by it and read the period of the moment, on the step thread; the drain gives it what is finished
(`take`), and lets it look once a second (`look`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from insitu.overhead.governor import State, Window, decide
from insitu.overhead.step_costs import NOTHING, Burden, StepCosts, clock_of
from insitu.rules.sampling import is_sampled

if TYPE_CHECKING:
    from insitu.session.step import StepRecord
    from insitu.sites.site import Site
    from insitu.statistics.plugged import PluggedStatistics

logger = logging.getLogger("insitu")

WINDOW_NS: Final = 1_000_000_000
"""Step time that a decision rests on. Less, and single steps decide; more, and a grown load is answered late."""
LEAST_STEPS: Final = 8
"""And steps: the first of a model takes a second by itself."""
ROW_SITE_NS: Final = 5_000
"""What the rows of one site are taken to cost a step until that has been measured: a copy of a few rows."""
LEAST_QUIET: Final = 0.01
"""Of the time of steps: what is left for the model itself, however much a calibration says that statistics took."""
GOVERNOR: Final = "governor"
"""`events.kind` of an adjustment."""
T0_OVER: Final = "t0_over_budget"
"""`events.kind` of the one row that says that T0 alone is over the budget."""
STATISTICS: Final = "statistics"
CAPTURES: Final = "captures"
PLUGGED: Final = "plugin_statistics"
FULL_TABLES: Final = (STATISTICS, CAPTURES)
"""What only full steps make."""

Periods = Mapping[int, Sequence["Site"]]
"""By N the sites whose statistics are asked for in one step of N."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What the probe has spent so far, in ns."""

    around_ns: int
    """Wall time of the step thread before and after the model's own work."""
    in_steps_ns: int
    """Wall time inside steps."""
    drain_ns: int
    """CPU time of the drain."""
    drain_full_ns: Mapping[str, int]
    """Of that, by table of `FULL_TABLES`."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What taps cost a step of a few rows, in ns by site number."""

    t0_ns: Mapping[int, int] = field(default_factory=dict)
    statistics_ns: Mapping[int, int] = field(default_factory=dict)
    boundaries: frozenset[int] = frozenset()
    """Sites that keep their canaries whatever `t0` says."""
    num_row_sites: int = 0

    @property
    def t0_step_ns(self) -> int:
        return sum(self.t0_ns.values())

    @property
    def boundary_step_ns(self) -> int:
        return sum(ns for site, ns in self.t0_ns.items() if site in self.boundaries)


@dataclass(slots=True)
class _Drained:
    """What the drain spends on one table of full steps for a unit of burden: of the last windows, older ones less."""

    ns: float = 0.0
    burden: float = 0.0
    before_ns: int = 0
    expected: float = 0.0
    taken: float = 0.0
    named: float = 0.0

    def add(self, burden: Burden) -> None:
        self.expected += burden.expected
        self.taken += burden.governed + burden.named
        self.named += burden.named

    def close(self, total_ns: int) -> tuple[float, float]:
        """End a window: return what the drain would have spent at the rules' own periods, and on what was named."""
        self.ns = self.ns / 2 + max(0, total_ns - self.before_ns)
        self.burden = self.burden / 2 + self.taken
        rate = self.ns / self.burden if self.burden else 0.0
        spent = rate * self.expected, rate * self.named
        self.before_ns = total_ns
        self.expected = self.taken = self.named = 0.0
        return spent


class Overhead:
    """One model's account. `begin` and `end` run on the step thread, the rest on the drain."""

    def __init__(
        self,
        budget: float,
        run: str,
        device: str,
        periods: Callable[[StepRecord], Periods],
        plugged: PluggedStatistics | None = None,
    ) -> None:
        """budget: share of step time, in (0, 1]. run: 16 hex digits. periods: what rules ask of a step's kind.

        plugged: statistics of other packages, which are governed too.
        """
        self.budget = budget
        self.calibration = Calibration()
        """Set once, after the first step."""
        self.window: Window | None = None
        """The last that was decided on."""
        self.num_adjustments = 0
        self._run = run
        self._periods = periods
        self._plugged = plugged
        self._clock = clock_of(device)
        self._state = State()
        self._costs = StepCosts()
        self._drained = {table: _Drained() for table in FULL_TABLES}
        self._before = Spent(0, 0, 0, dict.fromkeys(FULL_TABLES, 0))
        self._taken_before_ns = 0.0
        self._num_steps = 0
        self._saved_ns = 0
        """What canaries inside stages cost in the last window."""
        self._asked: dict[int, tuple[Calibration, Periods, Burden]] = {}
        self._is_starting = True
        self._is_told = self._is_t0_told = False

    # -- step thread ---------------------------------------------------------------------------------------------

    def begin(self, record: StepRecord) -> None:
        """Say which periods hold in a step. Rows that nobody asked for by name are due where `is_due`."""
        record.doublings = self._state.doublings
        record.is_due = not record.doublings or is_sampled(self._run, record.step_id, 1 << record.doublings)

    def start(self, record: StepRecord) -> None:
        """The model's own work begins."""
        self._clock.begin(record)

    def stop(self, record: StepRecord) -> None:
        """It is over."""
        self._clock.end(record)

    # -- offline -------------------------------------------------------------------------------------------------

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """Take all that rules ask for, whatever it costs, inside a block."""
        budget, self.budget, self._state = self.budget, 1.0, State()
        try:
            yield
        finally:
            self.budget = budget

    # -- drain ---------------------------------------------------------------------------------------------------

    @property
    def taken_ns(self) -> int:
        """What statistics and rows have cost the steps so far."""
        return int(self._costs.taken_ns)

    def take(self, records: Sequence[StepRecord], sampling: list[dict[str, Any]]) -> None:
        """Take in steps that are finished, those without a slab too, and add their rows of `sampling`."""
        for record in records:
            sampling += self._sampling_rows(record)
            if self._plugged is not None:
                sampling += self._plugged.sampling_rows(record)
            step_ns = self._clock.read(record)
            if step_ns is None:
                continue
            statistics, rows = self._burden_of_statistics(record), self._burden_of_rows(record)
            if self._plugged is not None:
                statistics += self._plugged.burden(record)
            self._drained[STATISTICS].add(statistics)
            self._drained[CAPTURES].add(rows)
            shape = (record.phase, (record.num_rows or 0).bit_length())
            self._costs.add(shape, step_ns, statistics if rows is NOTHING else statistics + rows)
            self._num_steps += 1

    def _burden_of_statistics(self, record: StepRecord) -> Burden:
        asked = self._asked_of(self._periods(record))
        return asked if record.statistic_slab is None else Burden(asked.expected, self._cost_of(record.due))

    def _asked_of(self, periods: Periods) -> Burden:
        """Return what rules ask of a step on average: added up once for each mapping, and again once calibrated."""
        known = self._asked.get(id(periods))
        if known is None or known[0] is not self.calibration:
            self._asked = {key: each for key, each in self._asked.items() if each[0] is self.calibration}
            asked = Burden(sum(self._cost_of(sites) / every for every, sites in periods.items()))
            known = self._asked[id(periods)] = (self.calibration, periods, asked)
        return known[2]

    def _cost_of(self, sites: Sequence[Site]) -> int:
        return sum(self.calibration.statistics_ns.get(site.number, 0) for site in sites)

    def _burden_of_rows(self, record: StepRecord) -> Burden:
        if record.row_slab is None and not record.wants_more:
            return NOTHING
        whole = ROW_SITE_NS * self.calibration.num_row_sites
        taken = whole if record.row_slab is not None else 0
        return Burden(named=taken) if record.is_named else Burden(whole, taken)

    def _sampling_rows(self, record: StepRecord) -> list[dict[str, Any]]:
        """Return the rows of `sampling` of a step: how many steps each of its sites speaks for."""
        found: list[dict[str, Any]] = []
        if record.statistic_slab is not None:
            due = {site.number for site in record.due}
            for every, sites in self._periods(record).items():
                named = [site.number for site in sites if site.number in due]
                if named:
                    found.append(self._sampling_row(record, "summary", every, named))
        if record.row_slab is not None and record.wants_more and record.is_due:
            found.append(self._sampling_row(record, "rows", 1, None))
        return found

    def _sampling_row(self, record: StepRecord, take: str, every: int, sites: list[int] | None) -> dict[str, Any]:
        period = every << record.doublings
        return {"step_id": record.step_id, "take": take, "every": every, "period": period, "sites": sites}

    def look(self, spent: Spent) -> list[tuple[str, str]]:
        """Decide, once a window is over; return kind and text of the events to write.

        The first window is left out: what starts imports, allocates and warms up, and will not again.
        """
        self._costs.look()
        if self._costs.step_ns < WINDOW_NS or self._num_steps < LEAST_STEPS:
            return []
        window = self._close(spent)
        if self._is_starting:
            self._is_starting = False
            return []
        self.window = window
        before, self._state = self._state, decide(self._state, window, self.budget)
        told = []
        if self._state.doublings != before.doublings:
            self.num_adjustments += 1
            told.append((GOVERNOR, self._adjusted(before.doublings, window)))
            self._say_once(window)
        if self._state.is_t0_over and not self._is_t0_told:
            self._is_t0_told = True
            told.append((T0_OVER, self._t0_over(window)))
            logger.warning("insitu: %s", told[-1][1])
        return told

    def _close(self, spent: Spent) -> Window:
        step_ns, is_blind = self._costs.step_ns, self._costs.is_blind
        quiet_ns = max(step_ns - (self._costs.taken_ns - self._taken_before_ns), LEAST_QUIET * step_ns)
        self._taken_before_ns = self._costs.taken_ns
        full_ns, named_ns = self._costs.close()
        drained = [self._drained[table].close(spent.drain_full_ns.get(table, 0)) for table in FULL_TABLES]
        of_full = sum(spent.drain_full_ns.values()) - sum(self._before.drain_full_ns.values())
        t0_ns = (
            self._around_ns(spent, step_ns)
            + self._num_steps * self.calibration.t0_step_ns
            + max(0, spent.drain_ns - self._before.drain_ns - of_full)
        )
        self._saved_ns = self._num_steps * (self.calibration.t0_step_ns - self.calibration.boundary_step_ns)
        self._before, self._num_steps = spent, 0
        return Window(
            quiet_ns,
            t0_ns,
            named_ns + sum(named for _, named in drained),
            full_ns + sum(full for full, _ in drained),
            is_blind,
        )

    def _around_ns(self, spent: Spent, step_ns: float) -> float:
        """Return the CPU time around the steps of a window: of wall time as much as steps have had of theirs."""
        wall_ns = max(0, spent.in_steps_ns - self._before.in_steps_ns)
        share = min(1.0, step_ns / wall_ns) if wall_ns else 1.0
        return share * max(0, spent.around_ns - self._before.around_ns)

    # -- words ---------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, float | int | None]:
        """Return budget, shares of step time of the last window (None before there is one), and what was done."""
        window, doublings = self.window, self._state.doublings
        return {
            "budget": self.budget,
            "share": None if window is None else window.share(doublings),
            "t0_share": None if window is None else window.t0_share,
            "full_share": None if window is None else window.full_share(doublings),
            "period_factor": 1 << doublings,
            "adjustments": self.num_adjustments,
        }

    def _adjusted(self, before: int, window: Window) -> str:
        now = self._state.doublings
        what = f"periods of full steps are {1 << now} times those of the rules, after {1 << before}: "
        if window.is_blind and now == 1:
            return f"{what}every step was full, and what that costs shows only beside quiet ones"
        return (
            f"{what}at {1 << before} the probe takes {_percent(window.share(before))} of step time, "
            f"{_percent(window.t0_share)} in every step; the budget is {_percent(self.budget)}"
        )

    def _say_once(self, window: Window) -> None:
        if self._is_told or window.is_blind:
            return
        self._is_told = True
        logger.warning(
            "insitu: what the rules take would cost %s of step time; it is taken in one of %d of those steps, to keep "
            "overhead_budget=%g (session.stats().governor)",
            _percent(window.full_share(0)),
            1 << self._state.doublings,
            self.budget,
        )

    def _t0_over(self, window: Window) -> str:
        text = (
            f"what every step pays (T0) takes {_percent(window.t0_share)} of step time, over the budget of "
            f"{_percent(self.budget)}, and no period makes it less; "
        )
        if self._saved_ns <= 0:
            return f"{text}a larger overhead_budget accepts it, INSITU_DISABLED=1 ends it"
        left = _percent((window.t0_ns - self._saved_ns) / window.step_ns)
        return f'{text}t0="boundary" (attach, INSITU_T0), canaries at stage boundaries only, would take about {left}'


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
