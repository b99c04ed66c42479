"""Statistics of other packages inside a step: their memory, when they are due, and where their errors stop.

Each is tried on tensors of ours, of the widths the first step showed, before it is let into a step. One that raises,
there or later, is switched off: the forward it ran in goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from insitu.guard import Guard
from insitu.overhead.step_costs import Burden
from insitu.plugins.discovery import one_line
from insitu.rules.rule import ROWS, SUMMARY, Rule
from insitu.rules.sampling import is_sampled
from insitu.sites.site import Site, is_named
from insitu.slabs.harvest import Plugged
from insitu.slabs.slab import NEVER, Ring
from insitu.slabs.statistics import NUM_SLABS
from insitu.statistic_plugins import Measure, load_measures
from insitu.statistics.parts import Floats, Ints
from insitu.taps.eager import Current, Full
from insitu.taps.plain import rows_of
from insitu.vocabulary import Variant

if TYPE_CHECKING:
    from insitu.session.step import StepRecord
    from insitu.slabs.harvest import Reading

TRIAL_ROWS: Final = 4
"""Rows of the tensor on which a statistic is tried."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A statistic of one site, in one step of `every`."""

    measure: Measure
    site: Site
    every: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Where in a slab the part of one `Wanted` goes."""

    column: int
    stamp: torch.Tensor
    values: torch.Tensor
    """float64[len(fields)]."""


def wanted_of(sites: Sequence[Site], rules: Sequence[Rule]) -> list[Wanted]:
    """Return what the rules ask of other packages' statistics: of each, the first rule that names a site.

    A partial site (what one rank holds before the all-reduce) is left out: it is no value of the model. Raises
    PluginError for a statistic that nobody has installed.
    """
    names = dict.fromkeys(rule.take for rule in rules if rule.take not in (ROWS, SUMMARY))
    if not names:
        return []
    found = []
    for name, measure in load_measures(names).items():
        for site in sites:
            rule = next((rule for rule in rules if rule.take == name and is_named(rule.sites, site)), None)
            if rule is not None and site.shard != "partial":
                found.append(Wanted(measure, site, rule.period))
    return found


def plugged_statistics(
    sites: Sequence[Site], rules: Sequence[Rule], device: torch.device, run: str, step_id: torch.Tensor
) -> PluggedStatistics | None:
    """Return the statistics of other packages that rules name; None where they name none (see `wanted_of`)."""
    wanted = wanted_of(sites, rules)
    return PluggedStatistics(wanted, device, run, step_id) if wanted else None


class PluggedStatistics:
    """`choose` and what it hands to the taps run on the step thread, `measured` and `take_failures` on the drain."""

    def __init__(self, wanted: Sequence[Wanted], device: torch.device, run: str, step_id: torch.Tensor) -> None:
        """step_id: of the control block; what is written on a device comes from there."""
        self.ring = Ring(NUM_SLABS)
        self._wanted = tuple(wanted)
        self._device, self._run, self._step_id = device, run, step_id
        self._guards = {
            each.measure.name: Guard(f"statistic {each.measure.plugin}", "everything else goes on") for each in wanted
        }
        self._failures: deque[str] = deque()
        self._raised: Exception | None = None
        self._cost_ns = [0.0] * len(wanted)
        """What each costs a step of a few rows, as measured when it was tried."""
        self._asked_ns = 0.0
        """What they cost a step on average, at the periods of their rules."""
        self._is_tried = False
        self._by_period: dict[int, list[int]] = {}
        for column, each in enumerate(wanted):
            self._by_period.setdefault(each.every, []).append(column)
        ends = np.cumsum([len(each.measure.fields) for each in wanted])
        self._spans = [slice(end - len(each.measure.fields), end) for end, each in zip(ends, wanted, strict=True)]
        with torch.inference_mode(False):
            self._stamps = torch.full((NUM_SLABS, len(wanted)), NEVER, dtype=torch.int64, device=device)
            self._values = torch.zeros((NUM_SLABS, int(ends[-1])), dtype=torch.float64, device=device)
        self._slots = tuple(
            [Slot(at, stamps[at], values[span]) for at, span in enumerate(self._spans)]
            for stamps, values in zip(self._stamps, self._values, strict=True)
        )

    @property
    def sites(self) -> frozenset[int]:
        """Numbers of the sites that are measured."""
        return frozenset(each.site.number for each in self._wanted)

    # -- step thread ---------------------------------------------------------------------------------------------

    def due(self, record: StepRecord) -> list[int]:
        """Return which of what is wanted is taken in this step: on every rank the same, but for what was switched off.

        None before they were tried.
        """
        if not self._is_tried:
            return []
        step, doublings = record.step_id, record.doublings
        due = (at for every, at in self._by_period.items() if is_sampled(self._run, step, every << doublings))
        return [column for columns in due for column in columns if not self._is_off(column)]

    def choose(self, record: StepRecord, current: Current) -> None:
        """Pick the full variant and places for what is due in this step, if there is room."""
        due = self.due(record)
        if not due:
            return
        record.plugged_slab = self.ring.take()
        if record.plugged_slab is None:
            record.num_unplugged = len(due)
            return
        record.variant, record.plugged_due = Variant.FULL, due
        current.full = replace(current.full or Full(), plugged=self._takes(record.plugged_slab, due))

    def _takes(self, slab: int, due: Sequence[int]) -> Mapping[int, Callable[[torch.Tensor, int | None], None]]:
        """Return by site what its tap calls with the valid rows, and with the step where the slab is host memory."""
        slots: dict[int, list[Slot]] = {}
        for at in due:
            slots.setdefault(self._wanted[at].site.number, []).append(self._slots[slab][at])
        return {site: partial(self._take, found) for site, found in slots.items()}

    def _take(self, slots: Sequence[Slot], x: torch.Tensor, host_step: int | None) -> None:
        x = rows_of(x)
        for slot in slots if x.numel() else ():
            if self._is_off(slot.column):
                continue
            try:
                slot.values.copy_(self._part(slot.column, x))
                if host_step is None:
                    slot.stamp.copy_(self._step_id)
                else:
                    slot.stamp.fill_(host_step)
            except Exception as error:  # another author's code
                self._fail(slot.column, error)

    def _part(self, column: int, x: torch.Tensor) -> torch.Tensor:
        measure = self._wanted[column].measure
        part = measure.statistic.compute(x)
        if part.shape != (len(measure.fields),):
            raise ValueError(f"compute gave {list(part.shape)}, not the {len(measure.fields)} numbers of its fields")
        return part

    def _is_off(self, column: int) -> bool:
        return self._guards[self._wanted[column].measure.name].num_errors > 0

    def _fail(self, column: int, error: Exception) -> None:
        """Switch a statistic off. Under pytest its error waits for `raise_again`: a tap's own boundary is nearer."""
        measure, site = self._wanted[column].measure, self._wanted[column].site
        self._failures.append(
            f"the statistic {measure.plugin} failed at {site.name} and is switched off: {one_line(error)}"
        )
        try:
            self._guards[measure.name].contain(error)
        except Exception as again:
            self._raised = again
        self._account()

    def raise_again(self) -> None:
        """Raise what a statistic raised, under pytest; outside of it there is nothing to raise."""
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def rehearse(self, shapes: Mapping[int, tuple[int, torch.dtype]]) -> None:
        """Try each statistic on a tensor as wide as its site's, and note what it costs. shapes: (width, dtype) by site.

        One that raises, or that changes the tensor, is never let into a step.
        """
        self._is_tried = True
        for column, each in enumerate(self._wanted):
            if each.site.number in shapes and not self._is_off(column):
                try:
                    self._cost_ns[column] = self._try(column, *shapes[each.site.number])
                except Exception as error:  # another author's code
                    self._fail(column, error)
        self._account()

    def _account(self) -> None:
        """Add up what is asked of a step, without what is off."""
        self._cost_ns = [0.0 if self._is_off(column) else cost for column, cost in enumerate(self._cost_ns)]
        self._asked_ns = sum(cost / each.every for cost, each in zip(self._cost_ns, self._wanted, strict=True))

    def _try(self, column: int, width: int, dtype: torch.dtype) -> int:
        """Return how long a statistic takes in ns, the second time; no random numbers, those are the model's."""
        wave = torch.arange(TRIAL_ROWS * width, dtype=torch.float32, device=self._device).sin_().mul_(4)
        x = wave.reshape(TRIAL_ROWS, width).to(dtype)
        before = x.clone()
        self._part(column, x)
        began = time.perf_counter_ns()
        self._part(column, x)
        took = time.perf_counter_ns() - began
        if not torch.equal(x.view(torch.uint8), before.view(torch.uint8)):  # bits, whatever the dtype can do
            raise ValueError("compute changed the tensor it was given, which is the model's")
        return took

    # -- drain ---------------------------------------------------------------------------------------------------

    def take_failures(self) -> list[str]:
        """Return, once each, the sentences about statistics that failed."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def burden(self, record: StepRecord) -> Burden:
        """Return what a step was asked for, and what was taken of it: what the governor goes by."""
        return Burden(self._asked_ns, sum(self._cost_ns[column] for column in record.plugged_due))

    def sampling_rows(self, record: StepRecord) -> list[dict[str, Any]]:
        """Return the rows of `sampling` of a step: how many steps each of its parts speaks for."""
        found: dict[tuple[str, int], list[int]] = {}
        for each in (self._wanted[at] for at in record.plugged_due):
            found.setdefault((each.measure.name, each.every), []).append(each.site.number)
        return [
            {
                "step_id": record.step_id,
                "take": take,
                "every": every,
                "period": every << record.doublings,
                "sites": sites,
            }
            for (take, every), sites in found.items()
        ]

    def measured(self, reading: Reading, records: Sequence[StepRecord]) -> Iterator[Plugged]:
        """Yield what was taken in these steps, a part a statistic. records: those of the reading."""
        taken = np.array([i for i, record in enumerate(records) if record.plugged_slab is not None], np.int64)
        if not len(taken):
            return
        slabs = torch.tensor([records[i].plugged_slab for i in taken], dtype=torch.int64, device=self._device)
        stamps, values = self._stamps[slabs].cpu().numpy(), self._values[slabs].cpu().numpy()
        step_id, sites = reading.step_id[taken], np.array([each.site.number for each in self._wanted])
        told = (stamps == step_id[:, None]) & reading.fired[taken][:, sites]
        for name in self._guards:
            columns = [at for at, each in enumerate(self._wanted) if each.measure.name == name]
            if told[:, columns].any():
                yield self._parts(columns, step_id, sites, told, values)

    def _parts(
        self, columns: Sequence[int], step_id: Ints, sites: Ints, told: NDArray[np.bool_], values: Floats
    ) -> Plugged:
        measure = self._wanted[columns[0]].measure
        step, at = np.nonzero(told[:, columns])
        stacked = np.stack([values[:, self._spans[column]] for column in columns], 1)
        return Plugged(measure.name, measure.fields, step_id[step], sites[columns][at], stacked[step, at])
