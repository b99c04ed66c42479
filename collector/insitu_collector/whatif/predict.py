"""What a change would do to a recorded run: its step graph, changed and replayed. Pure.

Formulas, assumptions and errors: docs/verdicts.md, "Prediction".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.evidence import Evidence
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.baseline import Baseline
from insitu_collector.whatif.changes import Change, NoPrediction, Speed
from insitu_collector.whatif.graph import MAIN, StepGraph, record
from insitu_collector.whatif.replay import Replayed, Work, replay

Float64 = NDArray[np.float64]

FORWARD_FIXED_NS: Final = 350_000
"""What a forward pass takes beside its layers: the rotary embedding, and that the first layer finds cold caches.
Measured within live passes of 1, 4 and 7 layers of 1 ms (0.3 to 0.4 ms each); nothing beside those of a large model."""
LEAST_KEPT: Final = 0.1
"""A stage keeps at least this share of what it took, however many layers go: head, embedding and Python stay."""
DRIVER_FIXED: Final = 0.35
"""The part of the driver's work for a step that its batch does not change: measured at 3.6, 5.2 and 10.4 requests."""
MODEL_ERROR: Final = 0.05
"""No prediction is told as surer than this, ..."""
PLACE_ERROR: Final = 0.2
"""... nor one of another split or number in flight than this: four fifths of what was tried on two shared cores was
nearer (docs/benchmarks.md, "Does a predicted gain come true?")."""
MOST_STEPS: Final = 1000
"""Steps of a graph that are replayed: about 20 ms."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a change is expected to do while there is work. Relative to the same replay without the change."""

    period_ns: float
    """Between two steps."""
    before_ns: float
    """The same, unchanged."""
    throughput: float
    """Tokens a second over those without the change."""
    cycle: float
    """The time from one token of a request to its next over that without the change."""
    error: float
    """How far off it may be, relative; the residual is part of it."""
    residual: float
    """How far the unchanged replay is from the recorded step period, relative."""
    in_flight: int
    num_steps: int
    assumes: str
    """What was taken for granted of the host's cores."""

    @property
    def gain(self) -> float:
        return self.throughput - 1.0

    @property
    def is_sure(self) -> bool:
        """Whether the gain or loss is larger than what the replay misses without any change."""
        return abs(self.gain) > self.residual


