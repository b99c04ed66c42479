"""A model that `torch.compile` runs: its step begins and ends outside of the graph, its taps are inside.

The forward that attaching gives a model is left out of what is compiled: it puts the compiler aside, opens the step,
and hands it the *entry* instead, a function that is the model's own forward with a sheet for its taps around it
(`insitu.taps.graph`). There is one entry for each variant of a step, so that each has compiled versions of its own, and
new code objects for each model: what was compiled of a twin without taps is never run, and models of one class do not
use up each other's recompile limit. Nothing of Dynamo is imported unless the program has done so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from insitu.sites.site import Site
from insitu.slabs.graph import GraphSlabs
from insitu.statistics.taps import source_of
from insitu.taps.compilers import Compiler, fuses, keep_in_place, put_aside, under, with_own_code
from insitu.taps.eager import EVERYWHERE
from insitu.taps.forwards import Forward
from insitu.taps.graph import UNFIT, Desk, Kept, Seen, Sheet, found_in, kept
from insitu.taps.plain import valid_rows
from insitu.taps.root import tap_root
from insitu.vocabulary import Variant

if TYPE_CHECKING:
    from insitu.rules.in_force import InForce
    from insitu.session.live import Session
    from insitu.session.step import StepRecord
    from insitu.taps.observer import Observer

logger = logging.getLogger("insitu")

NUM_KEPT: Final = 2
"""Rules whose full graphs, with their memory for rows, are kept: those in force, and those that are so again after."""
FUSED: Final = "compiled_fused"
_FUSED: Final = (
    "Inductor makes kernels of the model and its taps together: outputs may differ in their last bits from those of "
    "the model compiled without taps, as it rounds what it stores between kernels and not what stays in one"
)
_ENTRIES: Final = count()


def _entry(
    model: type[nn.Module],
    inner: Forward,
    desk: Desk,
    root: Site | None,
    rows: dict[int, Kept] | None = None,
    measured: frozenset[int] = frozenset(),
) -> Any:
    """Return the function that is compiled: `entry(module, control, ...)`. rows, measured: see `Sheet`."""
    number, axis = (root.number, root.axis) if root is not None else (-1, "tokens")

    # `self`, as a model's forward has it: Dynamo names floats by where they are, and which of those names became
    # constants it remembers for all that it compiles after. By another name here other kernels may come out.
    def entry(self: nn.Module, control: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        sheet = desk.sheet = Sheet(desk, control, rows, measured)
        output = inner(self, *args, **kwargs)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if number >= 0 and isinstance(first, torch.Tensor):
            sheet.note(number, axis, found_in(first, 0))
        sheet.write()
        desk.sheet = None
        desk.seen = tuple(sheet.seen.values())
        return output

    # Dynamo remembers by place and name of a code which sizes have varied: not of one model what holds for another,
    # whose slabs have other sizes.
    name = f"forward_of_{model.__module__}_{model.__qualname__}_{next(_ENTRIES)}".replace(".", "_")
    entry.__code__ = entry.__code__.replace(co_name=name)
    return entry


def count_untaken(record: StepRecord) -> None:
    """Account for what a quiet graph does not take."""
    record.num_unmeasured += len(record.due)
    record.num_unplugged += len(record.plugged_due)
    record.due = record.plugged_due = ()
    record.sampled, record.variant = False, Variant.QUIET


class Graphs:
    """Runs one model's forward when a compiler is at work."""

    def __init__(self, model: type[nn.Module], inner: Forward, session: Session, observer: Observer) -> None:
        """inner: what ran the model before it was attached."""
        self._session, self._observer, self._desk = session, observer, observer.taps.desk
        root = next((site for site in observer.plan.sites if not site.fqn), None)
        self._plain = inner = with_own_code(inner)
        self._make = partial(_entry, model, inner, self._desk, root)
        self._quiet = self._make()
        self._full: list[tuple[InForce, Any]] = []
        """Entries of full steps by the rules that they follow, of which the last is used now."""
        self._unfit_told = self._is_marked = self._is_off = self._is_fused_told = False
        if observer.device.type == "cuda":  # a capture must find it
            self._desk.memory = GraphSlabs(observer.plan, observer.device)

    def run(self, compiler: Compiler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run one forward; `compiler` was put aside and is back in its place after it."""
        session = self._session
        try:
            if session.in_step:
                return self._compute(compiler, module, args, kwargs)
            with session.step_of(module, args, kwargs) as step:
                if step.is_observed:
                    return self._compute(compiler, module, args, kwargs)
                return self._call(compiler, module, args, kwargs)
        finally:
            put_aside(compiler)

    def _compute(self, compiler: Compiler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        session = self._session
        with nullcontext() if session.in_interval else session.interval("compute", step_id=session.step_id):
            return self._call(compiler, module, args, kwargs)

    def _call(self, compiler: Compiler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._is_off:
            return under(compiler, self._plain, module, *args, **kwargs)
        try:
            entry, control, record = self._prepare()
        except Exception as error:
            self._switch_off(error)
            return under(compiler, self._plain, module, *args, **kwargs)
        try:
            with nullcontext() if entry is self._quiet else self._measuring():
                output = under(compiler, entry, module, control, *args, **kwargs)
        except Exception as error:
            if not self._is_of_taps(error, entry):
                raise
            return self._without_taps(error, entry, compiler, module, (control, *args), kwargs)
        finally:
            self._desk.sheet = None
        if not getattr(entry, "has_run", False):
            entry.has_run = True
            self._tell_fused(compiler)
        if record is not None:
            self._learn(record)
        return output

    def _tell_fused(self, compiler: Compiler) -> None:
        if self._is_fused_told or not fuses(compiler):
            return
        self._is_fused_told = True
        logger.warning("insitu: %s", _FUSED)
        self._session.event(FUSED, _FUSED)

    # -- where taps cannot be compiled ---------------------------------------------------------------------------

    def _is_of_taps(self, error: Exception, entry: Any) -> bool:
        """Tell whether taps may be what cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException

        return isinstance(error, TorchDynamoException) and not getattr(entry, "has_run", False)

    def _without_taps(
        self, error: Exception, entry: Any, compiler: Compiler, module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Go on without what could not be compiled; raise what the model raises without it."""
        self._desk.sheet = None
        if entry is not self._quiet:
            output = under(compiler, self._quiet, module, *args, **kwargs)
            self._run_quietly(error)
            return output
        output = under(compiler, self._plain, module, *args[1:], **kwargs)
        self._switch_off(error)
        return output

    def _switch_off(self, error: Exception) -> None:
        """Compile without taps from now on."""
        self._is_off = True
        self._observer.silence()
        self._observer.guard.contain(error)

    def _run_quietly(self, error: Exception) -> None:
        """Run full steps of these rules as quiet ones from this one on."""
        rules, _ = self._full.pop()
        self._full.append((rules, self._quiet))
        record = self._observer.current.record
        if record is not None:
            count_untaken(record)
            if rules.row_slabs is not None:
                rules.row_slabs.broken.update(dict.fromkeys(rules.row_slabs.forms, record.step_id))
        logger.warning("insitu: no full steps in a graph, by rules of version %d: %s", rules.version, error)

    # -- before a forward ----------------------------------------------------------------------------------------

    def _make_memory(self) -> GraphSlabs:
        """Return what graphs write, at first allocated where it stays. The program has imported Dynamo by now."""
        observer, desk = self._observer, self._desk
        memory = desk.memory = desk.memory or GraphSlabs(observer.plan, observer.device)
        if not self._is_marked:
            self._is_marked = True
            for written in (memory.words, memory.canary, memory.row_sum, memory.row_absmax, memory.sink):
                keep_in_place(written)
            for read in (memory.idle, observer.control.block):  # given to the graph by turns: addresses vary
                torch._dynamo.mark_static(read)
        return memory

    def _prepare(self) -> tuple[Any, torch.Tensor, StepRecord | None]:
        """Say to the graph which step this is; return the entry of its variant, the control block, and the step."""
        observer, memory = self._observer, self._make_memory()
        record = observer.current.record if observer.current.thread == get_ident() else None
        if record is None:
            return self._quiet, memory.idle, None
        record.in_graph = True
        is_full = observer.current.full is not None or record.sampled
        entry = self._entry_of(record, is_full)
        if entry is self._quiet:
            count_untaken(record)
        elif record.row_slab is None and record.in_force.row_slabs is not None:  # it writes rows in any case
            record.in_force.aim_at_trash()
        if observer.device.type == "cpu":
            observer.write_control(record)
        return entry, observer.control.block, record

    def _entry_of(self, record: StepRecord, is_full: bool) -> Any:
        """Return the entry of a step. The first with new rules is full: a model that is warm has both variants."""
        rules: InForce = record.in_force
        for at, (known, entry) in enumerate(self._full):
            if known is rules:
                self._full.append(self._full.pop(at))
                return entry if is_full else self._quiet
        if self._observer.current.learning and rules.plan.groups:  # until there is memory for rows
            return self._quiet
        rings, measured = rules.rings(), self._measured_by(rules)
        if not rings and not measured:
            return self._quiet
        for area in rings.values():
            for tensor in (area.values, area.indices, area.dest):
                if tensor is not None:
                    keep_in_place(tensor)
        entry = self._make({site: kept(area) for site, area in rings.items()}, measured)
        self._full = [*self._full[1 - NUM_KEPT :], (rules, entry)]
        return entry

    def _measured_by(self, rules: InForce) -> frozenset[int]:
        """Return the sites whose taps go on in Python in a full step."""
        observer = self._observer
        found = set(observer.plan.loads)
        if rules.statistic_slabs is not None:
            found.update(rules.statistic_slabs.sites.tolist())
        if observer.plugged is not None:
            found.update(observer.plugged.sites)
        return frozenset(found)

    # -- inside of one -------------------------------------------------------------------------------------------

    def _measuring(self) -> Any:
        from insitu.taps.graph_ops import running

        return running(self._take, self._count)

    def _take(self, number: int, x: torch.Tensor, source: torch.Tensor | None) -> None:
        """Measure a site; called by a graph."""
        taps, current = self._observer.taps, self._observer.current
        if current.full is None or current.thread != get_ident():
            return
        site = self._observer.plan.sites[number]
        try:
            source = None if source is None else source_of(x, (source,), {})
            taps.measure(site, valid_rows(x, current.num_valid[site.axis]), source, current.full)
        except Exception as error:
            taps.fail(site, error)

    def _count(self, number: int, chosen: torch.Tensor) -> None:
        """Count the experts that a router chose; called by a graph."""
        taps, current = self._observer.taps, self._observer.current
        if not current.sampled or current.thread != get_ident():
            return
        site = self._observer.plan.sites[number]
        try:
            taps.count_chosen(site, chosen)
        except Exception as error:
            taps.fail(site, error)

    # -- after one -----------------------------------------------------------------------------------------------

    def _learn(self, record: StepRecord) -> None:
        """Take what tracing told of sites: widths and dtypes in the first step, after it which have nothing to sum."""
        taps, seen = self._observer.taps, self._desk.seen
        if self._observer.current.learning:
            for site in seen:
                if site.dtype is not None:
                    taps.learn(site.number, site.width, site.dtype, site.num_calls)
        elif not self._unfit_told:  # later, since the first step takes taps off: classes change, graphs do not fit
            self._unfit_told = True
            taps.tell_unfit(site.number for site in seen if site.width == UNFIT)
        if taps.late.silent:
            self._learn_late(seen)
        if record.row_slab is not None:
            self._note_misfits(record)

    def _learn_late(self, seen: Sequence[Seen]) -> None:
        taps = self._observer.taps
        for site in [site for site in seen if site.number in taps.late.silent]:
            if site.dtype is None:
                taps.late.give_up(site.number)
                taps.tell_unfit([site.number])
            else:
                taps.learn(site.number, site.width, site.dtype)
                taps.late.fired(site.number)

    def _note_misfits(self, record: StepRecord) -> None:
        """Say which sites had rows of another width than there is memory for: as in eager, none is kept from there."""
        broken = record.in_force.row_slabs.broken
        for site in self._desk.seen:
            if not site.keeps_rows and site.number not in broken:
                broken[site.number] = record.step_id
                name = self._observer.plan.sites[site.number].name
                logger.warning("insitu: no rows of %s: they turned out to have %d values", name, site.width)

    # -- while the host captures a CUDA graph --------------------------------------------------------------------

    def capture(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a forward while the host records a CUDA graph: no step; a replay in `session.step()` is that step."""
        observer, current, desk = self._observer, self._observer.current, self._desk
        if current.learning or self._is_off:
            logger.warning("insitu: a CUDA graph was captured before the model ran a step; there are no taps in it")
            return self._plain(module, *args, **kwargs)
        current.thread, current.special, current.full, current.sampled = get_ident(), EVERYWHERE, None, False
        current.is_fused = desk.is_recording = observer.has_kernels
        sheet = desk.sheet = Sheet(desk, observer.control.block, None)
        try:
            output = self._plain(module, *args, **kwargs)
            tap_root(observer.root_tap, observer, output)
            sheet.write()  # of sites that no kernel took
            return output
        finally:
            desk.sheet, desk.is_recording, desk.is_captured = None, False, True
            observer.silence()
