"""The run itself: micro-batches of requests going through the stages of one replica, event by event."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass, RequestEvent
from insitu_collector.simulate.faults import FaultPlan, Traffic, foreign_cores
from insitu_collector.simulate.scenario import BEGIN_NS, MOST_REQUESTS, MS, SECOND, Scenario
from insitu_collector.simulate.work import Service, StepShape, Worked, classes_of, edges_of

Int64 = NDArray[np.int64]

WARMUP_GAP_NS: Final = 100 * MS
"""Between the end of warm-up and the first request."""
RETRY_NS: Final = 10 * MS
"""After which a slot that may take no request looks again."""


@dataclass(slots=True)
class Request:
    name: str
    prompt: int
    left: int
    position: int = 0
    waits_for_memory: bool = False

    @property
    def most_positions(self) -> int:
        return self.prompt + self.left if self.position == 0 else self.position + self.left


class RowEntry(NamedTuple):
    """One entry of a step's row map."""

    request: str
    row: int
    num_rows: int
    position: int
    phase: int
    sample_row: int


class Step(NamedTuple):
    """One micro-batch: what it was made of."""

    number: int
    slot: int
    shape: StepShape
    rows: list[RowEntry]


class RequestRow(NamedTuple):
    request: str
    event: int
    t_ns: int
    step_id: int
    num_tokens: int


class Flag(NamedTuple):
    """A value that is not finite: first written in this layer of this stage."""

    step: int
    stage: int
    layer: int


@dataclass
class StageLog:
    """What the ranks of one stage did: arrays over steps, interval edges and tensor-parallel ranks."""

    classes: tuple[IntervalClass, ...]
    free_ns: Int64
    """When each rank was done with its last step."""
    edges: list[Int64] = field(default_factory=list)
    cpu: list[Int64] = field(default_factory=list)
    delay: list[Int64] = field(default_factory=list)

    def add(self, worked: Worked) -> None:
        self.edges.append(worked.edges)
        self.cpu.append(worked.cpu)
        self.delay.append(worked.delay)
        self.free_ns = worked.edges[-1]

    @cached_property
    def stacked_edges(self) -> Int64:
        """Edges of all steps, int64[num_steps, num_classes + 1, num_tensor_parallel]; for when the run is over."""
        shape = -1, len(self.classes) + 1, len(self.free_ns)
        return np.array(self.edges, np.int64).reshape(shape)

    @cached_property
    def stacked_cpu(self) -> Int64:
        """Time on the core of all steps, int64[num_steps, num_classes, num_tensor_parallel]."""
        return np.array(self.cpu, np.int64).reshape(-1, len(self.classes), len(self.free_ns))

    def counters(self, tp: int) -> tuple[Int64, Int64, Int64]:
        """Return (time, time on the core so far, time kept off it so far) after each step of a rank."""
        delay = np.array([taken[tp] for taken in self.delay], np.int64)
        return self.stacked_edges[:, -1, tp], np.cumsum(self.stacked_cpu[:, :, tp].sum(axis=1)), np.cumsum(delay)