@dataclass(frozen=True)
class WhatIf:
    """A recorded graph and what is known beside it; the unchanged replays are made once."""

    graph: StepGraph
    costs: Baseline
    """By shape: what steps cost, healthy or not."""
    healthy: Baseline
    """What healthy ones cost."""
    layers: Mapping[int, int] = field(default_factory=dict)
    """Stage -> its layers, where sites tell."""
    waiting: float = 0.0
    """Requests that waited for a place, on average: slots that are added take them."""
    shares_cores: bool = True
    """Whether those that compute at one time share what the host has left for them; else each waits as recorded."""

    _told: dict[Change, Prediction] = field(default_factory=dict, init=False, compare=False)

    @cached_property
    def recorded_ns(self) -> float:
        """The step period of the unchanged replay, with the times in which slots had nothing to do."""
        return self._unchanged.period_ns

    @cached_property
    def _unchanged(self) -> Replayed:
        return replay(unchanged(self.graph, closed=False))

    @cached_property
    def busy_ns(self) -> float:
        """The same while there is work."""
        return self.recorded_ns if self.graph.had_work.all() else replay(unchanged(self.graph)).period_ns

    @cached_property
    def _shared_ns(self) -> float:
        return self.busy_ns if self._alone else replay(self._shared(unchanged(self.graph))).period_ns

    @property
    def _alone(self) -> bool:
        return not self.shares_cores or math.isinf(self.graph.cores)

    @property
    def residual(self) -> float:
        """How far the unchanged replay is from the record, relative."""
        return abs(self.recorded_ns / self.graph.period_from(self._unchanged.first) - 1.0)

    @cached_property
    def _queued(self) -> float:
        """The part of the recorded waiting for a core that sharing does not make by itself.

        The largest, to 2 %, with which the unchanged replay is no slower than with all of it and a core for each.
        """
        if self._alone:
            return 1.0
        low, high, work = 0.0, 1.0, unchanged(self.graph, closed=False)
        while high - low > 0.02:
            middle = (low + high) / 2
            slower = replay(self._shared(work, middle)).period_ns > self.recorded_ns
            low, high = (low, middle) if slower else (middle, high)
        return high

    def _shared(self, work: Work, queued: float | None = None) -> Work:
        if self._alone:
            return work
        kept = 1.0 - self.graph.queued_share * (1.0 - (self._queued if queued is None else queued))
        return replace(work, off_ns=work.off_ns * kept[:, None], cores=self.graph.cores)

    def predict(self, change: Change) -> Prediction:
        """Return what the change would do; asked again, what was said first. Raises NoPrediction."""
        if change not in self._told:
            self._told[change] = self._predict(change)
        return self._told[change]

    def _predict(self, change: Change) -> Prediction:
        graph = self.graph
        work, in_flight = self._changed(change)
        slower = replay(self._shared(work)).period_ns / self._shared_ns
        before = self.busy_ns * graph.period_from(self._unchanged.first) / self.recorded_ns
        a_step = self._a_slot(in_flight)
        return Prediction(
            period_ns=before * slower,
            before_ns=before,
            throughput=a_step / slower,
            cycle=slower / a_step,
            error=max(_least_error(change), math.hypot(self.residual, self._shape_error(change, in_flight))),
            residual=self.residual,
            in_flight=in_flight,
            num_steps=len(graph),
            assumes=self._assumes(),
        )

    def _assumes(self) -> str:
        if self._alone:
            return "a core for each rank, and waiting for it as recorded"
        return f"ranks and driver share the {self.graph.cores:.1f} cores that were left to them"

    def _shape_error(self, change: Change, in_flight: int) -> float:
        """Return how unsure the cost of the changed batch shape is, relative."""
        if in_flight == self.graph.num_slots:
            return 0.0
        shape = self._shape(in_flight)
        found = [known for rank in self.graph.ranks if (known := self.costs.expectation(rank))]
        return max(fit.on_core.error_ns(shape) / max(1.0, float(fit.on_core.ns(shape).mean())) for fit in found)

    def _shape(self, in_flight: int) -> Float64:
        return self.graph.shape * self._a_slot(in_flight)

    def _a_slot(self, in_flight: int) -> float:
        """Return the requests of a slot over those it had: never more by adding slots, however many wait."""
        spread = self.graph.num_slots / in_flight
        if in_flight <= self.graph.num_slots:
            return spread
        return min(1.0, spread * (1.0 + self.waiting / max(1.0, self.graph.num_requests)))

    # -- one change each -----------------------------------------------------------------------------------------

    def _changed(self, change: Change) -> tuple[Work, int]:
        work = unchanged(self.graph)
        on, off = work.on_ns.copy(), work.off_ns.copy()
        for rank in change.replaced:
            self._replace(on, off, rank)
        for speed in change.speeds:
            self._speed(on, off, speed)
        if change.split is not None:
            self._split(on, change.split)
        in_flight = self.graph.num_slots
        if change.in_flight is not None and change.in_flight != in_flight:
            # A slot without a request does not run.
            in_flight = min(change.in_flight, max(1, round(self.graph.num_requests + self.waiting)))
            self._reshape(on, in_flight)
        driver = work.driver_ns * (DRIVER_FIXED + (1 - DRIVER_FIXED) * self._a_slot(in_flight))
        if in_flight == self.graph.num_slots:
            return replace(work, on_ns=on, off_ns=off), in_flight
        slot = np.arange(len(work.slot)) % in_flight
        return replace(work, on_ns=on, off_ns=off, driver_ns=driver, slot=slot, any_slot=True), in_flight

    def _stage(self, stage: int) -> int:
        if not 0 <= stage < self.graph.num_stages:
            raise NoPrediction(f"there is no stage {stage}; the run has stages 0..{self.graph.num_stages - 1}")
        return stage

    def _replace(self, on: Float64, off: Float64, rank: int) -> None:
        if rank not in self.graph.ranks:
            raise NoPrediction(f"there is no rank {rank}; the run has ranks {', '.join(map(str, self.graph.ranks))}")
        stage, known = self.graph.ranks.index(rank), self.healthy.expectation(rank)
        if known is None:
            raise NoPrediction(f"what rank {rank} takes when healthy is not known: no warm-up was recorded")
        used = np.maximum(on[:, stage].sum(axis=1), 1.0)
        on[:, stage] *= (known.on_core.ns(self.graph.shape) / used)[:, None]
        off[:, stage] *= self.graph.queued_share[stage]
        off[:, stage, MAIN] += np.maximum(known.off_core.ns(self.graph.shape), 0.0)

    def _speed(self, on: Float64, off: Float64, speed: Speed) -> None:
        stage = self._stage(speed.stage)
        on[:, stage] /= speed.factor
        off[:, stage] /= speed.factor
        left = np.minimum(0.0, off[:, stage, MAIN] + speed.off_ns)
        off[:, stage, MAIN] = np.maximum(0.0, off[:, stage, MAIN] + speed.off_ns)
        on[:, stage, MAIN] = np.maximum(0.0, on[:, stage, MAIN] + speed.on_ns + left)

    def _split(self, on: Float64, split: tuple[int, ...]) -> None:
        stages, layers = self.graph.num_stages, self._layers()
        if len(split) != stages or min(split) < 1 or sum(split) != sum(layers):
            raise NoPrediction(
                f"split={','.join(map(str, split))} does not fit: it needs {stages} numbers of at least 1 that sum to "
                f"{sum(layers)} layers"
            )
        a_layer = self._a_layer(on, layers)
        for stage, (old, new) in enumerate(zip(layers, split, strict=True)):
            if new == old:
                continue
            before = on[:, stage, MAIN]
            on[:, stage, MAIN] = np.maximum(LEAST_KEPT * before, before + (new - old) * a_layer)

    def _layers(self) -> list[int]:
        if sorted(self.layers) != list(range(self.graph.num_stages)):
            raise NoPrediction("how many layers each stage has was not recorded, so no other split can be predicted")
        return [self.layers[stage] for stage in sorted(self.layers)]

    def _a_layer(self, on: Float64, layers: Sequence[int]) -> Float64:
        """Return what a layer costs in each step: by the stages between first and last, or by the first."""
        inner = range(1, len(layers) - 1) if len(layers) > 2 else range(1)
        forward = {stage: on[:, stage, MAIN] * self.graph.layers_share[stage] for stage in inner}
        costs = [np.maximum(0.5 * ns, ns - FORWARD_FIXED_NS) / layers[stage] for stage, ns in forward.items()]
        return np.asarray(np.mean(costs, axis=0), np.float64)

    def _reshape(self, on: Float64, in_flight: int) -> None:
        shape = self._shape(in_flight)
        for stage, rank in enumerate(self.graph.ranks):
            known = self.costs.expectation(rank)
            if known is None:
                raise NoPrediction("too few steps were recorded to know what a step of another shape costs")
            cost = np.maximum(known.on_core.ns(shape), 1.0) / np.maximum(known.on_core.ns(self.graph.shape), 1.0)
            on[:, stage] *= cost[:, None]


