"""A pipeline that exists only as records: what a healthy or faulty engine would have written. For tests and trials.

A discrete-event run of S stages with a few micro-batches in flight, random arrivals, service times that depend on batch
shape with a heavy tail, and faults. `insitu_collector.simulated_rows` writes the tables; the judge never learns what
was asked for.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from insitu.vocabulary import IntervalClass, Phase, RequestEvent

MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
BEGIN_NS: Final = 1_000 * SECOND
UNIX_MINUS_MONO_NS: Final = 1_700_000_000 * SECOND
LAYERS: Final = 4
"""Of a stage."""
MOST_REQUESTS: Final = 8
"""Of a micro-batch: of warm-up's, and of traffic's unless the scenario says otherwise."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong from `at_s` on, counted from the end of warm-up.

    kind: "slow" (every step of `stage` takes `ms` longer: asleep, or computing when `on_cpu`), "gc" (a pause of `ms`
    every `every_s`), "hang" (one step of `ms`), "nan" (layer `layer` of one step).
    """

    kind: str
    at_s: float
    stage: int = 1
    until_s: float = 1e9
    ms: float = 25.0
    on_cpu: bool = False
    every_s: float = 1.0
    layer: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run. Times of a step: `base_ms` by stage, plus a cost a row, a prefill row and a token of context."""

    seed: int = 0
    seconds: float = 20.0
    base_ms: tuple[float, ...] = (5.0, 6.5)
    in_flight: int = 2
    requests_per_s: float = 8.0
    most_requests: int = MOST_REQUESTS
    """Of a slot."""
    noise: float = 0.06
    """Sigma of the log of a service time."""
    tail: float = 0.03
    """Chance that a step is kept from its core for some milliseconds."""
    bursts: tuple[tuple[float, float, float], ...] = ()
    """(from s, to s, cores): foreign load."""
    faults: tuple[Fault, ...] = ()
    warmup_steps: int = 80
    param_bytes: tuple[int, ...] | None = None


