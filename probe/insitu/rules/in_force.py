"""Rules in force, and all that follows from them: groups of row sites, memory for rows and statistics, budgets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import chain
from typing import TYPE_CHECKING

import torch

from insitu.flight.settings import FlightRule
from insitu.row_forms import ITEM_BYTES, RowForm, form_of
from insitu.rules.byte_budget import Budget
from insitu.rules.due_rows import DueRows
from insitu.rules.pressure import DROP, SUMMARY
from insitu.rules.rule import select_within
from insitu.slabs.memory import NoMemory, check_room
from insitu.slabs.rows import Destinations, RowArea, RowSlabs, slab_bytes_of
from insitu.slabs.slab import Plan
from insitu.slabs.statistics import StatisticSlabs, periods, phases
from insitu.vocabulary import Phase

if TYPE_CHECKING:
    from insitu.overhead.account import Periods
    from insitu.rules.rule import Rule
    from insitu.session.row_map import Place
    from insitu.session.step import StepRecord
    from insitu.sites.site import Site
    from insitu.slabs.harvest import Reading

logger = logging.getLogger("insitu")

Shapes = Mapping[int, tuple[int, torch.dtype]]
"""Site -> (width, dtype), learned in the first step."""
Wanted = list["list[Place] | None"]
"""By destination group: the wanted rows, in the order of their places; None: every row, anonymous."""


def _of_phase(every: Periods, only: Mapping[int, int], phase: int | None) -> Periods:
    """Return the periods without sites whose statistics are for steps of another phase."""
    left = {n: tuple(site for site in sites if only.get(site.number, phase) == phase) for n, sites in every.items()}
    return {n: sites for n, sites in left.items() if sites}


def _say_no_rows(num_sites: int, num_bytes: int, error: Exception) -> None:
    why = error if isinstance(error, NoMemory) else f"there are no {num_bytes >> 20} MiB of memory for two steps"
    remedy = "name fewer sites, use cast= or topk=, or attach with a smaller max_rows"
    logger.warning("insitu: no rows are taken of %d sites, all are counted as dropped: %s; %s", num_sites, why, remedy)


class InForce:
    """The rules of one version at work. `choose_rows` runs on the step thread, `note_rows` on the drain.

    A step keeps the one it began with until the drain has read it: rules may change meanwhile.
    """

    def __init__(self, plan: Plan, device: torch.device, version: int = 0) -> None:
        """version: 0 are the rules that attach was given."""
        self.plan = plan
        self.version = version
        every = periods(plan.sites, plan.rules)
        only = phases(plan.sites, plan.rules)
        self._periods = {phase: _of_phase(every, only, phase) for phase in (None, *Phase)} if only else {}
        self._any_phase = every
        self._instead = [self._summarised(at) for at in range(len(plan.groups))]
        """By group: the sites whose statistics are taken where its rows are not."""
        asked = [site for each in (*every.values(), *self._instead) for site in each]
        named = list(dict.fromkeys(site.number for site in asked))
        self.statistic_slabs = StatisticSlabs(named, device) if named else None
        self.statistics_ns: Mapping[int, int] = {}
        """Site -> what its statistics take, where that was measured."""
        self.row_slabs: RowSlabs | None = None
        self.is_learned = False
        """Whether it is known which rows there are, with or without memory for them."""
        self.lacking = frozenset(chain.from_iterable(plan.row_sites))
        """Row sites without memory: in the first step all, later those that none could be had for or that have not
        fired. Rows that are due there are counted."""
        self._due_rows = DueRows(group.rule for group in plan.groups)
        self.device = device
        self._destinations: Destinations | None = None
        """With `row_slabs`."""
        self._areas: list[dict[int, RowArea] | None] = []
        self._row_bytes = [0] * len(plan.groups)
        """By group: bytes of one row at all its sites that have memory."""
        self._num_sites = [
            0 if isinstance(group.rule, FlightRule) else len(numbers)
            for group, numbers in zip(plan.groups, plan.row_sites, strict=True)
        ]
        """By group: sites whose rows are shipped as they come, or would be, as far as they are known to be there; none
        of what the flight recorder holds."""
        self._num_nameless = plan.max_rows
        """Rows of the last step without a row map that was read; the most until then."""
        rates = {rule: rule.rate for rule in plan.rules}
        self._budgets = {rule: Budget(rate) for rule, rate in rates.items() if rate is not None}

    def forms(self, shapes: Shapes) -> dict[int, RowForm]:
        """Return how the rows of each row site are kept, of those whose shape is known."""
        names = {number: (width, str(dtype).removeprefix("torch.")) for number, (width, dtype) in shapes.items()}
        return {
            number: form_of(group.rule, *names[number])
            for group, numbers in zip(self.plan.groups, self.plan.row_sites, strict=True)
            for number in numbers
            if number in names and names[number][1] in ITEM_BYTES
        }

    def learn(self, shapes: Shapes) -> None:
        """Make room for rows, now that shapes are known; where there is none, it is said and all are counted."""
        forms = self.forms(shapes)
        self.is_learned = True
        if forms:
            self._make_room(forms)
        kept = {} if self.row_slabs is None else self.row_slabs.forms
        self.lacking -= kept.keys()
        for at, numbers in enumerate(self.plan.row_sites):
            is_held = isinstance(self.plan.groups[at].rule, FlightRule)
            self._row_bytes[at] = sum(kept[number].num_bytes for number in numbers if number in kept)
            self._num_sites[at] = 0 if is_held else sum(number in forms for number in numbers)

    def _make_room(self, forms: Mapping[int, RowForm]) -> None:
        """Keep rows in memory that has these forms; where that cannot be had, in what there is."""
        num_groups, most = len(self.plan.groups), self.plan.max_rows
        try:
            check_room("those of two steps", 2 * slab_bytes_of(forms, most), self.device)
            slabs = RowSlabs(forms, most, self.device)
            destinations = Destinations(self.device, num_groups, most, self.plan.num_slabs)
        except (NoMemory, RuntimeError) as error:
            known = {} if self.row_slabs is None else self.row_slabs.forms
            _say_no_rows(len(forms.keys() - known.keys()), 2 * slab_bytes_of(forms, most), error)
            return
        self._areas = [None] * slabs.ring.size
        self._destinations = destinations
        self.row_slabs = slabs

    def renewed(self, shapes: Shapes) -> InForce:
        """Return the same rules at work with memory for rows of all these sites; self where it has that.

        Steps on their way keep the one that they began with. All but the memory for rows is shared.
        """
        forms = {} if self.row_slabs is None else self.row_slabs.forms
        if not self.forms(shapes).keys() - forms.keys():
            return self
        fresh = copy(self)
        fresh._row_bytes, fresh._num_sites = list(self._row_bytes), list(self._num_sites)
        fresh.learn(shapes)
        if self.row_slabs is not None and fresh.row_slabs is not None:
            fresh.row_slabs.broken.update(self.row_slabs.broken)
        return fresh

    def start_over(self) -> None:
        """Be a forked child's: places that are taken are of its parent's steps."""
        if self.row_slabs is not None:
            self.row_slabs.start_over()
        if self.statistic_slabs is not None:
            self.statistic_slabs.ring.clear()

    # -- step thread ---------------------------------------------------------------------------------------------

    def choose_rows(self, record: StepRecord) -> dict[int, RowArea]:
        """Pick the rows of a step and a slab for them; return their areas by site, empty where nothing is taken."""
        slabs, groups = self.row_slabs, self.plan.groups
        if (slabs is None and not self.lacking) or (wanted := self._chosen(record)) is None:
            return {}
        if all(places == [] for places in wanted):
            record.wants_more = False
            return {}
        if slabs is None:
            record.places, record.wants_more = wanted, False  # no period would take them
            record.teaches = not self.is_learned
            return {}
        is_any = any(places is None for places in wanted)
        sizes = self._bytes_of(wanted, record)
        num_bytes = slabs.slab_bytes if is_any else sum(sizes)
        taken = slabs.take(None if is_any else max(len(places or ()) for places in wanted), num_bytes)
        if taken is None:
            record.num_crowded += self._num_captures(wanted, record)
            return {}
        (record.row_slab, record.row_place), record.row_bytes = taken, num_bytes
        for group, size in zip(groups, sizes, strict=True):
            if (budget := self._budgets.get(group.rule)) is not None:
                budget.spend(size)
        record.places = wanted
        everything = range(self.plan.max_rows)
        rows = [everything if places is None else [p.row for p in places] for places in wanted]
        self._aim(rows, record)
        return self._areas_at(slabs, record.row_slab)

    def miss_rows(self, record: StepRecord) -> None:
        """Count the rows of a step that has no place for anything."""
        if self.is_learned and (wanted := self._chosen(record)) is not None:
            record.num_crowded += self._num_captures(wanted, record)

    def _chosen(self, record: StepRecord) -> Wanted | None:
        """Return the rows that are due in a step, None where no rule follows it; what gives way is counted."""
        if (rules := self._due_rows.followed(record)) is None:
            return None
        wanted = [self._wanted(at, rule, record) for at, rule in enumerate(rules)]
        if record.giving_way:
            wanted = self._give_way(wanted, record)
        return self._within_budgets(wanted, record)

    def _wanted(self, at: int, rule: Rule, record: StepRecord) -> list[Place] | None:
        """Return the rows that a group takes, whose rule is followed so in this step."""
        if isinstance(rule, FlightRule):  # all of them: whose they are is worked out if asked
            return None
        if not record.rows:
            return None if rule.wants((), record.phase) else []
        axis, most = record.axis_of(self.plan.groups[at].axis), self.plan.max_rows
        fitting, num_others = select_within(rule, record.rows, axis, most, record.phase)
        record.num_crowded += num_others * self._num_sites[at]
        return fitting

    def _summarised(self, at: int) -> tuple[Site, ...]:
        if getattr(self.plan.groups[at].rule, "on_full", DROP) != SUMMARY:
            return ()
        sites = (self.plan.sites[number] for number in self.plan.row_sites[at])
        return tuple(site for site in sites if site.shard != "partial")

    def _give_way(self, wanted: Wanted, record: StepRecord) -> Wanted:
        """Take no rows of rules that give way in this step, and count them."""
        shut = [getattr(group.rule, "on_full", DROP) in record.giving_way for group in self.plan.groups]
        pairs = list(zip(wanted, shut, strict=True))
        record.num_spared = self._num_captures([places if over else [] for places, over in pairs], record)
        given_up = [at for at, (places, over) in enumerate(pairs) if over and places != []]
        record.instead = [site for at in given_up for site in self._instead[at]]
        return [[] if over else places for places, over in pairs]

    def _within_budgets(self, wanted: Wanted, record: StepRecord) -> Wanted:
        """Leave out what the budget of a rule does not allow now: all its rows of the step, at all its sites."""
        is_open = {rule: budget.is_open(record.t0_ns) for rule, budget in self._budgets.items()}
        if all(is_open.values()):
            return wanted
        shut = [not is_open.get(group.rule, True) for group in self.plan.groups]
        record.num_left_out = self._num_captures(
            [places if over else [] for places, over in zip(wanted, shut, strict=True)], record
        )
        return [[] if over else places for places, over in zip(wanted, shut, strict=True)]

    def _num_rows(self, wanted: Wanted, record: StepRecord) -> list[int]:
        """Return how many rows each group wants; of a step without a row map what is stated, or was last read."""
        nameless = self._num_nameless if record.num_rows is None else min(record.num_rows, self.plan.max_rows)
        return [nameless if places is None else len(places) for places in wanted]

    def _num_captures(self, wanted: Wanted, record: StepRecord) -> int:
        return sum(n * sites for n, sites in zip(self._num_rows(wanted, record), self._num_sites, strict=True))

    def num_kept(self, record: StepRecord) -> int:
        """Return how many captures a step left or lacked memory for, as far as it is known."""
        return self._num_captures(record.places, record) if record.places else 0

    def _bytes_of(self, wanted: Wanted, record: StepRecord) -> list[int]:
        return [n * size for n, size in zip(self._num_rows(wanted, record), self._row_bytes, strict=True)]

    def _areas_at(self, slabs: RowSlabs, place: int) -> dict[int, RowArea]:
        areas = self._areas[place]
        if areas is None:
            areas = self._areas[place] = slabs.areas(place, self._dest_of())
        return areas

    def _aim(self, rows: Sequence[Sequence[int]], record: StepRecord) -> None:
        assert self._destinations is not None, "they come with memory for rows"
        self._destinations.aim(rows, -1 if record.slab is None else record.slab, record.row_place)

    def _dest_of(self) -> dict[int, torch.Tensor]:
        assert self._destinations is not None, "they come with memory for rows"
        vectors = self._destinations.of_group
        return {n: vectors[at] for at, numbers in enumerate(self.plan.row_sites) for n in numbers}

    def rings(self) -> dict[int, RowArea]:
        """Return the areas of row sites in all slabs; empty before shapes are known, or where no rule takes rows."""
        return {} if self.row_slabs is None else self.row_slabs.rings(self._dest_of())

    def aim_at_trash(self) -> None:
        """Let a step without wanted rows run as one that has some: each goes to the trash row."""
        assert self._destinations is not None, "they come with memory for rows"
        self._destinations.aim([()] * len(self.plan.groups))

    def periods_of(self, phase: int | None) -> Periods:
        """Return by N the sites whose statistics are taken in one of N steps of this phase: always the same mapping."""
        return self._periods.get(phase, self._any_phase)

    @property
    def num_row_sites(self) -> int:
        return len(self.row_slabs.forms) if self.row_slabs is not None else 0

    # -- drain ---------------------------------------------------------------------------------------------------

    def note_rows(self, reading: Reading, records: Sequence[StepRecord]) -> None:
        """Remember how many rows the last step without a row map had: the next one is taken to have as many."""
        if self.row_slabs is None:
            return
        sites = list(self.row_slabs.forms)
        for at in reversed(range(len(records))):
            if records[at].row_slab is not None and not records[at].rows:
                seen = reading.count[at, sites][reading.fired[at, sites]]
                self._num_nameless = min(int(seen.max(initial=0)), self.plan.max_rows)
                return
