"""The step graph of a window: what each step needed on each rank, and what lay between them. Pure.

It is what `insitu_collector.whatif.replay` runs again, changed or not. The busiest rank of a stage stands for the
stage. A step that any of these did not report is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, IntervalClass, Role
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.slow_stage import run_delay_ns
from insitu_collector.verdicts.host import rate

Float64 = NDArray[np.float64]

MIN_STEPS: Final = 12
"""Fewer steps than this are no graph: the ends, where the pipeline fills, would weigh too much."""
WAITED_NS: Final = 50_000
"""A rank that was free for longer than this before a step began had waited for it."""
LONG_LAGS: Final = 5.0
LONG_NS: Final = 5_000_000
"""A slot whose next step came later than this and `LONG_LAGS` typical turn-arounds had nothing to do meanwhile."""
PARTS: Final = 3
AHEAD, MAIN, AFTER = range(PARTS)
"""What a rank does of a step before it has its input, with it, and when its output has left."""
_OCCUPYING: Final = (
    IntervalClass.COMPUTE,
    IntervalClass.HOST,
    IntervalClass.SAMPLE,
    IntervalClass.GC,
    IntervalClass.COMPILE,
    IntervalClass.COLLECTIVE_WAIT,
    IntervalClass.SEND_XFER,
)
_COMPUTING: Final = (IntervalClass.COMPUTE, IntervalClass.SAMPLE)


@dataclass(frozen=True, slots=True)
class StepGraph:
    """n steps over S stages, in the order in which the first stage began them. Times in ns."""

    ranks: tuple[int, ...]
    """By stage, the busiest of each."""
    step: Int64
    slot: Int64
    begin_ns: Int64
    """int64[n, S]: when the rank began it."""
    on_ns: Float64
    """float64[n, S, PARTS]: what it needed of a core, ..."""
    off_ns: Float64
    """float64[n, S, PARTS]: ... and what it took beside that, off the core."""
    queued_share: Float64
    """float64[S]: the part of `off_ns` that was spent in the run queue."""
    layers_share: Float64
    """float64[S]: the part of a step's main `on_ns` that is the forward pass, over the window."""
    wire_ns: Float64
    """float64[n, S - 1]: from a stage's output to the next one's having it; the typical one where nobody waited."""
    lag_ns: Float64
    """float64[n]: from its slot's last ids to this step's begin on the first rank; nan where that rank being busy is
    what it waited for."""
    rendezvous: bool
    """A stage hands on a step no sooner than the next one has begun the step before: some waited for that."""
    shape: Float64
    """float64[n, len(SHAPE)]"""
    cores: float
    """What the ranks and the driver have of their host; inf where it is not known, or they have several."""
    driver_ns: float
    """What a step costs the driver's process, of a core."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def num_slots(self) -> int:
        """Micro-batch slots that were used: the most micro-batches in flight."""
        return len(np.unique(self.slot))

    @property
    def period_ns(self) -> float:
        """The recorded time between two steps."""
        return self.period_from(0)

    def period_from(self, first: int) -> float:
        """The same from a step on."""
        begun = self.begin_ns[first:, 0]
        return float(begun[-1] - begun[0]) / (len(begun) - 1)

    @property
    def turn_ns(self) -> float:
        """The typical time from sampled ids to the slot's next step, where a rank waited for it."""
        seen = self.lag_ns[np.isfinite(self.lag_ns)]
        return float(np.median(seen)) if len(seen) else 0.0

    @property
    def had_work(self) -> NDArray[np.bool_]:
        """bool[n]: the step's slot had gone on at once, as far as can be seen."""
        return ~(self.lag_ns > max(LONG_NS, LONG_LAGS * self.turn_ns))

    @property
    def num_requests(self) -> float:
        """Requests that ran at once, on average, over the slots that had any."""
        at = SHAPE.index("num_requests")
        return sum(float(self.shape[self.slot == slot, at].mean()) for slot in np.unique(self.slot))


