"""Taps: what runs inside the model's forward pass, once a site. The hot path.

A tap reduces the tensor into its place in the current slab, then writes the step id into its stamp. It reads Python
state and changes none: no allocation beyond what torch's own reduction needs, no sync, no lock, no clock, no log.

A tapped module instance gets a `forward` of its own that calls the original and taps the result
(`insitu.taps.forwards`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any, Final

import torch
from torch import nn

from insitu.guard import Guard
from insitu.session.step import StepRecord
from insitu.sites.late import LateSites
from insitu.sites.paths import outermost_of, path_of
from insitu.sites.site import Site
from insitu.slabs.rows import RowArea
from insitu.slabs.slab import Plan, Views
from insitu.statistics.staging import Place
from insitu.statistics.taps import StatisticTaps, source_of
from insitu.statistics.workspace import Workspace
from insitu.taps.forwards import forward_of, give_forward, is_observed
from insitu.taps.fused import FusedTaps
from insitu.taps.graph import Desk, traced_forward
from insitu.taps.plain import can_hold, has_numbers, is_plain_dtype, plain, rows_of, valid_rows, width_of
from insitu.taps.transforms import is_transformed

_DIMS: Final = tuple(tuple(range(n)) for n in range(65))
"""All dims of a tensor, by how many it has: torch adds up at most 64."""
_INF: Final = float("inf")
_F32: Final = torch.float32
is_traced: Final = torch.compiler.is_dynamo_compiling
"""True only where a compiler traces the function that asks."""
NOWHERE, WHERE_FULL, EVERYWHERE = range(3)
"""At which sites a tap does more than its canary: none, those that a full step takes more of, or all."""
Tap = Callable[..., None]
"""`tap(x)`; at a residual stream `tap(x, source)` where the input of its layer is at hand."""


@dataclass(frozen=True, slots=True)
class Full:
    """What the taps of one step of the full variant take besides their canaries."""

    rows: dict[int, RowArea] = field(default_factory=dict)
    """Site -> where its rows go."""
    places: dict[int, Place] = field(default_factory=dict)
    """Site -> where its statistics go."""
    work: Workspace | None = None
    plugged: Mapping[int, Callable[[torch.Tensor, int | None], None]] = field(default_factory=dict)
    """Site -> what takes the statistics of other packages of it (`insitu.statistics.plugged`)."""

    def has(self, site: int) -> bool:
        """Tell whether anything is taken of a site besides its canary."""
        return site in self.rows or site in self.places or site in self.plugged


class Current:
    """The step that is open now. The host writes it between steps; taps only read it."""

    __slots__ = (
        "canary",
        "full",
        "host_stamp",
        "is_fused",
        "learning",
        "num_valid",
        "record",
        "sampled",
        "special",
        "step_id",
        "thread",
        "views",
    )

    def __init__(self) -> None:
        self.thread = 0
        """Identifier of the thread whose step is open; 0 = none, so no thread matches."""
        self.views: Views | None = None
        self.canary: tuple[torch.Tensor, ...] = ()
        self.host_stamp: memoryview | None = None
        """Stamps of a slab that lies in host memory: a store costs 0.06 us, a tensor copy 1.5."""
        self.step_id = -1
        self.record: StepRecord | None = None
        self.num_valid = {"tokens": -1, "samples": -1, "batch": -1}
        """Valid rows by axis; -1: all are."""
        self.full: Full | None = None
        """None in a quiet step."""
        self.sampled = False
        """Whether routers count what they choose in this step."""
        self.special = EVERYWHERE
        """Where a tap does more than its canary: padding, autograd and the first step are everywhere."""
        self.learning = True
        """True in the first step: shapes and dtypes are noted, on the host."""
        self.is_fused = False
        """Whether taps may be kernels of one launch (`insitu.taps.fused`) in this step."""


def _holds_tensor(found: Any, index: int) -> bool:
    """Tell whether there is a tensor at a place of what a module returned that could be summed."""
    try:
        x = found if isinstance(found, torch.Tensor) else found[index]
    except Exception:
        return False
    return isinstance(x, torch.Tensor) and has_numbers(x)


def _tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _note_count(views: Views, site: int, num_rows: int) -> None:
    """Say how many valid rows a tap saw: in host memory by a store, as with the stamp."""
    if views.host_count is None:
        views.count[site].fill_(num_rows)
    else:
        views.host_count[site] = num_rows


def _absmax(x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """Write each row's largest magnitude; NaN where a row has one. `scratch`: as `out`, overwritten.

    One kernel on a device; on the host the norm is scalar code: 87 us for 4 x 8192 values, the two extremes take 8.
    """
    if not x.shape[1]:
        out.zero_()
    elif x.is_cuda and x.is_floating_point() and x.dtype is not torch.float64:  # a norm of it would be float64
        torch.linalg.vector_norm(x, _INF, 1, dtype=_F32, out=out)
    elif x.dtype is _F32:
        torch.amax(x, 1, out=out)
        torch.amin(x, 1, out=scratch)
        torch.maximum(out, scratch.neg_(), out=out)
    else:  # reductions do not convert: through values of its own, a few bytes a row
        torch.maximum(torch.amax(x, 1).to(_F32), torch.amin(x, 1).to(_F32).neg_(), out=out)


def left_to_observe(model: nn.Module, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the sites of modules that no other session observes; a part with a session of its own keeps it."""
    taken = {path_of(fqn) for fqn, module in model.named_modules() if is_observed(module)}
    if not taken:
        return sites
    parts = tuple(f"{fqn}." for fqn in taken)
    left = [site for site in sites if site.fqn not in taken and not site.fqn.startswith(parts)]
    return tuple(replace(site, number=number) for number, site in enumerate(left))


