"""What the faults of a scenario add to one step on the ranks of one stage, and to traffic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.simulate.scenario import MS, SECOND, Fault, Scenario

Floats = NDArray[np.float64]

_OF_STEPS: Final = ("slow", "slow_link", "fail_slow", "gc", "hang", "hang_collective", "nan")


@dataclass(slots=True)
class Effect:
    """What is added to one step of a stage; arrays have an entry a tensor-parallel rank, times are ns."""

    asleep: Floats
    computing: Floats
    pause: Floats
    factor: Floats
    link: float = 0.0
    """On the way into this stage."""
    collective: float = 0.0
    nan_layer: int | None = None


@dataclass
class FaultPlan:
    """The faults of one replica, and which of them have struck."""

    scenario: Scenario
    replica: int
    traffic_ns: int
    hosts: NDArray[np.int64]
    """Of each rank: int64[num_stages, num_tensor_parallel]."""
    _struck: set[int] = field(default_factory=set)
    _next_gc_ns: dict[int, int] = field(default_factory=dict)
    _by_stage: list[list[tuple[int, Fault]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        faults = [(n, f) for n, f in enumerate(self.scenario.faults) if f.kind in _OF_STEPS]
        for stage in range(self.scenario.stages):
            self._by_stage.append([(n, fault) for n, fault in faults if self._touches(fault, stage)])

    def _touches(self, fault: Fault, stage: int) -> bool:
        if fault.kind == "fail_slow" and fault.host is not None:
            return bool((self.hosts[stage] == fault.host).any())
        touched = (fault.stage + 1) % self.scenario.stages if fault.kind == "slow_link" else fault.stage
        return fault.replica == self.replica and touched == stage

    def of_step(self, stage: int, begin_ns: int) -> Effect | None:
        """Return what is added to a step that begins there at `begin_ns`, or None."""
        at_s = (begin_ns - self.traffic_ns) / SECOND
        active = [(n, f) for n, f in self._by_stage[stage] if f.at_s <= at_s < f.until_s]
        if not active:
            return None
        width = self.scenario.tensor_parallel
        effect = Effect(np.zeros(width), np.zeros(width), np.zeros(width), np.ones(width))
        for number, fault in active:
            self._add(effect, number, fault, stage, begin_ns)
        return effect

    def _add(self, effect: Effect, number: int, fault: Fault, stage: int, begin_ns: int) -> None:
        there = slice(None) if fault.tp is None else slice(fault.tp, fault.tp + 1)
        if fault.kind == "slow":
            (effect.computing if fault.on_cpu else effect.asleep)[there] += fault.ms * MS
        elif fault.kind == "slow_link":
            effect.link += fault.ms * MS
        elif fault.kind == "fail_slow":
            effect.factor *= np.where(self._slowing(fault, stage), _grown(fault, begin_ns, self.traffic_ns), 1.0)
        elif fault.kind == "gc" and begin_ns >= self._next_gc_ns.get(number, 0):
            self._next_gc_ns[number] = begin_ns + int(fault.every_s * SECOND)
            effect.pause[fault.tp or 0] += int(fault.ms * MS)
        elif fault.kind in ("hang", "hang_collective", "nan") and number not in self._struck:
            self._struck.add(number)
            _strike(effect, fault)

    def _slowing(self, fault: Fault, stage: int) -> NDArray[np.bool_]:
        if fault.host is not None:
            return np.asarray(self.hosts[stage] == fault.host)
        return np.isin(np.arange(self.scenario.tensor_parallel), fault.tp) if fault.tp is not None else np.ones(1, bool)


def _strike(effect: Effect, fault: Fault) -> None:
    if fault.kind == "hang":
        effect.asleep[fault.tp or 0] += fault.ms * MS
    elif fault.kind == "hang_collective":
        effect.collective += fault.ms * MS
    else:
        effect.nan_layer = fault.layer


def _grown(fault: Fault, begin_ns: int, traffic_ns: int) -> float:
    """Return the factor as far as it has been reached."""
    since_s = (begin_ns - traffic_ns) / SECOND - fault.at_s
    reached = 1.0 if fault.ramp_s <= 0 else min(1.0, since_s / fault.ramp_s)
    return 1.0 + (fault.factor - 1.0) * reached


@dataclass(frozen=True, slots=True)
class Traffic:
    """What faults change about traffic in one replica; times are seconds since the end of warm-up."""

    faults: tuple[Fault, ...]
    replica: int

    def _active(self, kind: str, at_s: float) -> Fault | None:
        mine = (f for f in self.faults if f.kind == kind and f.replica == self.replica and f.at_s <= at_s < f.until_s)
        return next(mine, None)

    def memory(self, at_s: float) -> int | None:
        """Return for how many token positions there is key/value memory, or None when there is always enough."""
        fault = self._active("kv_small", at_s)
        return None if fault is None else int(fault.size)

    def num_slots(self, at_s: float, most: int) -> int:
        """Return how many micro-batches may be in flight."""
        fault = self._active("underfilled", at_s)
        return most if fault is None else max(1, min(most, int(fault.size)))

    def prompt(self, at_s: float, usual: int, draw: float) -> int:
        """Return how long the prompt of a request is that arrives then; `draw` is uniform in [0, 1)."""
        fault = self._active("long_prompts", at_s)
        return usual if fault is None or draw >= fault.share else int(fault.size)

    @property
    def has_long_prompts(self) -> bool:
        return any(f.kind == "long_prompts" and f.replica == self.replica for f in self.faults)


def foreign_cores(scenario: Scenario, host: int) -> list[tuple[float, float, float]]:
    """Return (from s, to s, cores) of what other processes use of a host."""
    mine = [(f.at_s, f.until_s, f.size) for f in scenario.faults if f.kind == "foreign" and (f.host or 0) == host]
    return [*scenario.bursts, *mine]
