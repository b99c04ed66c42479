"""One step on the ranks of one stage: what it takes, and the edges of the intervals it leaves."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.simulate.faults import Effect, Floats
from insitu_collector.simulate.scenario import MS, Scenario

Int64 = NDArray[np.int64]

RECEIVE_NS: Final = int(0.1 * MS)
SEND_NS: Final = int(0.15 * MS)
COLLECTIVE_NS: Final = int(0.05 * MS)
"""What a collective takes once all have come."""
HOST_SHARE: Final = 0.05
"""Of a step's service time: preparing inputs, reading outputs."""
AFTER_FIRST: Final = 6
"""Place in `classes_of` of what follows the first stretch of compute."""


class StepShape(NamedTuple):
    """What the time of a step depends on."""

    num_rows: int
    prefill_rows: int
    context: float
    """Token positions attended to."""
    num_requests: int


class Taken(NamedTuple):
    """What a step takes on each rank of a stage, in ns."""

    service: Floats
    """On its core."""
    queued: Floats
    """Kept from its core by others: the kernel counts it."""
    asleep: Floats
    """Off its core for a reason of its own."""
    sampling: float


class Worked(NamedTuple):
    """Edges of intervals int64[num_classes + 1, num_ranks], time on the core of each, and each rank's time kept off."""

    edges: Int64
    cpu: Int64
    delay: Int64


class Service(Protocol):
    """Where service times come from."""

    def take(self, random: np.random.Generator, stage: int, shape: StepShape, width: int, load: float) -> Taken:
        """Draw what a step of this shape takes on each of `width` ranks of a stage; load: cores that others use."""
        ...


class FormulaService:
    """Times as a scenario states them: a base a stage, costs by shape, and noise."""

    def __init__(self, scenario: Scenario) -> None:
        self._base_ms = scenario.base_ms
        self._noise = scenario.noise
        self._tail = scenario.tail

    def take(self, random: np.random.Generator, stage: int, shape: StepShape, width: int, load: float) -> Taken:
        """Draw what a step of this shape takes on each of `width` ranks of a stage; load: cores that others use."""
        ms = self.expected_ms(stage, shape)
        service = ms * MS * np.exp(random.normal(0.0, self._noise, width)) * (1 + 0.1 * load)
        queued = struck_by_load(random, width, self._tail, load)
        return Taken(service, queued, np.zeros(width), self.sampling_ms(stage, shape) * MS)

    def expected_ms(self, stage: int, shape: StepShape) -> float:
        """Return what a step of this shape takes there on its core without noise, sampling left out."""
        return self._base_ms[stage] + 0.12 * shape.num_rows + 0.05 * shape.prefill_rows + 0.0006 * shape.context

    def sampling_ms(self, stage: int, shape: StepShape) -> float:
        """Return what sampling takes there."""
        return 0.2 + 0.05 * shape.num_requests if stage == len(self._base_ms) - 1 else 0.0


def struck_by_load(random: np.random.Generator, width: int, tail: float, load: float) -> Floats:
    """Draw how long each rank is kept from its core: most are not; `tail` is the chance without any load."""
    queued = np.zeros(width)
    struck = random.random(width) < tail + 0.3 * load
    num_struck = int(struck.sum())
    if num_struck:
        queued[struck] = random.exponential(4.0, num_struck) * MS
    return queued


def classes_of(collectives: int) -> tuple[IntervalClass, ...]:
    """Return the classes of a step's intervals in order; those without length are not recorded.

    The first stretch of compute may be interrupted by a pause; each stretch ends in a collective, if there are any.
    """
    c = IntervalClass
    first = (c.RECV_WAIT, c.RECV_XFER, c.HOST, c.COMPUTE, c.GC, c.COMPUTE)
    meetings = (c.COLLECTIVE_WAIT, *(c.COMPUTE, c.COLLECTIVE_WAIT) * (collectives - 1)) if collectives else ()
    return (*first, *meetings, c.SAMPLE, c.SEND_XFER)


class _Lengths(NamedTuple):
    """How long the parts of a step are on each rank, in ns."""

    link: int
    host: Int64
    stretch: Int64
    on_core: Int64
    """Of a stretch."""
    pause: Int64
    meeting: int
    """What the first collective takes longer than any."""
    sampling: Int64


def edges_of(
    free: Int64, begin: Int64, taken: Taken, effect: Effect | None, classes: tuple[IntervalClass, ...]
) -> Worked:
    """Return the intervals of one step on the ranks of one stage.

    free, begin: when each rank was done with its last step, and when it can begin this one.
    """
    lengths = _lengths(taken, effect, max(1, classes.count(IntervalClass.COLLECTIVE_WAIT)))
    has_pause = lengths.pause > 0
    first, first_core = (np.where(has_pause, part // 2, part) for part in (lengths.stretch, lengths.on_core))
    edges = np.empty((len(classes) + 1, len(free)), np.int64)
    cpu = np.zeros((len(classes), len(free)), np.int64)
    edges[0], edges[1], edges[2] = free, begin, begin + RECEIVE_NS + lengths.link
    edges[3] = edges[2] + lengths.host
    edges[4] = edges[3] + first
    edges[5] = edges[4] + lengths.pause
    at = edges[6] = edges[5] + np.where(has_pause, first, 0)
    cpu[2], cpu[3], cpu[4], cpu[5] = lengths.host, first_core, lengths.pause, np.where(has_pause, first_core, 0)
    for place in range(AFTER_FIRST, len(classes) - 2):
        if classes[place] is IntervalClass.COLLECTIVE_WAIT:
            at = np.full(len(free), at.max() + COLLECTIVE_NS + (lengths.meeting if place == AFTER_FIRST else 0))
        else:
            at, cpu[place] = at + lengths.stretch, lengths.on_core
        edges[place + 1] = at
    edges[-2], cpu[-2] = edges[-3] + lengths.sampling, lengths.sampling
    edges[-1] = edges[-2] + SEND_NS
    return Worked(edges, cpu, taken.queued.astype(np.int64))


def _lengths(taken: Taken, effect: Effect | None, stretches: int) -> _Lengths:
    service, off_core = taken.service, taken.queued + taken.asleep
    sampling = np.full(len(service), taken.sampling)
    computing: Floats | float = 0.0
    pause, link, meeting = np.zeros(len(service), np.int64), 0, 0
    if effect is not None:
        service, off_core, computing = service * effect.factor, off_core + effect.asleep, effect.computing
        sampling = sampling * effect.factor
        pause, link, meeting = effect.pause.astype(np.int64), int(effect.link), int(effect.collective)
    core = (1 - HOST_SHARE) * service + computing
    stretch = (core + off_core).astype(np.int64) // stretches
    on_core = core.astype(np.int64) // stretches
    host = (HOST_SHARE * service).astype(np.int64)
    return _Lengths(link, host, stretch, on_core, pause, meeting, sampling.astype(np.int64))
