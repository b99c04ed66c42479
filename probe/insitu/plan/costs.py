"""What a step would pay for its taps: each kind timed here, on tensors as wide as the model's, best of a few."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch

from insitu.guard import Guard
from insitu.plan.estimate import Line, Traffic, forms_of
from insitu.plan.shapes import Shape
from insitu.rules.rule import ROWS, SUMMARY, Rule
from insitu.sites.site import Site
from insitu.slabs.rows import Destinations, RowSlabs
from insitu.slabs.slab import NEVER, ControlBlock, Plan, Slabs
from insitu.slabs.statistics import StatisticSlabs
from insitu.taps.eager import Current, Full, Taps

STEP_NS: Final = 30_000
"""What `session.step` takes around a model (docs/benchmarks.md); added to every step."""
TOGETHER: Final = 8
"""Sites whose statistics are taken in one go: a layer has about three of a width."""
ROUNDS: Final = 5
ENOUGH_S: Final = 0.05
"""No more rounds of one thing once it took so long."""
ENOUGH_VALUES: Final = 1 << 18
"""Of a larger tensor so many values are timed, and the rest is taken to cost as much: taps are linear in rows."""
HOW: Final = (
    "estimate: (30 us a step + the taps of its sites, each kind timed on one thread of this machine on tensors of the "
    "model's widths, best of 5, of long ones a part) / the stated step time; a sampled step's extra divided by `every`"
)


@dataclass
class Costs:
    """Times of taps in ns, measured once a kind."""

    traffic: Traffic
    shapes: dict[int, Shape]
    _known: dict[tuple[object, ...], float] = field(default_factory=dict)

    def share(self, phase: str, sites: Sequence[Site], lines: Sequence[Line] = ()) -> float:
        """Return the probe's share of the stated time of a step. sites: those with a canary. lines: of rules."""
        total = float(STEP_NS) + sum(self._once("always", site, phase, None) for site in sites)
        for line in lines:
            total += sum(self._of_rule(line.rule, site, phase) for site in line.sites)
        step_ms = self.traffic.decode_ms if phase == "decode" else self.traffic.prefill_ms
        return total / (step_ms * 1e6)

    def _of_rule(self, rule: Rule, site: Site, phase: str) -> float:
        if rule.phase not in (None, phase):
            return 0.0
        if rule.take == ROWS:
            wanted = 1 - (1 - self.traffic.chosen(rule)) ** self.traffic.num_requests(phase)
            extra = self._once("rows", site, phase, rule) - self._once("always", site, phase, None)
            return wanted * max(0.0, extra)
        if rule.take != SUMMARY:
            return 0.0
        return self._once("statistics", site, phase, None) / rule.period

    def _once(self, kind: str, site: Site, phase: str, rule: Rule | None) -> float:
        """Return the time of one tap; 0 where the width is not known."""
        if site.number not in self.shapes:
            return 0.0
        width, dtype = self.shapes[site.number]
        num_rows = self.traffic.num_rows(site.axis, phase)
        num_timed = min(num_rows, max(1, ENOUGH_VALUES // max(width, 1)))
        key = (kind, num_timed, width, dtype, site.boundary, site.name == "logits", rule)
        if key not in self._known:
            x = torch.zeros((num_timed, width), dtype=getattr(torch, dtype))
            took = _best_of(_TAPS[kind](site, x, rule))
            self._known[key] = took / (TOGETHER if kind == "statistics" else 1)
        return self._known[key] * num_rows / num_timed


def _best_of(call: Callable[[], None]) -> int:
    """Return the ns of the fastest of a few calls, on one thread: several would wait for each other on a busy host."""
    began, best = time.perf_counter(), 1 << 60
    with _one_thread(), torch.inference_mode():
        for _ in range(ROUNDS):
            start = time.perf_counter_ns()
            call()
            best = min(best, time.perf_counter_ns() - start)
            if time.perf_counter() - began > ENOUGH_S:
                break
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tap(site: Site, x: torch.Tensor, full: Full | None) -> Callable[[], None]:
    """Return one call of a site's tap, as an open step would make it."""
    device = torch.device("cpu")
    one = Site(0, site.name, "model", axis=site.axis, boundary=site.boundary)
    plan = Plan((one,), (), max_rows=x.shape[0])
    current, slabs = Current(), Slabs(plan, device)
    current.learning, current.views = False, slabs.views[0]
    current.host_stamp, current.full = slabs.views[0].host_stamp, full
    tap = Taps(plan, current, ControlBlock(device).step_id, Guard("taps")).make(one)
    return lambda: tap(x)


def _always(site: Site, x: torch.Tensor, _: Rule | None) -> Callable[[], None]:
    return _tap(site, x, None)


def _rows(site: Site, x: torch.Tensor, rule: Rule | None) -> Callable[[], None]:
    assert rule is not None, "rows are taken by a rule"
    device, one = torch.device("cpu"), Site(0, site.name, "model")
    forms = forms_of(rule, [one], {0: (x.shape[1], str(x.dtype).removeprefix("torch."))})
    slabs, destinations = RowSlabs(forms, x.shape[0], device, budget_bytes=0), Destinations(device, 1, x.shape[0])
    destinations.aim([range(x.shape[0])])
    return _tap(site, x, Full(slabs.areas(0, {0: destinations.of_group[0]})))


def _statistics(site: Site, x: torch.Tensor, _: Rule | None) -> Callable[[], None]:
    """Return the statistics of `TOGETHER` sites like this one."""
    device, sites = torch.device("cpu"), [Site(n, site.name, "model", axis=site.axis) for n in range(TOGETHER)]
    slabs = StatisticSlabs(range(TOGETHER), device)
    taps = Taps(Plan((), (), max_rows=x.shape[0]), Current(), ControlBlock(device).step_id, Guard("taps")).statistics

    def call() -> None:
        for each in sites:
            taps.take(each, x, None, slabs.places[0][each.number], slabs.work, NEVER)
        taps.finish()

    return call


_TAPS: Final = {"always": _always, "rows": _rows, "statistics": _statistics}