def _least_error(change: Change) -> float:
    return MODEL_ERROR if change.split is None and change.in_flight is None else PLACE_ERROR


def unchanged(graph: StepGraph, *, closed: bool = True) -> Work:
    """Return the work as it was; `closed`: slots that had nothing to do go on at once."""
    lag = np.where(np.isfinite(graph.lag_ns), graph.lag_ns, graph.turn_ns)
    if closed:
        lag = np.where(graph.had_work, lag, graph.turn_ns)
    return Work(
        on_ns=graph.on_ns,
        off_ns=graph.off_ns,
        wire_ns=graph.wire_ns,
        lag_ns=lag,
        driver_ns=np.full(len(graph), graph.driver_ns),
        slot=graph.slot,
        rendezvous=graph.rendezvous,
        any_slot=False,
        cores=math.inf,
    )


def tokens_per_s(graph: StepGraph) -> float:
    """Return the tokens that were sampled a second."""
    sampled = float(graph.shape[:-1, SHAPE.index("num_sampled")].sum())
    return sampled / float(graph.begin_ns[-1, 0] - graph.begin_ns[0, 0]) * 1e9


def recorded_graph(evidence: Evidence, t0_ns: int, t1_ns: int, most: int = MOST_STEPS) -> StepGraph | None:
    """Return the last `most` steps of a window as a graph, or None (`insitu_collector.whatif.graph.record`)."""
    begun = np.sort(evidence.steps.between(t0_ns, t1_ns)["t"])
    return record(evidence, int(begun[-most]) if len(begun) > most else t0_ns, t1_ns)
