"""One observed model: its plan, slabs and taps; opens a step on the step thread, reads it back on the drain."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain, groupby
from threading import get_ident
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from insitu.guard import Guard
from insitu.overhead.account import CAPTURES, STATISTICS, Calibration, Overhead, Periods
from insitu.rules.changes import RuleChanges
from insitu.rules.in_force import InForce
from insitu.rules.pressure import giving_way
from insitu.rules.rule import Rule, check_fit
from insitu.rules.sampling import is_sampled
from insitu.session.step import StepRecord
from insitu.sites import canaries
from insitu.sites.catalogue import Catalogue, catalogue
from insitu.sites.paths import compiled_parts, is_inside
from insitu.sites.site import Site
from insitu.slabs.harvest import (
    Captures,
    Harvest,
    Seen,
    captured,
    loads_of,
    measured,
    num_lacking,
    read_steps,
    summarise,
)
from insitu.slabs.memory import check_room
from insitu.slabs.rows import RowSlabs
from insitu.slabs.slab import NEVER, ControlBlock, Plan, Ring, Slabs
from insitu.slabs.statistics import StatisticSlabs
from insitu.statistics.plugged import plugged_statistics
from insitu.statistics.taps import StatisticTaps
from insitu.taps.eager import EVERYWHERE, NOWHERE, WHERE_FULL, Current, Full, Tap, Taps, left_to_observe
from insitu.taps.fused import TORCH, fused_taps
from insitu.vocabulary import Variant

CALIBRATION_ROUNDS: Final = 5
CAPTURE_BYTES: Final = 128
"""What a captured row takes beside its values, at most."""
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
        fused: bool = True,
        sites: Catalogue | None = None,
    ) -> None:
        """run: 16 hex digits; with a step's id it decides whether the step is sampled.

        budget: share of step time that the probe may take. t0: of `canaries.TIERS`. fused: whether taps may be
        kernels of one launch, where they can run (`insitu.taps.fused`). sites: of the model, where somebody else
        knows them.
        """
        check_fit(rules, max_rows)
        known = sites or catalogue(model, axes)
        found = left_to_observe(model, known.plan([rule.sites for rule in rules]))
        tapped = canaries.tapped(found, rules, t0)
        held = chain(model.parameters(), model.buffers())
        self.device = next((each.device for each in held), torch.device("cpu"))
        self.plan = Plan(tapped, tuple(rules), max_rows)
        slabs_bytes = (self.plan.num_slabs + 1) * self.plan.slab_bytes
        check_room(f"max_rows: {max_rows} is too many; what steps leave", slabs_bytes, self.device)
        self._model = model
        self._run, self._has_routers = run, bool(self.plan.loads)
        self.current = Current()
        self.guard = Guard("taps", are_several=True)
        self.slabs = Slabs(self.plan, self.device)
        self.control = ControlBlock(self.device, self.plan.num_slabs)
        self._fused = fused_taps(self.plan, self.slabs, self.control) if fused else None
        self._drain_stream: torch.cuda.Stream | None = None
        silent = self._without_canary = canaries.without_canary(tapped, t0)
        self.taps = Taps(self.plan, self.current, self.control.step_id, self.guard, silent, self._fused)
        self.in_force = InForce(self.plan, self.device)
        self.changes = RuleChanges(self.in_force, self._calibrate_beside)
        self.plugged = plugged_statistics(tapped, rules, self.device, run, self.control.step_id)
        self.num_fired = np.zeros(self.plan.num_sites, np.int64)
        self.num_steps = 0
        self.num_seen = {"all": 0, "sampling": 0}
        """Steps whose slab was read, and those of them that could have had logits."""
        self.hook_ns = 0
        """Measured cost of one step's taps (see `_calibrate`)."""
        self.overhead = Overhead(budget, run, str(self.device), self._periods_of, self.plugged)
        self.explicit: dict[str, Site] = {}
        self._explicit_taps: dict[str, Tap] = {}
        self.fullness = 0.0
        """Of the queue, from 0 to 1; the drain says it."""
        self.num_left_out = 0
        """Rows that byte budgets of rules left out."""
        self.num_untaken = 0
        """Rows that were due in the first step."""
        self._highest_step = NEVER
        self.num_absent = 0
        """Rows that row maps named and tensors had not."""
        self.root_tap = self.taps.install(model)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.plan.sites, *self.explicit.values())

    @property
    def fires(self) -> dict[str, int]:
        """Sites that fired several times in the first step, and how often."""
        return {site.name: times for site in self.sites if (times := self.taps.num_calls[site.number]) > 1}

    @property
    def taps_by(self) -> str:
        """What takes sites in eager: "triton" or "torch"."""
        return TORCH if self._fused is None else self._fused.path

    @property
    def has_kernels(self) -> bool:
        """Whether taps may be kernels of one launch now."""
        return self._fused is not None and self._fused.is_ready

    @property
    def row_slabs(self) -> RowSlabs | None:
        return self.in_force.row_slabs

    @property
    def statistic_slabs(self) -> StatisticSlabs | None:
        return self.in_force.statistic_slabs

    @property
    def step_bytes(self) -> int:
        """Most bytes of raw rows that one step can leave."""
        return self.row_slabs.slab_bytes if self.row_slabs is not None else 0

    def _rings(self) -> list[Ring]:
        slabs = (self.slabs, self.row_slabs, self.statistic_slabs, self.plugged)
        return [each.ring for each in slabs if each is not None]

    @property
    def has_room(self) -> bool:
        """Whether the next step finds a place in every ring."""
        return all(ring.num_taken < ring.size for ring in self._rings())

    @property
    def waiting_bytes(self) -> int:
        """Most bytes of captures in steps that were not read yet, and in the next."""
        if self.row_slabs is None:
            return 0
        beside = CAPTURE_BYTES * self.plan.max_rows * self.in_force.num_row_sites
        num_steps = self.row_slabs.waiting_bytes / max(1, self.step_bytes) + 1
        return int(num_steps * (self.step_bytes + beside))

    @property
    def is_read(self) -> bool:
        """Whether no step waits to be read: each has a slab, whatever else it has."""
        return not self.slabs.ring.num_taken

    def start_over(self) -> None:
        """Be a forked child's: steps on their way are its parent's, which alone counts them and frees their places."""
        self.silence()
        self.num_steps = self.num_left_out = self.num_untaken = self.num_absent = 0
        self.num_fired[:] = 0
        self.num_seen = dict.fromkeys(self.num_seen, 0)
        self.slabs.ring.clear()
        if self.plugged is not None:
            self.plugged.ring.clear()
        self.in_force.start_over()
        self.changes.start_over()

    # -- step thread ---------------------------------------------------------------------------------------------

    def begin(self, record: StepRecord) -> None:
        """Choose the slab and the variant of a step, and let its taps write."""
        self.overhead.begin(record)
        self._follow(self.changes.turn(record))
        record.in_force = self.in_force
        record.giving_way = giving_way(self.fullness, self._run, record.step_id)
        record.slab = self.slabs.ring.take()
        current = self.current
        current.record = record
        if record.slab is None:
            self.in_force.miss_rows(record)
            record.num_unmeasured = len(self._due(record))
            record.num_unplugged = len(self.plugged.due(record)) if self.plugged else 0
            self.overhead.start(record)
            return
        areas = self.in_force.choose_rows(record)
        if areas:
            record.variant = Variant.FULL
            current.full = Full(areas)
        if self.in_force.statistic_slabs is not None:
            self._choose_statistics(record)
        if self.plugged is not None:
            self.plugged.choose(record, current)
        valid = current.num_valid
        valid["tokens"] = valid["batch"] = -1 if record.num_rows is None else record.num_rows
        valid["samples"] = valid["tokens"] if record.has_all_logits or record.num_rows is None else record.num_samples
        current.is_fused = self.has_kernels and not current.learning
        if self.device.type != "cpu" or current.is_fused:  # other taps of the host read the same numbers from `current`
            self.write_control(record)
        current.step_id = record.step_id
        if record.step_id <= self._highest_step:  # the caller counts anew: what is old could have this number
            self.slabs.forget(record.slab, record.step_id)
        else:
            self._highest_step = record.step_id
        views = current.views = self.slabs.views[record.slab]
        current.canary, current.host_stamp = views.canary, views.host_stamp
        current.sampled = record.sampled = self._has_routers and is_sampled(self._run, record.step_id, LOAD_EVERY)
        is_special = (
            current.learning
            or record.num_padded > 0
            or current.host_stamp is None
            or current.is_fused
            or torch.is_grad_enabled()
        )
        current.special = EVERYWHERE if is_special else WHERE_FULL if current.full is not None else NOWHERE
        current.thread = get_ident()
        self.overhead.start(record)

    def finish(self) -> None:
        """Take the statistics that wait for the end of the step."""
        full = self.current.full
        if full is not None and full.places:
            self.taps.statistics.finish()

    def write_control(self, record: StepRecord) -> None:
        """Tell the device which step this is, and where it writes. It has a slab."""
        assert record.slab is not None, "a step without a slab has no taps"
        valid = self.current.num_valid
        row_slab = record.row_slab or 0
        self.control.write(record.step_id, record.slab, valid["tokens"], valid["samples"], record.variant, row_slab)

    def end(self, record: StepRecord) -> None:
        """Close the step: taps fall silent, and on CUDA an event marks when its slab may be read."""
        self.overhead.stop(record)
        self.silence()
        current = self.current
        if self.device.type == "cuda":
            record.ready = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            record.ready.record(torch.cuda.current_stream(self.device))
        if self.taps.desk.is_captured:
            record.in_graph = True
            self.control.write(NEVER, self.plan.num_slabs, 0, 0, 0, 0)  # a replay outside of a step writes to the trash
        if current.learning and self.taps.shapes:
            self._learned()
        if self.plugged is not None:
            self.plugged.raise_again()

    def silence(self) -> None:
        """Let no tap write until the next step begins."""
        current = self.current
        current.thread = 0
        current.record = None
        current.views = None
        current.full = None

    def _follow(self, rules: InForce) -> None:
        """Change over to other rules, between two steps."""
        if rules is self.in_force:
            return
        self.in_force = rules
        known = self.overhead.calibration
        costs = {**known.statistics_ns, **(rules.statistics_ns or self._calibrate_statistics(rules))}
        self.overhead.calibration = replace(known, statistics_ns=costs, num_row_sites=rules.num_row_sites)

    def _choose_statistics(self, record: StepRecord) -> None:
        """Pick the full variant and places for the statistics that are due in this step, if there is room."""
        sites = {site.number: site for site in (*self._due(record), *record.instead)}
        due, slabs = list(sites.values()), self.statistic_slabs
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

    def _periods_of(self, record: StepRecord) -> Periods:
        rules: InForce = record.in_force or self.in_force
        return rules.periods_of(record.phase)

    def _due(self, record: StepRecord) -> list[Site]:
        """Return the sites whose statistics are taken in this step: on every rank the same."""
        step, doublings = record.step_id, record.doublings
        periods = self._periods_of(record)
        due = (sites for every, sites in periods.items() if is_sampled(self._run, step, every << doublings))
        return [site for sites in due for site in sites]

    def learn(self, shapes: Mapping[int, tuple[int, torch.dtype]]) -> None:
        """Know before the first step what sites return, site -> (width, dtype): its rows can be taken, too."""
        for number, (width, dtype) in shapes.items():
            self.taps.learn(number, width, dtype)
        self._learned()

    def _learned(self) -> None:
        """After the first step: make room for rows now that widths are known, and measure the taps."""
        self.current.learning = False
        self.taps.remove_unfit()
        self.taps.expect_late()
        shapes = self.taps.shapes
        self.changes.learn({number: shapes[number] for number in shapes if self.taps.can_hold(number)})
        self._prepare(self.in_force)
        self._calibrate()
        if self.plugged is not None:
            self.plugged.rehearse(shapes)

    def _prepare(self, rules: InForce) -> None:
        """Have kernels ready for what the taps of these rules take."""
        if self._fused is not None:
            shapes = dict(self.taps.shapes)
            self._fused.prepare({number: shapes[number] for number in shapes if self.taps.can_hold(number)}, rules)

    def _calibrate(self) -> None:
        """Time every tap on a tensor of its learned width, best of a few: what a step pays for them."""
        place = self.slabs.ring.size - 1
        current = self.current
        if self.slabs.ring.num_taken == self.slabs.ring.size:
            return
        current.views = self.slabs.views[place]
        current.host_stamp = current.views.host_stamp
        current.is_fused = self.has_kernels
        if self.device.type != "cpu" or current.is_fused:
            self.control.write(NEVER, place, -1, -1, 0, 0)
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
        statistics_ns = self.in_force.statistics_ns = self._calibrate_statistics(self.in_force)
        self.overhead.calibration = Calibration(costs, statistics_ns, kept, self.in_force.num_row_sites)

    def _calibrate_beside(self, rules: InForce) -> dict[int, int]:
        """As `_calibrate_statistics`, while steps run: with taps of its own, since those of the steps stage tensors."""
        self._prepare(rules)
        return self._calibrate_statistics(rules, StatisticTaps(torch.full_like(self.control.step_id, NEVER)))

    def _calibrate_statistics(self, rules: InForce, taps: StatisticTaps | None = None) -> dict[int, int]:
        slabs, costs = rules.statistic_slabs, dict[int, int]()
        if slabs is None or slabs.ring.num_taken == slabs.ring.size:
            return costs
        taps, shapes, best = taps or self.taps.statistics, self.taps.shapes, 1 << 60
        host_step = NEVER if self.device.type == "cpu" else None  # on a device the stamp is a tensor there
        samples = [
            (self.plan.sites[number], torch.zeros((4, width), dtype=dtype, device=self.device), place)
            for number, place in slabs.places[slabs.ring.size - 1].items()
            if self.taps.can_hold(number)
            for width, dtype in [shapes[number]]
        ]
        for _ in range(CALIBRATION_ROUNDS):
            began = time.perf_counter_ns()
            for site, sample, place in samples:
                taps.take(site, sample, None, place, slabs.work, host_step)
            taps.finish()
            best = min(best, time.perf_counter_ns() - began)
        return {site.number: best // len(samples) for site, _, _ in samples}  # they are taken together

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

    def compiled_apart(self, silent: Collection[str]) -> dict[str, str]:
        """Return which of these sites lie inside of a part that is compiled by itself: name -> path of the part."""
        parts = compiled_parts(self._model) if silent else []
        sites = [site for site in self.plan.sites if site.name in silent] if parts else []
        return {site.name: part for site in sites for part in reversed(parts) if is_inside(site.fqn, part)}

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
        into.num_crowded += sum(record.num_crowded for record in records)
        into.num_spared += sum(record.num_spared for record in records)
        self.num_left_out += sum(record.num_left_out for record in records)
        before, untaken_before = into.num_absent, into.num_untaken
        with self._beside():
            for _, run in groupby(records, key=lambda record: id(record.in_force)):
                self._harvest(list(run), into)
        self.num_absent += into.num_absent - before
        self.num_untaken += into.num_untaken - untaken_before
        if self.taps.late.has_news:
            self._make_room_for_late_sites()

    def _make_room_for_late_sites(self) -> None:
        """Let rules take the rows of sites that fired first after the first step, from the next step on."""
        self.taps.late.has_news = False
        shapes = dict(self.taps.shapes)
        self.changes.make_room({number: shapes[number] for number in shapes if self.taps.can_hold(number)})
        with self._beside():
            self._prepare(self.in_force)

    def _beside(self) -> AbstractContextManager[Any]:
        """On a device, let the drain copy on a stream of its own: the model neither waits for it nor makes it wait."""
        if self.device.type != "cuda":
            return nullcontext()
        if self._drain_stream is None:
            self._drain_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._drain_stream)

    def _harvest(self, records: Sequence[StepRecord], into: Harvest) -> None:
        """As `harvest`, of steps that ran under the same rules."""
        rules: InForce = records[0].in_force or self.in_force
        row_slabs, statistic_slabs = rules.row_slabs, rules.statistic_slabs
        seen = [record for record in records if record.slab is not None]
        into.num_unmeasured += sum(record.num_unmeasured for record in records)
        into.num_unplugged += sum(record.num_unplugged for record in records)
        into.num_unseen += (len(records) - len(seen)) * len(self.plan.boundaries)
        if not seen:
            return
        try:
            if (in_graph := [record for record in seen if record.in_graph]) and self.taps.desk.memory is not None:
                self.taps.desk.memory.settle(in_graph, self.slabs)
            self._read_what_can_be(seen, rules, into)
        finally:
            self.slabs.ring.free(len(seen))
            if row_slabs is not None:
                kept = [record.row_bytes for record in seen if record.row_slab is not None]
                row_slabs.free(len(kept), sum(kept))
            if statistic_slabs is not None:
                statistic_slabs.ring.free(sum(record.statistic_slab is not None for record in seen))
            if self.plugged is not None:
                self.plugged.ring.free(sum(record.plugged_slab is not None for record in seen))

    def _read_what_can_be(self, seen: Sequence[StepRecord], rules: InForce, into: Harvest) -> None:
        """Read steps at once; where that fails each half by itself, so that a bad one loses what is its own alone."""
        try:
            into.add(self._read(seen, rules))
        except Exception as error:
            if len(seen) > 1:
                middle = len(seen) // 2
                self._read_what_can_be(seen[:middle], rules, into)
                self._read_what_can_be(seen[middle:], rules, into)
                return
            into.errors.append(error)
            into.num_lost["summaries"] += len(self.plan.boundaries)
            into.num_lost[CAPTURES] += rules.num_kept(seen[0])

    def _read(self, seen: Sequence[StepRecord], rules: InForce) -> Harvest:
        """Return what these steps left. What is known of the model is as it was where this raises."""
        found, held = Harvest(), list[Captures]()
        reading = read_steps(self.slabs, seen)
        summaries = summarise(reading, self.plan)
        found.summaries.append(summaries)
        if self.plan.loads:
            found.loads += loads_of(reading, seen, self.plan)
        if rules.row_slabs is not None:
            with found.timed(CAPTURES):
                for part in captured(reading, seen, rules.row_slabs, rules.plan, found):
                    (held if part.site in rules.plan.held_sites else found.captures).append(part)
            rules.note_rows(reading, seen)
        if rules.lacking or any(record.places and record.row_slab is None for record in seen):
            kept = () if rules.row_slabs is None else rules.row_slabs.forms
            num = num_lacking(reading, seen, kept, self.taps.can_hold, rules.plan)
            found.num_untaken = int(num[[record.teaches for record in seen]].sum())
            found.num_crowded += int(num.sum()) - found.num_untaken
        if rules.statistic_slabs is not None:
            with found.timed(STATISTICS):
                found.statistics += measured(reading, seen, rules.statistic_slabs)
        found.seen.append(Seen(seen, reading, summaries, held, rules.plan))
        if self.plugged is not None:
            with found.timed(STATISTICS):
                found.plugged += self.plugged.measured(reading, seen)
        self.num_fired += reading.fired.sum(0)
        self.num_seen["all"] += len(seen)
        self.num_seen["sampling"] += sum(
            record.rows is None or record.has_all_logits or record.num_samples > 0 for record in seen
        )
        return found