class Taps:
    """Installs and removes the taps of one model, and knows what they have learned about its sites."""

    def __init__(
        self,
        plan: Plan,
        current: Current,
        step_id: torch.Tensor,
        guard: Guard,
        without_canary: frozenset[int] = frozenset(),
        fused: FusedTaps | None = None,
    ) -> None:
        """without_canary: numbers of sites that take nothing in a quiet step. fused: None where no kernel can run."""
        self.plan = plan
        self._without_canary = without_canary
        self._fused = fused
        self.current = current
        self.shapes: dict[int, tuple[int, torch.dtype]] = {}
        """Site -> (width, dtype), learned when it first fires."""
        self.num_calls: Counter[int] = Counter()
        """Calls of each site in the first step: later, to count would be state that a tap keeps."""
        self.desk = Desk()
        self._step_id = step_id
        self._guard = guard
        self.on_transformed: Callable[[], None] = lambda: None
        """Called where a tap failed under a transform of torch (`insitu.taps.transforms`)."""
        self._scratch = torch.empty(plan.max_rows, dtype=_F32, device="cpu")
        self._ones = torch.ones(plan.max_rows, dtype=torch.int32, device=step_id.device) if plan.loads else None
        self._modules: dict[str, nn.Module] = {}
        self._undo: dict[int, Callable[[], None]] = {}
        self._unfit: set[int] = set()
        self._odd: set[int] = set()
        """Sites of which torch takes no sum as they are, and those of which nothing is known yet."""
        self.late = LateSites()
        self.statistics = StatisticTaps(step_id)

    def install(self, model: nn.Module) -> Tap | None:
        """Tap every site; return the tap of the model's own output, which the caller's root forward runs."""
        self._modules = outermost_of(model)
        root = None
        for site in self.plan.sites:
            if site.fqn:
                self._put_on(site)
            else:
                root = self.make(site)
        return root

    def _put_on(self, site: Site) -> None:
        module = self._modules[site.fqn]
        if site.io == "in" or site.part is not None:
            make = self._named_forward
        else:
            make = self._router_forward if site.num_experts else self._forward
        with suppress(TypeError):  # its class allows no subclass an instance: the site never fires
            self._undo[site.number] = give_forward(module, make(forward_of(module), site, self.make(site)))

    def remove(self) -> None:
        for number in reversed(list(self._undo)):  # of a module with several sites, the outermost first
            self._undo.pop(number)()
        self._modules.clear()

    def is_unfit(self, number: int) -> bool:
        """Tell whether a site's module was called and returned nothing a sum could be taken of."""
        return number in self._unfit

    def can_hold(self, number: int) -> bool:
        """Tell whether memory for rows of a site can be made: it is known what it returns, and it has sums."""
        return number in self.shapes and number not in self._unfit and can_hold(self.shapes[number][1])

    def expect_late(self) -> None:
        """After the first step: let sites that did not fire in it be learned when they do."""
        known = self.shapes.keys() | self._unfit
        self.late.expect(site.number for site in self.plan.sites if site.number not in known)
        self._odd |= self.late.silent

    def learn(self, number: int, width: int, dtype: torch.dtype, num_calls: int = 1) -> None:
        """Take note of what a site is that fires first."""
        if self.current.learning:
            self.num_calls[number] += num_calls
        self.shapes.setdefault(number, (width, dtype))
        (self._odd.discard if is_plain_dtype(dtype) else self._odd.add)(number)

    def tell_unfit(self, numbers: Iterable[int]) -> None:
        """Take note of sites whose modules return nothing a sum could be taken of."""
        self._unfit.update(numbers)

    def remove_unfit(self) -> None:
        """After the first step: take the taps off sites that return nothing a sum could be taken of.

        Sites of one module are classes around each other: all come off, and those that fit go on again.
        """
        of_modules = {site.fqn for site in self.plan.sites if site.number in self._unfit}
        moved = [site for site in self.plan.sites if site.fqn in of_modules and site.number in self._undo]
        for site in reversed(moved):
            self._undo.pop(site.number)()
        for site in moved:
            if site.number not in self._unfit:
                self._put_on(site)

    def _forward(self, inner: Callable[..., Any], site: Site, tap: Tap) -> Callable[..., Any]:
        current, number, index, miss = self.current, site.number, site.index, partial(self.miss, site)
        always = site.boundary or number in self._without_canary  # its tap does more, or nothing at all
        has_source, odd = site.is_residual, self._odd
        tensor, total, dims, where_full = torch.Tensor, torch.sum, _DIMS, WHERE_FULL
        traced = traced_forward(inner, site, self.desk, site.number in self._without_canary)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                return traced(self, *args, **kwargs)
            output = inner(self, *args, **kwargs)
            if current.thread == get_ident():
                try:
                    x = output if isinstance(output, tensor) else output[index]
                    special = current.special
                    if (
                        always
                        or (special and (special != where_full or current.full.has(number)))  # type: ignore[union-attr]
                        or number in odd
                    ):
                        if has_source and current.full is not None:
                            tap(x, source_of(x, args, kwargs))
                        else:
                            tap(x)
                    else:
                        total(x, dims[x.ndim], dtype=_F32, out=current.canary[number])
                        current.host_stamp[number] = current.step_id  # type: ignore[index]
                except Exception as error:
                    miss(error, output)
            return output

        return forward

    def miss(self, site: Site, error: Exception, found: Any) -> None:
        """As `fail`, but that a site has not fired in a step that has nothing of it. found: what there was."""
        is_new = self.current.learning or site.number in self.late.silent
        if is_new or (site.number not in self._unfit and _holds_tensor(found, site.index)):
            self.fail(site, error)

    def fail(self, site: Site, error: Exception) -> None:
        """Contain the error of a tap: where it first fires the site is taken for unfit, later all taps fall silent.

        Of a module that is called under a transform there was nothing to take: its tensors stand for others.
        """
        if is_transformed():
            self.on_transformed()
        elif self.current.learning or site.number in self.late.silent:
            self._unfit.add(site.number)
            self.late.give_up(site.number)
        else:
            self.current.thread = 0
            self._guard.contain(error)

    def _router_forward(self, inner: Callable[..., Any], site: Site, tap: Tap) -> Callable[..., Any]:
        """As `_forward`, for a module that returns (logits, ..., chosen experts): they are counted too."""
        current, miss, count = self.current, partial(self.miss, site), self.count_chosen
        traced = traced_forward(inner, site, self.desk, site.number in self._without_canary)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                return traced(self, *args, **kwargs)
            output = inner(self, *args, **kwargs)
            if current.thread == get_ident():
                try:
                    if current.sampled or current.learning:  # the first step shows whether it can be done at all
                        count(site, output[-1])
                    tap(output[0])
                except Exception as error:
                    miss(error, output)
            return output

        return forward

    def _named_forward(self, inner: Callable[..., Any], site: Site, tap: Tap) -> Callable[..., Any]:
        """As `_forward`, for sites that only rules name: a tensor the module is given, or part of what it returns."""
        current, miss, index = self.current, partial(self.miss, site), site.index
        part = site.part.of if site.part is not None else None
        traced = traced_forward(inner, site, self.desk, site.number in self._without_canary)

        def take(found: Any) -> None:
            try:
                x = found if isinstance(found, torch.Tensor) else found[index]
                tap(x if part is None else part(x))
            except Exception as error:
                miss(error, found)

        def of_input(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                return traced(self, *args, **kwargs)
            if current.thread == get_ident():
                take(_tensors_of(args, kwargs))
            return inner(self, *args, **kwargs)

        def of_output(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                return traced(self, *args, **kwargs)
            output = inner(self, *args, **kwargs)
            if current.thread == get_ident():
                take(output)
            return output

        return of_input if site.io == "in" else of_output

    def count_chosen(self, site: Site, chosen: torch.Tensor) -> None:
        """Count, for each expert, the valid rows that chose it. chosen: int64[tokens, top_k]."""
        views, ones = self.current.views, self._ones
        assert views is not None and ones is not None, "a router taps inside an open step, of a plan that has routers"
        valid = self.current.num_valid[site.axis]
        chosen = rows_of(chosen)[: self.plan.max_rows if valid < 0 else min(valid, self.plan.max_rows)]
        load = views.load[site.number].zero_()
        for column in chosen.unbind(1):
            load.scatter_add_(0, column, ones[: chosen.shape[0]])
        _note_count(views, site.number, chosen.shape[0])

    def make(self, site: Site) -> Tap:
        """Return the whole tap of a site: a function of the tensor, to be called inside an open step."""
        current, number, axis = self.current, site.number, site.axis
        silent = self.late.silent

        def tap(x: torch.Tensor, source: torch.Tensor | None = None) -> None:
            if (sheet := self.desk.sheet) is not None:  # recorded, not run: what Python chose now would be repeated
                sheet.note(number, axis, x)
                return
            views = current.views
            assert views is not None, "a tap runs inside an open step only"
            if is_new := current.learning or number in silent:
                self.learn(number, width_of(x), x.dtype)
            if x.requires_grad:
                x = x.detach()
            x = valid_rows(x, current.num_valid[axis])
            numbers = plain(x)
            if site.boundary:
                self._take_boundary(number, numbers, views)
            else:
                torch.sum(numbers, _DIMS[numbers.ndim], dtype=_F32, out=views.canary[number])
            if current.full is not None:
                self._take_full(site, x, source, current.full)
            if current.host_stamp is None:
                views.stamp[number].copy_(self._step_id)
            else:
                current.host_stamp[number] = current.step_id
            if is_new:
                self.late.fired(number)

        fused = self._fused
        chosen: Tap = tap if fused is None else fused.make(site, current, self.desk, silent, tap, self.measure)

        def only_full(x: torch.Tensor, source: torch.Tensor | None = None) -> None:
            if current.full is not None or current.learning or number in silent:
                chosen(x, source)

        return only_full if number in self._without_canary else chosen

    def _take_boundary(self, number: int, x: torch.Tensor, views: Views) -> None:
        """Take each row's sum and largest magnitude; of the sums, if it has all, the drain makes the canary."""
        rows = rows_of(x)
        n = rows.shape[0]
        _note_count(views, number, n)
        if n > self.plan.max_rows:
            torch.sum(x, _DIMS[x.ndim], dtype=_F32, out=views.canary[number])
            n = self.plan.max_rows
            rows = rows[:n]
        torch.sum(rows, 1, dtype=_F32, out=views.row_sum[number][:n])
        _absmax(rows, views.row_absmax[number][:n], self._scratch[:n])

    def _take_full(self, site: Site, x: torch.Tensor, source: torch.Tensor | None, full: Full) -> None:
        """Take what the full variant adds: raw rows, and statistics."""
        number = site.number
        if (area := full.rows.get(number)) is not None:
            self._take_rows(site, rows_of(x), area)
        self.measure(site, x, source, full)

    def measure(self, site: Site, x: torch.Tensor, source: torch.Tensor | None, full: Full) -> None:
        """Take what statistics there are of the valid rows x, of this package and of others."""
        current, number = self.current, site.number
        host_step = None if current.host_stamp is None else current.step_id
        if (place := full.places.get(number)) is not None:
            assert full.work is not None, "places come with a workspace"
            self.statistics.take(site, x, source, place, full.work, host_step)
        if (take := full.plugged.get(number)) is not None:
            take(x, host_step)

    def _take_rows(self, site: Site, x: torch.Tensor, area: RowArea) -> None:
        views = self.current.views
        assert views is not None, "a tap runs inside an open step only"
        _note_count(views, site.number, x.shape[0])
        most = self.plan.max_rows
        area.take(site, x if x.shape[0] <= most else x[:most], self.current.step_id)
