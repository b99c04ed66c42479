"""One step: what the host states before the forward pass, and what the drain finds after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from insitu.rules.pressure import NOBODY
from insitu.session.row_map import PHASE_NUMBERS, Place, Rows
from insitu.vocabulary import Variant

if TYPE_CHECKING:
    from insitu.sites.site import Site


@dataclass(slots=True)
class StepRecord:
    """One finished step, on its way from the step thread to the drain."""

    step_id: int
    mb: int
    phase: int | None
    t0_ns: int
    rows: Sequence[Rows] | None
    num_rows: int | None
    """Valid rows; None: all the model saw (a step without a row map)."""
    num_padded: int
    num_samples: int
    """Valid rows of the samples axis."""
    variant: Variant = Variant.QUIET
    slab: int | None = None
    """Place in the ring of slabs; None: there was no free one."""
    row_slab: int | None = None
    """As `slab`, of raw rows; None: it keeps none, or there was no free one."""
    row_place: int = 0
    """Where in there its rows begin."""
    row_bytes: int = 0
    """Most bytes of rows that it keeps."""
    statistic_slab: int | None = None
    """Place in the ring of statistics; None: none are due, or there was no free one."""
    plugged_slab: int | None = None
    """As `statistic_slab`, of the statistics of other packages."""
    places: list[list[Place] | None] = field(default_factory=list)
    """By destination group: the wanted rows, in the order of their places; None: every row, anonymous. Empty where no
    row is taken, but for want of memory alone."""
    sampled: bool = False
    """Whether this step's expert loads are taken."""
    num_crowded: int = 0
    """Rows that were wanted and did not fit."""
    giving_way: frozenset[str] = NOBODY
    """Kinds of rules for rows that take none in it (`insitu.rules.pressure`)."""
    num_spared: int = 0
    """Rows that they did not take."""
    instead: Sequence[Site] = ()
    """Sites whose statistics are taken instead."""
    num_left_out: int = 0
    """Rows that a rule's byte budget left out."""
    teaches: bool = False
    """Whether it is the first of its model: it tells how wide rows are, so none of it is taken."""
    has_all_logits: bool = False
    """Whether each row of tokens is one of the samples axis too, which the row map then says nothing of by itself."""
    in_force: Any = None
    """The rules it began with (`insitu.rules.in_force.InForce`)."""
    num_unmeasured: int = 0
    """Sites whose statistics were due and found no place."""
    t1_ns: int = 0
    """When it ended; 0 while it has not."""
    num_unplugged: int = 0
    """As `num_unmeasured`, of the statistics of other packages."""
    in_graph: bool = False
    """Whether its taps ran in a compiled graph, which writes into slabs of its own."""
    ready: Any = None
    """CUDA event recorded after the step, or None on the host."""
    doublings: int = 0
    """How often every period was doubled when it began (`insitu.overhead.governor`)."""
    is_due: bool = True
    """Whether rows that nobody asked for by name are taken in it, at that period."""
    is_named: bool = False
    """Whether rows of it were asked for by name: the governor leaves those alone."""
    wants_more: bool = False
    """Whether rules want rows of it that nobody asked for by name."""
    due: Sequence[Site] = ()
    """Sites whose statistics are due in it."""
    plugged_due: Sequence[int] = ()
    """Which statistics of other packages are taken in it (`insitu.statistics.plugged`)."""
    mark: Any = None
    """Of the clock that times steps (`insitu.overhead.step_costs`)."""

    def axis_of(self, axis: str) -> str:
        """Return the axis whose rows a site of `axis` has in it."""
        return "tokens" if axis == "samples" and self.has_all_logits else axis

    @property
    def is_finished(self) -> bool:
        """Whether its slab may be read: the device, if there is one, has done all of it."""
        return self.ready is None or bool(self.ready.query())


def phase_of(phase: str | None, of_rows: Collection[str | None]) -> int | None:
    """Return the step's phase number: as stated, else from the phases that its rows name; None when nobody says.

    Raises KeyError for a phase that is none, of the step or of a row.
    """
    named = {PHASE_NUMBERS[each] for each in of_rows if each is not None}
    if phase is not None:
        return PHASE_NUMBERS[phase]
    if not named:
        return None
    return next(iter(named)) if len(named) == 1 else PHASE_NUMBERS["mixed"]