def record(evidence: Evidence, t0_ns: int, t1_ns: int) -> StepGraph | None:
    """Return the graph of the traffic steps that began in [t0_ns, t1_ns); None where there is too little."""
    stages = evidence.stages
    if len(set(stages.values())) < 2:
        return None
    stated = evidence.steps.between(t0_ns, t1_ns)
    stated = _rows(stated, ~evidence.is_warmup(stated))
    stated = _rows(stated, np.argsort(stated["t"], kind="stable"))
    rows = evidence.intervals.between(t0_ns)
    found = {rank: _on_rank(rows, rank, stages, stated["step"]) for rank in sorted(stages)}
    ranks = tuple(
        max((rank for rank in found if stages[rank] == stage), key=lambda rank: found[rank].total_ns)
        for stage in sorted(set(stages.values()))
    )
    places = [found[rank] for rank in ranks]
    whole = np.logical_and.reduce([place.known for place in places])
    if whole.sum() < MIN_STEPS:
        return None
    return _graph(evidence, ranks, _rows(stated, whole), [place.only(whole) for place in places])


@dataclass(frozen=True, slots=True)
class _OnRank:
    """One rank's part of each step."""

    known: NDArray[np.bool_]
    begin_ns: Int64
    """When it took the plan up."""
    out_ns: Int64
    """When its output had left it."""
    end_ns: Int64
    got_ns: Int64
    """When it had its input; 0 where it has none to wait for."""
    waited_ns: Float64
    """How long it waited for that input."""
    held_ns: Float64
    """How long it waited to hand on its output."""
    on_ns: Float64
    off_ns: Float64
    """float64[n, PARTS] both."""
    forward_ns: Float64
    """The forward pass's part of `on_ns`."""

    @property
    def total_ns(self) -> float:
        return float(self.on_ns.sum() + self.off_ns.sum())

    def only(self, wanted: NDArray[np.bool_]) -> _OnRank:
        return _OnRank(*(getattr(self, name)[wanted] for name in self.__slots__))


def _rows(columns: Columns, wanted: NDArray[np.bool_] | NDArray[np.int64]) -> Columns:
    return {name: column[wanted] for name, column in columns.items()}


