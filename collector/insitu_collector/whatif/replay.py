"""A recorded step graph run again, as it was or changed: a small discrete-event model of a closed pipeline. Pure.

Each stage takes steps in the order in which the driver planned them. A step needs its plan, then its stage, then the
hidden states of the stage before; the ids it samples go through the driver, and the slot's next step is planned. What
computes at one time shares the cores there are: with fewer cores than that, each gets its part.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.whatif.graph import AFTER, AHEAD, MAIN

Float64 = NDArray[np.float64]

SETTLED: Final = 0.1
"""Share of the steps before which the pipeline is still filling: it is left out of the period."""
_NEVER: Final = math.inf
_WAIT, _HELD, _TURN, _REST, _PLAN, _ARRIVE = range(-6, 0)
"""What a stage or the driver may be in beside a part of a step, and what a timer may bring beside one's end."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be run: n steps over S stages. Times in ns."""

    on_ns: Float64
    """float64[n, S, PARTS]: on the core, before the input is there, with it, and when the output has left."""
    off_ns: Float64
    """float64[n, S, PARTS]: off it, after that."""
    wire_ns: Float64
    """float64[n, S - 1]: from a stage's output to the next one's having it."""
    lag_ns: Float64
    """float64[n]: from the ids of the slot's step before to this one's plan, the driver's part of it included."""
    driver_ns: Float64
    """float64[n]: what the driver computes for a step, of which at most the lag holds up the next plan."""
    slot: NDArray[np.int64]
    """int64[n]: the slot of each step; with `any_slot` only how many there are matters."""
    rendezvous: bool
    """A stage hands on a step no sooner than the next one has begun the step before."""
    any_slot: bool
    """Give the next step to whichever slot is free first."""
    cores: float


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it."""

    begin_ns: Float64
    """float64[n]: when the first stage began each step, in the order of `Work`."""
    way_ns: Float64
    """float64[n]: from its plan to its ids."""
    first: int
    """The step from which on the pipeline had filled."""

    @property
    def period_ns(self) -> float:
        """The time between two steps, once the pipeline had filled."""
        begun = np.sort(self.begin_ns)[self.first :]
        return float(begun[-1] - begun[0]) / (len(begun) - 1)


def replay(work: Work) -> Replayed:
    """Run it to the end."""
    return _Pipeline(work).run()


class _Pipeline:
    """Servers 0..S-1 are the stages, S is the driver. A server has one piece of work at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._num_steps, self._num_stages, _ = work.on_ns.shape
        self._driver = self._num_stages
        self._now = 0.0
        self._timers: list[tuple[float, int, int, int, int]] = []
        self._num_timers = 0
        self._running: dict[int, float] = {}
        """Server on a core -> what it still needs there."""
        self._doing: dict[int, tuple[int, int]] = {}
        """Server -> (part, step) it is in."""
        self._queues: list[deque[int]] = [deque() for _ in range(self._num_stages + 1)]
        self._num_begun = [0] * self._num_stages
        self._arrived: list[set[int]] = [set() for _ in range(self._num_stages)]
        self._slots, place = np.unique(work.slot, return_inverse=True)
        self._slot_of = place.tolist()
        self._next = self._sequences()
        self._planned = np.zeros(self._num_steps)
        self._begun = np.zeros(self._num_steps)
        self._done = np.zeros(self._num_steps)
        self._on, self._off, self._wire = work.on_ns.tolist(), work.off_ns.tolist(), work.wire_ns.tolist()
        self._lag: list[float] = work.lag_ns.tolist()
        self._turns: list[float] = work.driver_ns.tolist()

    def _sequences(self) -> list[deque[int]]:
        """Return the steps that each slot takes in turn; one and the same for all where any slot may take any."""
        if self._work.any_slot:
            return [deque(range(self._num_steps))] * len(self._slots)
        found: list[deque[int]] = [deque() for _ in self._slots]
        for step, slot in enumerate(self._slot_of):
            found[slot].append(step)
        return found

    def run(self) -> Replayed:
        for slot in range(len(self._slots)):
            self._plan_next(slot, first=True)
        while self._timers or self._running:
            self._advance()
        first = min(self._num_steps - 2, int(SETTLED * self._num_steps))
        return Replayed(self._begun, self._done - self._planned, first)

    def _advance(self) -> None:
        """Go to whatever comes next: a timer, or a piece of work that has all it needs of a core."""
        running = self._running
        rate = min(1.0, self._work.cores / len(running)) if running else 1.0
        soonest = min(running, key=running.__getitem__) if running else -1
        ends = self._now + running[soonest] / rate if running else _NEVER
        rings = self._timers[0][0] if self._timers else _NEVER
        passed = max(0.0, min(ends, rings) - self._now) * rate
        self._now = min(ends, rings)
        for server in running:
            running[server] -= passed
        if rings <= ends:
            _, _, what, server, step = heapq.heappop(self._timers)
            self._rings(what, server, step)
        else:
            del running[soonest]
            self._computed(soonest)

    def _at(self, delay_ns: float, what: int, server: int, step: int) -> None:
        self._num_timers += 1
        heapq.heappush(self._timers, (self._now + max(0.0, delay_ns), self._num_timers, what, server, step))

    def _rings(self, what: int, server: int, step: int) -> None:
        if what == _PLAN:
            self._planned[step] = self._now
            for stage in range(self._num_stages):
                self._queues[stage].append(step)
                self._take(stage)
        elif what == _ARRIVE:
            self._arrived[server].add(step)
            if self._doing.get(server) == (_WAIT, step):
                self._enter(server, MAIN, step)
        else:
            self._through(server, what, step)

    def _take(self, server: int) -> None:
        """Begin what waits longest, if the server is free."""
        if server in self._doing or not self._queues[server]:
            return
        step = self._queues[server].popleft()
        if server == self._driver:
            self._enter(server, _TURN, step)
            return
        if server == 0:
            self._begun[step] = self._now
        self._num_begun[server] += 1
        self._enter(server, AHEAD, step)
        if server and self._doing.get(server - 1, (0, 0))[0] == _HELD:
            self._hand_on(server - 1)

    def _enter(self, server: int, part: int, step: int) -> None:
        self._doing[server] = part, step
        if part == _TURN:
            self._running[server] = self._turn_ns(step)
        elif part == _REST:
            self._running[server] = self._turns[step] - self._turn_ns(step)
        elif part != _WAIT:
            self._running[server] = self._on[step][server][part]

    def _turn_ns(self, step: int) -> float:
        """Return what the driver computes between a step's ids and the next plan."""
        return min(self._turns[step], self._lag[step])

    def _computed(self, server: int) -> None:
        part, step = self._doing[server]
        if part == _TURN:
            self._plan_next(self._slot_of[step], first=False)
            self._enter(server, _REST, step)
        elif part == _REST:
            self._leave(server)
        else:
            self._at(self._off[step][server][part], part, server, step)

    def _through(self, server: int, part: int, step: int) -> None:
        """Go on to the next part of a step; what comes after a stage's main part is handed on first."""
        if part == AHEAD:
            self._enter(server, MAIN if server == 0 or step in self._arrived[server] else _WAIT, step)
        elif part == AFTER:
            self._leave(server)
        else:
            self._doing[server] = _HELD, step
            self._hand_on(server)

    def _hand_on(self, server: int) -> None:
        """Let a step's output leave, once the next stage can take it."""
        _, step = self._doing[server]
        if server + 1 == self._num_stages:
            self._done[step] = self._now
            self._queues[self._driver].append(step)
            self._take(self._driver)
        elif self._work.rendezvous and self._num_begun[server + 1] < self._num_begun[server] - 1:
            return
        else:
            self._at(self._wire[step][server], _ARRIVE, server + 1, step)
        self._enter(server, AFTER, step)

    def _leave(self, server: int) -> None:
        del self._doing[server]
        self._take(server)

    def _plan_next(self, slot: int, *, first: bool) -> None:
        if not self._next[slot]:
            return
        step = self._next[slot].popleft()
        self._slot_of[step] = slot
        self._at(0.0 if first else self._lag[step] - self._turn_ns(step), _PLAN, 0, step)
