"""One observed model: its plan, slabs and taps; opens a step on the step thread, reads it back on the drain."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from insitu.guard import Guard
from insitu.rules import Rule
from insitu.sites import Site, require, resolve
from insitu.slab import ControlBlock, Plan, Readings, RowSlabs, Slabs
from insitu.step import StepRecord
from insitu.taps import Current, Tap, Taps
from insitu.vocabulary import Variant

ROW_BUDGET_BYTES: Final = 64 << 20
"""Most memory for raw rows, all slabs together."""
CALIBRATION_ROUNDS: Final = 5


@dataclass
class Harvest:
    """Rows made from finished steps, as columns of `summaries` and `captures`."""

    summaries: list[dict[str, Any]] = field(default_factory=list)
    captures: list[dict[str, Any]] = field(default_factory=list)
    num_crowded: int = 0
    """Captures that were wanted and did not fit."""
    num_unseen: int = 0
    """Summaries of steps that found no free slab."""


class Observer:
    """Everything that belongs to one model. `begin`/`end` run on the step thread, `harvest` on the drain."""

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Rule],
        max_rows: int,
        axes: Mapping[str, str] | None,
    ) -> None:
        sites = resolve(model, axes)
        for rule in rules:
            require(rule.sites, sites)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.plan = Plan(sites, tuple(rules), max_rows)
        self.current = Current()
        self.guard = Guard("taps")
        self.slabs = Slabs(self.plan, self.device)
        self.control = ControlBlock(self.device, max(1, len(self.plan.groups)), max_rows)
        self.taps = Taps(self.plan, self.current, self.control.step_id, self.guard)
        self.row_slabs: RowSlabs | None = None
        self.num_fired = np.zeros(self.plan.num_sites, np.int64)
        self.num_steps = 0
        self.hook_ns = 0
        """Measured cost of one step's taps (see `_calibrate`)."""
        self.explicit: dict[str, Site] = {}
        self._explicit_taps: dict[str, Tap] = {}
        self._boundaries = self.plan.boundaries
        self._group_of = {site.number: self.plan.group_of(site) for site in sites}
        self._dest_rows = list(self.control.dest)
        self.root_tap = self.taps.install(model)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.plan.sites, *self.explicit.values())

    # -- step thread ---------------------------------------------------------------------------------------------

    def begin(self, record: StepRecord) -> None:
        """Choose the slab and the variant of a step, and let its taps write."""
        record.slab = self.slabs.ring.take()
        current = self.current
        if record.slab is None:
            return
        wanted = self._choose_rows(record)
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
        current.special = (
            current.learning
            or wanted is not None
            or record.num_padded > 0
            or current.host_stamp is None
            or torch.is_grad_enabled()
        )
        current.thread = get_ident()

    def end(self, record: StepRecord) -> None:
        """Close the step: taps fall silent, and on CUDA an event marks when its slab may be read."""
        self.silence()
        current = self.current
        if self.device.type == "cuda":
            record.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            record.ready.record()
        if current.learning and self.taps.shapes:
            self._learned()

    def silence(self) -> None:
        """Let no tap write until the next step begins."""
        current = self.current
        current.thread = 0
        current.views = None
        current.rows = None

    def _choose_rows(self, record: StepRecord) -> list[list[int]] | None:
        """Pick the full variant and the row slab if any row of this step is wanted and there is room."""
        rows, slabs = record.rows or (), self.row_slabs
        if slabs is None or not any(group.rule.wants(rows) for group in self.plan.groups):
            return None
        record.places = [self._places(group, record) for group in self.plan.groups]
        record.row_slab = slabs.ring.take()
        if record.row_slab is None:
            record.num_crowded += sum(len(places or ()) for places in record.places)
            record.places = []
            return None
        record.variant = Variant.FULL
        view = slabs.views[record.row_slab]
        groups = self.plan.groups
        self.current.rows = {
            site: (area, self._dest_rows[groups.index(group)])
            for site, area in view.items()
            if (group := self._group_of[site]) is not None
        }
        everything = list(range(self.plan.max_rows))
        return [everything if places is None else [p.row for p in places] for places in record.places]

    def _places(self, group: Any, record: StepRecord) -> Any:
        if not record.rows:
            return None
        found = group.rule.select(record.rows, group.axis, 0)
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
            if site.number in shapes and self.plan.group_of(site) is not None
        }
        if widths:
            self.row_slabs = RowSlabs(widths, self.plan.max_rows, ROW_BUDGET_BYTES, self.device)
        self._calibrate()

    def _calibrate(self) -> None:
        """Time every tap on a tensor of its learned width, best of a few: what a step pays for them."""
        place = self.slabs.ring.size - 1
        current = self.current
        if self.slabs.ring.num_taken == self.slabs.ring.size:
            return
        current.views = self.slabs.views[place]
        current.host_stamp = current.views.host_stamp
        total = 0
        for site in self.plan.sites:
            if site.number not in self.taps.shapes:
                continue
            width, dtype = self.taps.shapes[site.number]
            sample = torch.zeros((4, width), dtype=dtype, device=self.device)
            tap, best = self.taps.make(site), 1 << 60
            for _ in range(CALIBRATION_ROUNDS):
                began = time.perf_counter_ns()
                tap(sample)
                best = min(best, time.perf_counter_ns() - began)
            total += best
        current.views = None
        self.hook_ns = total

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

    # -- drain ---------------------------------------------------------------------------------------------------

    def harvest(self, record: StepRecord, into: Harvest) -> None:
        """Read one finished step's slab, give its place back, and append what it says."""
        self.num_steps += 1
        into.num_crowded += record.num_crowded * len(self.row_slabs.areas if self.row_slabs else ())
        if record.slab is None:
            into.num_unseen += len(self.plan.boundaries)
            return
        readings = self.slabs.read(record.slab)
        fired = readings.stamp == record.step_id
        self.num_fired += fired
        self._summarise(record, readings, fired, into)
        if record.row_slab is not None:
            self._capture(record, readings, fired, into)
        self.slabs.ring.free()

    def _summarise(self, record: StepRecord, readings: Readings, fired: Any, into: Harvest) -> None:
        flagged = False
        found = []
        for at, site in enumerate(self._boundaries):
            if not fired[site]:
                continue
            num_rows, canary = int(readings.count[site]), float(readings.canary[site])
            n = min(num_rows, self.plan.max_rows)
            absmax = float(readings.row_absmax[at, :n].max()) if n else 0.0
            bad: list[int] = []
            if not (math.isfinite(absmax) and math.isfinite(canary)):
                flagged = True
                bad = np.flatnonzero(~np.isfinite(readings.row_absmax[at, :n])).tolist()
            row_sum = float(readings.row_sum[at, :n].sum(dtype=np.float64))
            found.append(
                {
                    "step_id": record.step_id,
                    "site": site,
                    "num_rows": num_rows,
                    "canary": canary,
                    "row_sum": row_sum,
                    "absmax": absmax,
                    "nonfinite_rows": bad,
                }
            )
        if flagged:
            found += [
                {"step_id": record.step_id, "site": site, "canary": float(readings.canary[site])}
                for site in np.flatnonzero(fired).tolist()
                if site not in self._boundaries
            ]
        into.summaries += sorted(found, key=lambda row: int(row["site"]))

    def _capture(self, record: StepRecord, readings: Readings, fired: Any, into: Harvest) -> None:
        assert self.row_slabs is not None and record.row_slab is not None, "the step ran without a row slab"
        groups = self.plan.groups
        for site in self.row_slabs.areas:
            group = self._group_of[site]
            if not fired[site] or group is None:
                continue
            places = record.places[groups.index(group)]
            n = len(places) if places is not None else min(int(readings.count[site]), self.plan.max_rows)
            values = self.row_slabs.read(record.row_slab, site, n)
            dtype, width = str(values.dtype).removeprefix("torch."), values.shape[1]
            raw = values.view(torch.uint8).numpy()
            for i in range(n):
                place = places[i] if places is not None else None
                into.captures.append(
                    {
                        "step_id": record.step_id,
                        "site": site,
                        "request": place.request if place else None,
                        "row": place.row if place else i,
                        "position": place.position if place else -1,
                        "dtype": dtype,
                        "shape": [width],
                        "data": raw[i].tobytes(),
                    }
                )
        self.row_slabs.ring.free()
