"""What runs next: continuous batching over micro-batch slots. Pure: no torch, no clock, no I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from insitu_engine.blocks import BlockPool, blocks_for
from insitu_engine.messages import NOT_FINITE, RowPlan, StepPlan
from insitu_engine.request import Request


class QueueFull(Exception):
    """No place in the queue; come back later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a scheduler may hand out. `token_budget` exceeds `max_batch`, so that prefill always moves on."""

    num_slots: int
    """Micro-batches in flight at once, whatever the number of stages."""
    num_blocks: int
    max_batch: int = 16
    """Requests of one slot."""
    token_budget: int = 128
    """Most rows of one step."""
    max_queue: int = 64
    """Requests that may wait."""

    def __post_init__(self) -> None:
        assert self.num_slots > 0 and self.max_batch > 0, "there is at least one slot with one request"
        assert self.token_budget > self.max_batch, "decode rows must leave room for prefill"


@dataclass(slots=True)
class Slot:
    """One micro-batch: the requests pinned to it, and its step in flight."""

    mb: int
    requests: list[Request] = field(default_factory=list)
    """In order of admission."""
    step: StepPlan | None = None
    last_step: int = -1

    @property
    def runnable(self) -> bool:
        return self.step is None and bool(self.requests)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one completed step did for one request."""

    request: Request
    token: int | None
    """The sampled id; None when it was not finite."""
    finish: str | None
    """`stop`, `length` or `not_finite` when this ended the request."""


class Scheduler:
    """Owns every unfinished request. Call `plan` until it returns None, `complete` when a step is back."""

    def __init__(self, limits: Limits, first_step: int = 0) -> None:
        self.limits = limits
        self.next_step = first_step
        self.pool = BlockPool(limits.num_blocks)
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(mb) for mb in range(limits.num_slots)]
        self._by_name: dict[str, Request] = {}
        self._starved: list[Request] = []

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._by_name)

    @property
    def num_running(self) -> int:
        return sum(len(slot.requests) for slot in self.slots)

    @property
    def queue_is_full(self) -> bool:
        return len(self.waiting) >= self.limits.max_queue

    def fits(self, num_positions: int) -> bool:
        """Return whether a request of so many positions could ever run."""
        return blocks_for(num_positions) <= self.limits.num_blocks

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFull; the caller has checked `fits`."""
        assert request.name not in self._by_name, f"request {request.name} is already here"
        assert request.prompt and request.max_tokens > 0, "a request computes at least one token"
        assert self.fits(request.most_positions), "a request that can never run would block the queue"
        if self.queue_is_full:
            raise QueueFull
        self._by_name[request.name] = request
        self.waiting.append(request)

    def abort(self, name: str) -> None:
        """Forget a request: now, or once the step it is in comes back. Unknown names are ignored."""
        request = self._by_name.get(name)
        if request is None:
            return
        if request.slot < 0:
            self.waiting.remove(request)
            del self._by_name[name]
            return
        request.aborted = True
        step = self.slots[request.slot].step
        if step is None or all(row.request != name for row in step.rows):
            self._release(request)

    def plan(self) -> StepPlan | None:
        """Admit what fits, then return the next step of the slot that has waited longest, if one can run."""
        self._admit()
        runnable = [slot for slot in self.slots if slot.runnable]
        if not runnable:
            return None
        slot = min(runnable, key=lambda slot: slot.last_step)
        slot.step = self._build(slot)
        slot.last_step = self.next_step
        self.next_step += 1
        return slot.step

    def complete(self, step_id: int, ids: list[int]) -> list[Outcome]:
        """Take back a step with its sampled ids, by sample row; return what it did, in row order."""
        slot = next((s for s in self.slots if s.step is not None and s.step.step_id == step_id), None)
        assert slot is not None and slot.step is not None, f"step {step_id} is not in flight"
        rows, slot.step = slot.step.rows, None
        outcomes = []
        for row in rows:
            request = self._by_name[row.request]
            request.num_computed += row.count
            if request.aborted:
                self._release(request, scrub=row.sample_row >= 0 and ids[row.sample_row] == NOT_FINITE)
            elif row.sample_row >= 0:
                outcomes.append(self._sampled(request, ids[row.sample_row]))
        return outcomes

    def take_starved(self) -> list[Request]:
        """Return, once each, the waiting requests for which there was a place in a batch and no KV blocks."""
        starved, self._starved = self._starved, []
        return starved

    def _sampled(self, request: Request, token: int) -> Outcome:
        if token == NOT_FINITE:
            self._release(request, scrub=True)
            return Outcome(request, None, "not_finite")
        request.output.append(token)
        finish = None
        if token in request.end_ids:
            finish = "stop"
        elif len(request.output) >= request.max_tokens:
            finish = "length"
        if finish:
            self._release(request)
        return Outcome(request, token, finish)

    def _release(self, request: Request, *, scrub: bool = False) -> None:
        self.slots[request.slot].requests.remove(request)
        self.pool.give_back(request.blocks, scrub=scrub)
        request.blocks = []
        del self._by_name[request.name]

    def _admit(self) -> None:
        """Move waiting requests, first come first served, to the slot with least load while their worst case fits."""
        while self.waiting:
            slot = min(self.slots, key=lambda slot: (len(slot.requests), slot.last_step))
            if len(slot.requests) >= self.limits.max_batch:
                return
            request = self.waiting[0]
            blocks = self.pool.take(blocks_for(request.most_positions))
            if blocks is None:
                self._note_starved()
                return
            self.waiting.popleft()
            request.blocks, request.slot = blocks, slot.mb
            slot.requests.append(request)

    def _note_starved(self) -> None:
        """The first waiting request found no blocks: it and those behind it that had a place too wait for memory."""
        num_places = self.limits.max_batch * len(self.slots) - self.num_running
        for request in islice(self.waiting, num_places):
            if not request.starved:
                request.starved = True
                self._starved.append(request)

    def _build(self, slot: Slot) -> StepPlan:
        """Give every decoding request its row, then what is left of the token budget to prefill, oldest first."""
        decoding = [r for r in slot.requests if r.output]
        decoding.sort(key=lambda r: r.num_computed)
        chunks = [(request, 1) for request in decoding]
        budget = self.limits.token_budget - len(chunks)
        for request in slot.requests:
            if not request.output and budget > 0:
                count = min(len(request.prompt) - request.num_computed, budget)
                chunks.append((request, count))
                budget -= count
        rows = _rows(chunks)
        phase = "decode" if len(chunks) == len(decoding) else "mixed" if decoding else "prefill"
        return StepPlan(
            step_id=self.next_step,
            mb=slot.mb,
            phase=phase,
            num_rows=sum(row.count for row in rows),
            num_samples=sum(row.sample_row >= 0 for row in rows),
            rows=rows,
            scrub=self.pool.take_dirty(),
        )


def _rows(chunks: list[tuple[Request, int]]) -> list[RowPlan]:
    """Lay chunks out one after another; whoever reaches its last known token samples."""
    rows: list[RowPlan] = []
    start = num_samples = 0
    for request, count in chunks:
        position = request.num_computed
        samples = position + count == request.num_tokens
        rows.append(
            RowPlan(
                request=request.name,
                start=start,
                count=count,
                position=position,
                phase="decode" if request.output else "prefill",
                sample_row=num_samples if samples else -1,
                capture=request.capture,
                blocks=request.blocks[: blocks_for(position + count)],
                tokens=request.tokens(position, count),
                sampling=request.sampling,
                trace=request.trace.traceparent,
            )
        )
        start += count
        num_samples += samples
    return rows