class Replica:
    """One pipeline: warm-up, then requests at random times until the run ends."""

    def __init__(self, scenario: Scenario, number: int, service: Service) -> None:
        self.scenario = scenario
        self.number = number
        self.service = service
        self.random = np.random.default_rng(scenario.seed if number == 0 else [scenario.seed, number])
        width = scenario.tensor_parallel
        chunks = scenario.collectives if width > 1 else 0
        self.stages = [StageLog(classes_of(chunks), np.full(width, BEGIN_NS, np.int64)) for _ in range(scenario.stages)]
        self.hosts = np.array(
            [
                [scenario.place(scenario.rank(number, stage, tp)).host for tp in range(width)]
                for stage in range(scenario.stages)
            ],
            np.int64,
        )
        self.steps: list[Step] = []
        self.requests: list[RequestRow] = []
        self.flags: list[Flag] = []
        self.idle: list[tuple[int, int]] = []
        """When the first stage had nothing to do."""
        self.traffic_ns = 0
        self._traffic = Traffic(scenario.faults, number)
        self._plan: FaultPlan | None = None
        self._foreign: dict[int, list[tuple[float, float, float]]] = {}
        self._slots: list[list[Request]] = [[] for _ in range(scenario.in_flight)]
        self._arriving: deque[tuple[int, Request]] = deque()
        self._waiting: deque[Request] = deque()

    def warm_up(self) -> int:
        """Run the warm-up steps; return when traffic could begin."""
        for number in range(self.scenario.warmup_steps):
            size = 1 + number % MOST_REQUESTS
            prompt = 8 * (1 + number % 6) if number % 5 == 0 else 1
            name = "warmup-" if self.number == 0 else f"warmup-r{self.number}-"
            batch = [Request(f"{name}{number}-{n}", prompt, 1, 0 if prompt > 1 else 10 * n) for n in range(size)]
            self._step(number % self.scenario.in_flight, batch, self._all_free_ns())
        return self._all_free_ns() + WARMUP_GAP_NS

    def serve(self, traffic_ns: int) -> None:
        """Take requests from `traffic_ns` on."""
        self.traffic_ns = traffic_ns
        self._plan = FaultPlan(self.scenario, self.number, traffic_ns, self.hosts)
        self._foreign = {host: foreign_cores(self.scenario, host) for host in np.unique(self.hosts).tolist()}
        self._arrive()
        end = traffic_ns + int(self.scenario.seconds * SECOND)
        ready = [(traffic_ns, slot) for slot in range(self.scenario.in_flight)]
        while ready:
            now, slot = heapq.heappop(ready)
            now = max(now, int(self.stages[0].free_ns.max()))
            if now >= end:
                return
            batch = self._slots[slot]
            if slot < self._traffic.num_slots(self._seconds(now), len(self._slots)):
                self._admit(batch, now)
            if batch:
                heapq.heappush(ready, (self._step(slot, batch, now), slot))
            elif self._arriving or self._waiting:
                heapq.heappush(ready, (self._until_next(now), slot))

    def _until_next(self, now: int) -> int:
        """Return when a slot without requests looks again; the first stage is idle if all are without."""
        until = self._arriving[0][0] if self._arriving else now
        until = until if until > now else now + RETRY_NS
        if not any(self._slots):
            self.idle.append((now, until))
            self.stages[0].free_ns = np.full_like(self.stages[0].free_ns, until)
        return until

    def _all_free_ns(self) -> int:
        return max(int(log.free_ns.max()) for log in self.stages)

    def _seconds(self, t_ns: int) -> float:
        return (t_ns - self.traffic_ns) / SECOND

    def _arrive(self) -> None:
        scenario, t, count = self.scenario, self.traffic_ns, 0
        end = t + int(scenario.seconds * SECOND)
        prefix = "req-" if self.number == 0 else f"req-r{self.number}-"
        while t < end:
            left = int(self.random.integers(scenario.output[0], scenario.output[1] + 1))
            prompt = int(self.random.integers(scenario.prompt[0], scenario.prompt[1] + 1))
            if self._traffic.has_long_prompts:
                prompt = self._traffic.prompt(self._seconds(t), prompt, float(self.random.random()))
            self._arriving.append((t, Request(f"{prefix}{count}", prompt, left)))
            self._note(self._arriving[-1][1], RequestEvent.ARRIVED, t)
            count += 1
            t += int(self.random.exponential(1 / scenario.requests_per_s) * SECOND) + 1

    def _admit(self, batch: list[Request], now: int) -> None:
        while self._arriving and self._arriving[0][0] <= now:
            self._waiting.append(self._arriving.popleft()[1])
        memory = self._traffic.memory(self._seconds(now))
        while self._waiting and len(batch) < self.scenario.most_requests:
            if memory is not None and not self._fits(self._waiting[0], memory):
                self._note_starved(now)
                return
            request = self._waiting.popleft()
            batch.append(request)
            self._note(request, RequestEvent.SCHEDULED, now, len(self.steps))

    def _fits(self, request: Request, memory: int) -> bool:
        used = sum(other.most_positions for slot in self._slots for other in slot)
        return used == 0 or used + request.most_positions <= memory

    def _note_starved(self, now: int) -> None:
        num_places = self.scenario.most_requests * len(self._slots) - sum(map(len, self._slots))
        for request in list(self._waiting)[:num_places]:
            if not request.waits_for_memory:
                request.waits_for_memory = True
                self._note(request, RequestEvent.KV_WAIT, now, num_tokens=request.most_positions)

    def _note(self, request: Request, event: int, t_ns: int, step: int = -1, num_tokens: int = 0) -> None:
        self.requests.append(RequestRow(request.name, int(event), t_ns, step, num_tokens))

    def _step(self, slot: int, batch: list[Request], now: int) -> int:
        """Run one micro-batch through every stage; return when its sampled ids are back at the first."""
        step = _step_of(len(self.steps), slot, batch)
        self.steps.append(step)
        arrived = np.full(self.scenario.tensor_parallel, now, np.int64)
        flag: Flag | None = None
        for stage, log in enumerate(self.stages):
            begin = np.maximum(log.free_ns, arrived)
            at = int(begin.max())
            effect = self._plan.of_step(stage, at) if self._plan is not None else None
            taken = self.service.take(self.random, stage, step.shape, len(begin), self._load(stage, at))
            worked = edges_of(log.free_ns, begin, taken, effect, log.classes)
            log.add(worked)
            arrived = worked.edges[-1]
            if effect is not None and effect.nan_layer is not None:
                flag = Flag(step.number, stage, effect.nan_layer)
                self.flags.append(flag)
        done = int(arrived.max())
        self._end_step(step, batch, done, failed=flag is not None)
        return done

    def _load(self, stage: int, t_ns: int) -> float:
        """Return the cores that others use on the host of a stage's first rank."""
        at, foreign = self._seconds(t_ns), self._foreign.get(int(self.hosts[stage, 0]), [])
        return max((cores for begin, end, cores in foreign if begin <= at < end), default=0.0)

    def _end_step(self, step: Step, batch: list[Request], now: int, *, failed: bool) -> None:
        for place, request in enumerate(list(batch)):
            is_first = request.position == 0
            request.position += request.prompt if is_first else 1
            request.left -= 1
            bad = failed and place == 0
            ended = request.left <= 0 or bad
            if ended:
                batch.remove(request)
            if step.number >= self.scenario.warmup_steps:
                num_tokens = request.position - request.prompt + 1
                event = RequestEvent.FIRST_TOKEN if is_first else RequestEvent.TOKEN
                self._note(request, event, now, step.number, num_tokens)
                if ended:
                    end = RequestEvent.FAILED if bad else RequestEvent.FINISHED
                    self._note(request, end, now, step.number, num_tokens)


def _step_of(number: int, slot: int, batch: list[Request]) -> Step:
    rows: list[RowEntry] = []
    at = prefill = 0
    context = 0.0
    for n, request in enumerate(batch):
        count = request.prompt if request.position == 0 else 1
        rows.append(RowEntry(request.name, at, count, request.position, int(count == 1), n))
        at += count
        prefill += count if count > 1 else 0
        context += count * request.position + count * (count + 1) / 2
    return Step(number, slot, StepShape(at, prefill, context, len(batch)), rows)
