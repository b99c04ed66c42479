"""One observed model: its plan, slabs and taps; opens a step on the step thread, reads it back on the drain."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from insitu import canaries
from insitu.catalogue import resolve
from insitu.due_rows import followed
from insitu.flight import FlightRule
from insitu.guard import Guard
from insitu.harvest import Captures, Harvest, Seen, captured, loads_of, measured, read_steps, summarise
from insitu.overhead import CAPTURES, STATISTICS, Calibration, Overhead
from insitu.plugged_statistics import plugged_statistics
from insitu.rules import Rule
from insitu.sampling import is_sampled
from insitu.sites import Site
from insitu.slab import NEVER, ControlBlock, Plan, RowSlabs, Slabs
from insitu.statistic_slabs import StatisticSlabs, periods
from insitu.step import StepRecord
from insitu.taps import Current, Full, Tap, Taps, left_to_observe
from insitu.vocabulary import Variant

ROW_BUDGET_BYTES: Final = 64 << 20
"""Most memory for raw rows, all slabs together."""
CALIBRATION_ROUNDS: Final = 5
LOAD_EVERY: Final = 16
"""Expert loads are taken in one step of so many: a router's count costs as much as a canary for each choice."""


class Observer:
    """Everything that belongs to one model. `begin`/`end` run on the step thread, `harvest` on the drain."""

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Rule],
        max_rows: int,
        axes: Mapping[str, str] | None,
        run: str,
        budget: float = 1.0,
        t0: str = canaries.ALL,
    ) -> None:
        """run: 16 hex digits; with a step's id it decides whether the step is sampled.

        budget: share of step time that the probe may take. t0: of `canaries.TIERS`.
        """
        found = left_to_observe(model, resolve(model, axes, [rule.sites for rule in rules]))
        sites = canaries.tapped(found, rules, t0)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.plan = Plan(sites, tuple(rules), max_rows)
        self._run, self._has_routers = run, bool(self.plan.loads)
        self.current = Current()
        self.guard = Guard("taps")
        self.slabs = Slabs(self.plan, self.device)
        self.control = ControlBlock(self.device, max(1, len(self.plan.groups)), max_rows)
        silent = self._without_canary = canaries.without_canary(sites, t0)
        self.taps = Taps(self.plan, self.current, self.control.step_id, self.guard, silent)
        self.row_slabs: RowSlabs | None = None
        self._periods = periods(sites, rules)
        named = [site.number for each in self._periods.values() for site in each]
        self.statistic_slabs = StatisticSlabs(named, self.device) if named else None
        self.plugged = plugged_statistics(sites, rules, self.device, run, self.control.step_id)
        self.num_fired = np.zeros(self.plan.num_sites, np.int64)
        self.num_steps = 0
        self.num_seen = {"all": 0, "sampling": 0}
        """Steps whose slab was read, and those of them that could have had logits."""
        self.hook_ns = 0
        """Measured cost of one step's taps (see `_calibrate`)."""
        self.overhead = Overhead(budget, run, self.device.type, lambda record: self._periods, self.plugged)
        self.explicit: dict[str, Site] = {}
        self._explicit_taps: dict[str, Tap] = {}
        self._group_of = {site.number: self.plan.group_of(site) for site in sites}
        self._dest_rows = list(self.control.dest)
        self.root_tap = self.taps.install(model)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.plan.sites, *self.explicit.values())

    # -- step thread ---------------------------------------------------------------------------------------------

    def begin(self, record: StepRecord) -> None:
        """Choose the slab and the variant of a step, and let its taps write."""
        self.overhead.begin(record)
        record.slab = self.slabs.ring.take()
        current = self.current
        if record.slab is None:
            record.num_unmeasured = len(self._due(record))
            record.num_unplugged = len(self.plugged.due(record)) if self.plugged else 0
            self.overhead.start(record)
            return
        wanted = self._choose_rows(record)
        if self._periods:
            self._choose_statistics(record)
        if self.plugged is not None:
            self.plugged.choose(record, current)
        valid = current.num_valid
        valid["tokens"] = valid["batch"] = -1 if record.num_rows is None else record.num_rows
        valid["samples"] = -1 if record.num_rows is None else record.num_samples
        if self.device.type != "cpu":  # on the host the taps read the same numbers from `current`
            num_rows = valid["tokens"]
            self.control.write(record.step_id, record.slab, num_rows, record.num_samples, record.variant)
        if wanted is not None:
            self.control.aim(wanted)
        current.step_id = record.step_id
        views = current.views = self.slabs.views[record.slab]
        current.canary, current.host_stamp = views.canary, views.host_stamp
        current.sampled = record.sampled = self._has_routers and is_sampled(self._run, record.step_id, LOAD_EVERY)
        current.special = (
            current.learning
            or current.full is not None
            or record.num_padded > 0
            or current.host_stamp is None
            or torch.is_grad_enabled()
        )
        current.thread = get_ident()
        self.overhead.start(record)

    def end(self, record: StepRecord) -> None:
        """Close the step: taps fall silent, and on CUDA an event marks when its slab may be read."""
        self.overhead.stop(record)
        self.silence()
        current = self.current
        if self.device.type == "cuda":
            record.ready = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            record.ready.record()
        if current.learning and self.taps.shapes:
            self._learned()
        if self.plugged is not None:
            self.plugged.raise_again()

    def silence(self) -> None:
        """Let no tap write until the next step begins."""
        current = self.current
        current.thread = 0
        current.views = None
        current.full = None

    def _choose_rows(self, record: StepRecord) -> list[list[int]] | None:
        """Pick the full variant and the row slab if any row of this step is wanted and there is room."""
        groups, slabs = self.plan.groups, self.row_slabs
        if slabs is None or (rules := followed([group.rule for group in groups], record)) is None:
            return None
        record.places = [self._places(rule, group.axis, record) for rule, group in zip(rules, groups, strict=True)]
        record.row_slab = slabs.ring.take()
        if record.row_slab is None:
            record.num_crowded += sum(len(places or ()) for places in record.places)
            record.places = []
            return None
        record.variant = Variant.FULL
        view = slabs.views[record.row_slab]
        areas = {
            site: (area, self._dest_rows[groups.index(group)])
            for site, area in view.items()
            if (group := self._group_of[site]) is not None
        }
        self.current.full = Full(areas)
        everything = list(range(self.plan.max_rows))
        return [everything if places is None else [p.row for p in places] for places in record.places]

    def _choose_statistics(self, record: StepRecord) -> None:
        """Pick the full variant and places for the statistics that are due in this step, if there is room."""
        due, slabs = self._due(record), self.statistic_slabs
        if not due or slabs is None:
            return
        record.statistic_slab = slabs.ring.take()
        if record.statistic_slab is None:
            record.num_unmeasured = len(due)
            return
        record.variant, record.due = Variant.FULL, due
        places = slabs.places[record.statistic_slab]
        rows = self.current.full.rows if self.current.full is not None else {}
        self.current.full = Full(rows, {site.number: places[site.number] for site in due}, slabs.work)

    def _due(self, record: StepRecord) -> list[Site]:
        """Return the sites whose statistics are taken in this step: on every rank the same."""
        step, doublings = record.step_id, record.doublings
        due = (sites for every, sites in self._periods.items() if is_sampled(self._run, step, every << doublings))
        return [site for sites in due for site in sites]

    def _places(self, rule: Rule, axis: str, record: StepRecord) -> Any:
        if not record.rows or isinstance(rule, FlightRule):  # all of them: whose they are is worked out if asked
            return None
        found = rule.select(record.rows, axis, 0)
        fitting = [place for place in found if place.row < self.plan.max_rows][: self.plan.max_rows]
        record.num_crowded += len(found) - len(fitting)
        return fitting

    def _learned(self) -> None:
        """After the first step: make room for rows now that widths are known, and measure the taps."""
        self.current.learning = False
        self.taps.remove_unfit()
        shapes = self.taps.shapes
        widths = {
            site.number: shapes[site.number]
            for site in self.plan.sites
            if self.taps.can_hold(site.number) and self.plan.group_of(site) is not None
        }
        if widths:
            self.row_slabs = RowSlabs(widths, self.plan.max_rows, ROW_BUDGET_BYTES, self.device)
        self._calibrate()
        if self.plugged is not None:
            self.plugged.rehearse(shapes)

    def _calibrate(self) -> None:
        """Time every tap on a tensor of its learned width, best of a few: what a step pays for them."""
        place = self.slabs.ring.size - 1
        current = self.current
        if self.slabs.ring.num_taken == self.slabs.ring.size:
            return
        current.views = self.slabs.views[place]
        current.host_stamp = current.views.host_stamp
        costs = {}
        for site in self.plan.sites:
            if not self.taps.can_hold(site.number):
                continue
            width, dtype = self.taps.shapes[site.number]
            sample = torch.zeros((4, width), dtype=dtype, device=self.device)
            tap, best = self.taps.make(site), 1 << 60
            for _ in range(CALIBRATION_ROUNDS):
                began = time.perf_counter_ns()
                tap(sample)
                best = min(best, time.perf_counter_ns() - began)
            costs[site.number] = best
        current.views = None
        self.hook_ns = sum(costs.values())
        kept = frozenset(site.number for site in self.plan.sites if canaries.is_kept(site))
        num_row_sites = len(self.row_slabs.areas) if self.row_slabs else 0
        self.overhead.calibration = Calibration(costs, self._calibrate_statistics(), kept, num_row_sites)

    def _calibrate_statistics(self) -> dict[int, int]:
        slabs, costs = self.statistic_slabs, dict[int, int]()
        if slabs is None or slabs.ring.num_taken == slabs.ring.size:
            return costs
        for number, place in slabs.places[slabs.ring.size - 1].items():
            if not self.taps.can_hold(number):
                continue
            width, dtype = self.taps.shapes[number]
            sample, best = torch.zeros((4, width), dtype=dtype, device=self.device), 1 << 60
            for _ in range(CALIBRATION_ROUNDS):
                began = time.perf_counter_ns()
                self.taps.statistics.take(self.plan.sites[number], sample, None, place, slabs.work, NEVER)
                best = min(best, time.perf_counter_ns() - began)
            costs[number] = best
        return costs

    def explicit_tap(self, tensor: torch.Tensor, name: str) -> None:
        """Tap a tensor named inside model code; the site is made when it first fires."""
        if self.current.thread != get_ident() or self.current.views is None:
            return
        tap = self._explicit_taps.get(name)
        if tap is None:
            number = len(self.plan.sites) + len(self.explicit)
            if number >= self.plan.num_sites:
                return
            site = Site(number, name, fqn=f"tap:{name}")
            self.explicit[name] = site
            tap = self._explicit_taps[name] = self.taps.make(site)
            width = tensor.shape[-1] if tensor.ndim > 1 else 1
            self.taps.shapes.setdefault(number, (width, tensor.dtype))
        try:
            tap(tensor)
        except Exception as error:
            self.current.thread = 0
            self.guard.contain(error)

    def silent_sites(self, num_steps: int) -> list[str]:
        """Return the sites that could have fired in at least so many steps and never did.

        A site of the `samples` axis has nothing to show in a step that samples nothing; a module that returns no
        tensor is called, and there is nothing to take.
        """
        return [
            site.name
            for site in self.plan.sites
            if not self.num_fired[site.number]
            and self.num_seen["sampling" if site.axis == "samples" else "all"] >= num_steps
            and not self.taps.is_unfit(site.number)
            and site.number not in self._without_canary
        ]

    # -- drain ---------------------------------------------------------------------------------------------------

    def harvest(self, records: Sequence[StepRecord], into: Harvest) -> None:
        """Read finished steps' slabs, in the order the steps ran, give their places back, and append what they say."""
        self.num_steps += len(records)
        self.overhead.take(records, into.sampling)
        crowded = sum(record.num_crowded for record in records)
        into.num_crowded += crowded * len(self.row_slabs.areas.keys() - self.plan.held_sites if self.row_slabs else ())
        seen = [record for record in records if record.slab is not None]
        into.num_unmeasured += sum(record.num_unmeasured for record in records)
        into.num_unplugged += sum(record.num_unplugged for record in records)
        into.num_unseen += (len(records) - len(seen)) * len(self.plan.boundaries)
        if not seen:
            return
        try:
            reading = read_steps(self.slabs, seen)
            self.num_fired += reading.fired.sum(0)
            self.num_seen["all"] += len(seen)
            self.num_seen["sampling"] += sum(record.rows is None or record.num_samples > 0 for record in seen)
            summaries, held = summarise(reading, self.plan), list[Captures]()
            into.summaries.append(summaries)
            if self.plan.loads:
                into.loads += loads_of(reading, seen, self.plan)
            if self.row_slabs is not None:
                with into.timed(CAPTURES):
                    for part in captured(reading, seen, self.row_slabs, self.plan):
                        (held if part.site in self.plan.held_sites else into.captures).append(part)
            if self.statistic_slabs is not None:
                with into.timed(STATISTICS):
                    into.statistics += measured(reading, seen, self.statistic_slabs)
            into.seen.append(Seen(seen, reading, summaries, held, self.plan))
            if self.plugged is not None:
                with into.timed(STATISTICS):
                    into.plugged += self.plugged.measured(reading, seen)
        finally:
            self.slabs.ring.free(len(seen))
            if self.row_slabs is not None:
                self.row_slabs.ring.free(sum(record.row_slab is not None for record in seen))
            if self.statistic_slabs is not None:
                self.statistic_slabs.ring.free(sum(record.statistic_slab is not None for record in seen))
            if self.plugged is not None:
                self.plugged.ring.free(sum(record.plugged_slab is not None for record in seen))