def _on_rank(rows: Columns, rank: int, stages: dict[int, int], steps: Int64) -> _OnRank:
    order = np.argsort(steps, kind="stable")
    at = np.searchsorted(steps[order], rows["step"])
    mine = (rows["rank"] == rank) & (at < len(steps))
    mine[mine] &= steps[order][at[mine]] == rows["step"][mine]
    of, rows = order[at[mine]], _rows(rows, mine)
    t0, t1, cls = rows["t0"], rows["t"], rows["cls"]
    receiving = cls == IntervalClass.RECV_XFER
    incoming, planning = receiving & (rows["peer"] != NO_RANK), receiving & (rows["peer"] == NO_RANK)
    waiting = cls == IntervalClass.RECV_WAIT
    upstream = waiting & np.isin(rows["peer"], [other for other in stages if stages[other] < stages[rank]])
    computing, idle = np.isin(cls, _COMPUTING), cls == IntervalClass.IDLE
    sending = cls == IntervalClass.SEND_XFER

    def last(chosen: NDArray[np.bool_]) -> Int64:
        found = np.zeros(len(steps), np.int64)
        np.maximum.at(found, of[chosen], t1[chosen])
        return found

    def total(amount: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Float64:
        return np.bincount(of, amount * chosen, len(steps)).astype(np.float64)

    ns = t1 - t0
    waited, for_plan = total(ns, upstream), total(ns, (waiting & ~upstream) | idle)
    # Who had not waited spends its own time on reading what is there already.
    reading = (planning & (for_plan[of] <= WAITED_NS)) | (incoming & (waited[of] <= WAITED_NS))
    occupying = np.isin(cls, _OCCUPYING) | reading
    first = np.full(len(steps), np.iinfo(np.int64).max)
    np.minimum.at(first, of[occupying], t0[occupying])
    got, sent, computed = last(incoming), last(sending), last(computing)
    out = np.where(sent > 0, sent, computed)
    cpu = np.minimum(rows["cpu"], ns)
    ahead, after = occupying & (t1 <= got[of]), occupying & (t0 >= out[of])
    parts = (ahead, occupying & ~ahead & ~after, after)
    on = np.stack([total(cpu, part) for part in parts], axis=1)
    return _OnRank(
        known=computed > 0,
        begin_ns=first,
        out_ns=out,
        end_ns=last(occupying),
        got_ns=got,
        waited_ns=waited,
        held_ns=total(ns, cls == IntervalClass.SEND_WAIT),
        on_ns=on,
        off_ns=np.stack([total(ns, part) for part in parts], axis=1) - on,
        forward_ns=total(cpu, cls == IntervalClass.COMPUTE),
    )


def _graph(evidence: Evidence, ranks: tuple[int, ...], stated: Columns, places: list[_OnRank]) -> StepGraph:
    begin = np.stack([place.begin_ns for place in places], axis=1)
    on, off = (np.stack([getattr(place, name) for place in places], axis=1) for name in ("on_ns", "off_ns"))
    t0, t1 = int(begin[0, 0]), int(places[-1].end_ns[-1])
    delay = np.array([run_delay_ns(evidence, rank, t0, t1) for rank in ranks])
    cores, driver_ns = _host(evidence, ranks, begin[:, 0], on.sum(axis=(1, 2)))
    forward = np.stack([place.forward_ns for place in places], axis=1)
    return StepGraph(
        ranks=ranks,
        step=stated["step"],
        slot=stated["mb"],
        begin_ns=begin,
        on_ns=on,
        off_ns=off,
        queued_share=np.clip(delay / np.maximum(off.sum(axis=(0, 2)), 1.0), 0.0, 1.0),
        layers_share=forward.sum(axis=0) / np.maximum(1.0, on[:, :, MAIN].sum(axis=0)),
        wire_ns=np.stack([_wires(places[at], places[at + 1]) for at in range(len(places) - 1)], axis=1),
        lag_ns=_lags(stated["mb"], places),
        rendezvous=any(place.held_ns.any() for place in places),
        shape=np.stack([stated[name] for name in SHAPE], axis=1),
        cores=cores,
        driver_ns=driver_ns,
    )


def _wires(sender: _OnRank, receiver: _OnRank) -> Float64:
    """Return the time from output to input where the receiver had waited for it, else the typical one (0 of none)."""
    waited = receiver.waited_ns > WAITED_NS
    taken = (receiver.got_ns - sender.out_ns).astype(np.float64)
    return np.where(waited, taken, np.median(taken[waited]) if waited.any() else 0.0)


def _lags(slots: Int64, places: list[_OnRank]) -> Float64:
    """Return `StepGraph.lag_ns`."""
    lags, turns = np.full(len(slots), np.nan), np.full(len(slots), np.nan)
    begin, free = places[0].begin_ns, np.concatenate([[0], places[0].end_ns[:-1]])
    for slot in np.unique(slots):
        mine = np.flatnonzero(slots == slot)
        lags[mine[1:]] = begin[mine[1:]] - places[-1].out_ns[mine[:-1]]
        turns[mine[1:]] = np.diff(begin[mine])
    # Who was busy may have kept the step waiting, but not for two whole turns of its slot.
    known = turns[np.isfinite(turns)]
    a_turn = float(np.median(known)) if len(known) else np.inf
    lags[(begin - free <= WAITED_NS) & ~(lags > 2 * a_turn)] = np.nan
    return lags


def _host(evidence: Evidence, ranks: tuple[int, ...], begin_ns: Int64, steps_ns: Float64) -> tuple[float, float]:
    """Return the cores that steps and driver have between them, and what a step costs the driver.

    steps_ns: what each step used of the cores. Whatever else ran there, the probes' own threads too, had the rest.
    """
    beats = [list(held) for held in evidence.beats.values() if len(held) > 1]
    clocks = {held[-1].rank: held for held in beats if held[-1].rank in ranks}
    boots = {held[-1].boot_id for held in clocks.values()}
    if len(clocks) < len(ranks) or len(boots) != 1:
        return np.inf, 0.0
    clock = clocks[ranks[0]]
    # Only what heartbeats cover is known.
    t0, t1 = max(int(begin_ns[0]), clock[0].t_ns), min(int(begin_ns[-1]), clock[-1].t_ns)
    covered = (begin_ns >= t0) & (begin_ns < t1)
    if covered.sum() < MIN_STEPS:
        return np.inf, 0.0
    of_driver = pc.equal(evidence.sources["role"], Role.DRIVER)
    drivers = set(evidence.sources.filter(of_driver)["epoch"].to_pylist())
    driver = sum(
        rate(held, "cpu_ns", max(t0, held[0].t_ns), min(t1, held[-1].t_ns))
        for held in beats
        if held[-1].epoch in drivers and held[0].t_ns < t1 and held[-1].t_ns > t0
    )
    cores = float(clock[-1].host_cores)
    if all(beat.host_busy_ns is not None for beat in clock):
        others = rate(clock, "host_busy_ns", t0, t1) - driver - float(steps_ns[covered].sum()) / (t1 - t0)
        cores = max(1.0, cores - max(0.0, others))
    return cores, driver * (t1 - t0) / int(covered.sum())