@dataclass
class Rank:
    stage: int
    free_ns: int = BEGIN_NS
    cpu_ns: int = 0
    delay_ns: int = 0
    num_steps: int = 0
    intervals: list[tuple[int, ...]] = field(default_factory=list)
    """(t0, t1, cls, step, mb, peer, cpu)"""
    counters: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(t, cpu, delay, num_steps) after each step."""

    def record(self, t0: int, t1: int, cls: IntervalClass, step: int, mb: int, peer: int = -1, cpu: int = 0) -> None:
        if t1 > t0:
            self.intervals.append((t0, t1, int(cls), step, mb, peer, cpu))


@dataclass
class Request:
    name: str
    prompt: int
    left: int
    position: int = 0


class Run:
    """One simulated run, step by step."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = np.random.default_rng(scenario.seed)
        self.ranks = [Rank(stage) for stage in range(len(scenario.base_ms))]
        self.steps: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.requests: list[tuple[str, RequestEvent, int]] = []
        self.flagged: list[tuple[int, int, int, list[int]]] = []
        """(step, stage, layer of that stage, rows)"""
        self.fired: set[int] = set()
        self.next_gc_ns: dict[int, int] = {}
        self.traffic_ns = BEGIN_NS
        self.slots: list[list[Request]] = [[] for _ in range(scenario.in_flight)]
        self.waiting: list[tuple[int, Request]] = []
        self.num_requests = 0

    def run(self) -> None:
        for number in range(self.scenario.warmup_steps):
            size = 1 + number % MOST_REQUESTS
            prompt = 8 * (1 + number % 6) if number % 5 == 0 else 1
            batch = [Request(f"warmup-{number}-{n}", prompt, 1, 0 if prompt > 1 else 10 * n) for n in range(size)]
            self.step(number % self.scenario.in_flight, batch, max(rank.free_ns for rank in self.ranks))
        self.traffic_ns = max(rank.free_ns for rank in self.ranks) + 100 * MS
        if self.scenario.warmup_steps:
            self.events.append({"t_ns": self.traffic_ns, "kind": "warmup_end", "step_id": -1, "text": ""})
        self.arrive()
        self.serve()

    def arrive(self) -> None:
        end = self.traffic_ns + int(self.scenario.seconds * SECOND)
        t = self.traffic_ns
        while t < end:
            name = f"req-{self.num_requests}"
            self.num_requests += 1
            left = int(self.random.integers(10, 60))
            heapq.heappush(self.waiting, (t, Request(name, int(self.random.integers(4, 49)), left)))
            self.requests.append((name, RequestEvent.ARRIVED, t))
            t += int(self.random.exponential(1 / self.scenario.requests_per_s) * SECOND) + 1

    def serve(self) -> None:
        end = self.traffic_ns + int(self.scenario.seconds * SECOND)
        ready = [(self.traffic_ns, slot) for slot in range(self.scenario.in_flight)]
        while ready:
            now, slot = heapq.heappop(ready)
            now = max(now, self.ranks[0].free_ns)
            if now >= end:
                break
            batch = self.slots[slot]
            while self.waiting and self.waiting[0][0] <= now and len(batch) < self.scenario.most_requests:
                batch.append(heapq.heappop(self.waiting)[1])
            if not batch:
                if not self.waiting:
                    break
                heapq.heappush(ready, (max(self.waiting[0][0], now + 1), slot))
                if not any(self.slots):
                    self.ranks[0].record(now, max(self.waiting[0][0], now), IntervalClass.IDLE, -1, -1)
                    self.ranks[0].free_ns = max(self.waiting[0][0], now)
                continue
            heapq.heappush(ready, (self.step(slot, batch, now), slot))

    def step(self, slot: int, batch: list[Request], now: int) -> int:
        """Run one micro-batch through every stage; return when its sampled ids are back at the first."""
        number, rows, shape = len(self.steps), [], [0.0, 0.0, 0.0]
        at = 0
        for n, request in enumerate(batch):
            count = request.prompt if request.position == 0 else 1
            rows.append((request.name, at, count, request.position, int(count == 1), n))
            shape[0] += count
            shape[1] += count if count > 1 else 0
            shape[2] += count * request.position + count * (count + 1) / 2
            at += count
        last = len(self.ranks) - 1
        begin = now
        for rank in self.ranks:
            arrived, peer = (now, last) if rank.stage == 0 else (now, rank.stage - 1)
            begin = max(rank.free_ns, arrived)
            rank.record(rank.free_ns, begin, IntervalClass.RECV_WAIT, number, slot, peer)
            if rank.stage == 0:
                self._note_step(number, slot, begin, at, rows)
            now = self._work(rank, number, slot, begin, shape, len(batch))
        self._after_step(number, batch, now)
        return now

    def _note_step(self, number: int, slot: int, begin: int, num_rows: int, rows: list[Any]) -> None:
        phases = {row[4] for row in rows}
        phase = Phase.MIXED if len(phases) > 1 else Phase(phases.pop())
        self.steps.append(
            {"step_id": number, "mb": slot, "phase": int(phase), "t0_ns": begin, "num_rows": num_rows, "rows": rows}
        )

    def _work(self, rank: Rank, number: int, slot: int, begin: int, shape: list[float], size: int) -> int:
        scenario, stage = self.scenario, rank.stage
        is_last = stage == len(self.ranks) - 1
        service = (scenario.base_ms[stage] + 0.12 * shape[0] + 0.05 * shape[1] + 0.0006 * shape[2]) * MS
        service *= float(np.exp(self.random.normal(0.0, scenario.noise)))
        cpu, delay = service, 0.0
        load = self._foreign(begin)
        if load:
            service *= 1 + 0.1 * load
            cpu = service
        if self.random.random() < scenario.tail + 0.3 * load:
            delay = float(self.random.exponential(4.0)) * MS
        extra_wall, extra_cpu, pause = self._faults(rank, number, begin)
        t = begin + int(0.1 * MS)
        rank.record(begin, t, IntervalClass.RECV_XFER, number, slot, stage - 1)
        host = int(0.05 * service)
        rank.record(t, t + host, IntervalClass.HOST, number, slot, cpu=host)
        t += host
        wall = int(0.95 * service + delay + extra_wall + extra_cpu)
        if pause:
            rank.record(t, t + wall // 2, IntervalClass.COMPUTE, number, slot, cpu=int(0.95 * cpu + extra_cpu) // 2)
            t += wall // 2
            rank.record(t, t + pause, IntervalClass.GC, number, slot, cpu=pause)
            t += pause
            rank.record(t, t + wall // 2, IntervalClass.COMPUTE, number, slot, cpu=int(0.95 * cpu + extra_cpu) // 2)
            t += wall // 2
        else:
            rank.record(t, t + wall, IntervalClass.COMPUTE, number, slot, cpu=int(0.95 * cpu + extra_cpu))
            t += wall
        sample = 0
        if is_last:
            sample = int((0.2 + 0.05 * size) * MS)
            rank.record(t, t + sample, IntervalClass.SAMPLE, number, slot, cpu=sample)
            t += sample
        sent = t + int(0.15 * MS)
        rank.record(t, sent, IntervalClass.SEND_XFER, number, slot, stage + 1)
        rank.free_ns = sent
        rank.cpu_ns += int(cpu + extra_cpu) + sample
        rank.delay_ns += int(delay)
        rank.num_steps += 1
        rank.counters.append((sent, rank.cpu_ns, rank.delay_ns, rank.num_steps))
        return sent

    def _foreign(self, t_ns: int) -> float:
        at = (t_ns - self.traffic_ns) / SECOND
        return max((cores for begin, end, cores in self.scenario.bursts if begin <= at < end), default=0.0)

    def _faults(self, rank: Rank, number: int, begin: int) -> tuple[float, float, int]:
        """Return (asleep ns, computing ns, collecting ns) that faults add to this step."""
        asleep = computing = 0.0
        pause = 0
        at = (begin - self.traffic_ns) / SECOND
        if number < self.scenario.warmup_steps:
            return asleep, computing, pause
        for place, fault in enumerate(self.scenario.faults):
            if fault.stage != rank.stage or not fault.at_s <= at < fault.until_s:
                continue
            if fault.kind == "slow":
                asleep += 0.0 if fault.on_cpu else fault.ms * MS
                computing += fault.ms * MS if fault.on_cpu else 0.0
            elif fault.kind == "gc" and begin >= self.next_gc_ns.get(place, 0):
                self.next_gc_ns[place] = begin + int(fault.every_s * SECOND)
                pause += int(fault.ms * MS)
            elif fault.kind == "hang" and place not in self.fired:
                self.fired.add(place)
                asleep += fault.ms * MS
            elif fault.kind == "nan" and place not in self.fired:
                self.fired.add(place)
                self.flagged.append((number, rank.stage, fault.layer, [0]))
        return asleep, computing, pause

    def _after_step(self, number: int, batch: list[Request], now: int) -> None:
        bad = any(step == number for step, *_ in self.flagged)
        for place, request in enumerate(list(batch)):
            request.position += request.prompt if request.position == 0 else 1
            request.left -= 1
            failed = bad and place == 0
            if request.left <= 0 or failed:
                batch.remove(request)
                if number >= self.scenario.warmup_steps:
                    event = RequestEvent.FAILED if failed else RequestEvent.FINISHED
                    self.requests.append((request.name, event, now))
