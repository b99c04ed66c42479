"""The driver's core: requests in, plans out to every rank, sampled ids back. Lives on one asyncio loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import insitu
from insitu_engine.blocks import BLOCK_SIZE
from insitu_engine.errors import RequestError
from insitu_engine.launcher import Launched
from insitu_engine.links import SETTLE_S, RankLink, cause_of_end
from insitu_engine.messages import Failed, Idle, Ready, Sampled, Stop, Stopped, ToDriver, Traffic, frame
from insitu_engine.request import Request
from insitu_engine.scheduler import Limits, Outcome, QueueFull, Scheduler

RETRY_AFTER_S: Final = 1
NOT_FINITE_TEXT: Final = "the model computed NaN or infinity for this request, so its output was ended"


@dataclass(frozen=True, slots=True)
class End:
    """No more tokens: `reason` is `stop` or `length`, or `error` says what went wrong."""

    reason: str | None
    error: RequestError | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """What whoever submitted a request holds: its tokens as they come, then one End."""

    request: Request
    updates: asyncio.Queue[int | End] = field(default_factory=asyncio.Queue)
    scheduled: bool = False


class Driver:
    """Owns the scheduler and the links. Every method runs on the loop's thread."""

    def __init__(self, limits: Limits, session: insitu.Session, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.scheduler = Scheduler(limits)
        self.links: list[RankLink] = []
        self.status = "loading"
        """`loading`, `warming`, `ready`, `draining` or `failed`."""
        self.cause: str | None = None
        """Why the engine failed."""
        self.stats: dict[int, dict[str, object]] = {}
        """By rank: its probe's account, once it has stopped."""
        self._session = session
        self._clock = clock
        self._tickets: dict[str, Ticket] = {}
        self._demand_since_ns = 0
        self._num_ready = 0
        self._loaded = asyncio.Event()
        self._failed = asyncio.Event()
        self._drained = asyncio.Event()

    # -- ranks ---------------------------------------------------------------------------------------------------

    async def connect(self, launched: Launched) -> None:
        """Open the links to all ranks."""
        self.links = [RankLink(rank, self.on_message) for rank in launched.ranks]
        for link in self.links:
            await link.open(self._on_exit)

    async def loaded(self) -> None:
        """Return once every rank is ready."""
        await self._loaded.wait()

    async def failed(self) -> str:
        """Return why, once a rank has ended that should not have."""
        await self._failed.wait()
        assert self.cause is not None, "a failure has a cause"
        return self.cause

    def on_message(self, rank: int, message: ToDriver) -> None:
        """Take what a rank said."""
        now = self._clock()
        if isinstance(message, Sampled):
            self._on_sampled(message, now)
        elif isinstance(message, Ready):
            self._num_ready += 1
            if self._num_ready == len(self.links):
                self._loaded.set()
        elif isinstance(message, Stopped):
            self.stats[rank] = message.stats
        elif isinstance(message, Failed):
            self._suspect(self.links[rank])

    def _on_exit(self, link: RankLink) -> None:
        if link.rank not in self.stats:
            self._suspect(link)

    def _suspect(self, link: RankLink) -> None:
        """Fail because of this rank: at once, or a little later where it says that another one is the cause."""
        cause = cause_of_end(link)
        if link.failed is not None and link.failed.lost_peer:
            asyncio.get_running_loop().call_later(SETTLE_S, self.fail, cause)
        else:
            self.fail(cause)

    def fail(self, cause: str) -> None:
        """Give up: every request in flight gets the cause. The first cause stands."""
        if self.status in ("failed", "stopping"):
            return
        self.status, self.cause = "failed", cause
        for name in list(self._tickets):
            self._end(name, End(None, RequestError(f"the engine failed: {cause}", status=503, code="engine_failed")))
        self._failed.set()

    def stop_ranks(self) -> None:
        """Tell every rank to flush its probe and exit."""
        self.status = "stopping" if self.status != "failed" else self.status
        for link in self.links:
            link.send(Stop())

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Take a request in. Raises RequestError: 503 when not serving, 429 when the queue is full."""
        now = self._clock()
        if self.status not in ("ready", "warming"):
            raise self.unavailable()
        if not self.scheduler.has_work:
            self._demand_since_ns = now
        try:
            self.scheduler.submit(request)
        except QueueFull:
            raise RequestError(
                f"{self.scheduler.limits.max_queue} requests are waiting already; try again in {RETRY_AFTER_S} s",
                status=429,
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        ticket = self._tickets[request.name] = Ticket(request)
        self._session.request("arrived", request.name, num_tokens=len(request.prompt), trace=request.trace, t_ns=now)
        self._pump(now)
        if request.slot < 0:
            self._session.request("queued", request.name)
        return ticket

    def unavailable(self) -> RequestError:
        """Return the error of a request that came while the engine does not serve."""
        why = {"draining": "the server is stopping", "failed": f"the engine failed: {self.cause}"}
        text = why.get(self.status, f"the engine is not ready yet ({self.status})")
        return RequestError(text, status=503, code="engine_failed" if self.status == "failed" else "not_ready")

    def finish(self, name: str) -> None:
        """End a request whose output is complete (a stop string was seen)."""
        self._withdraw(name, "finished")

    def cancel(self, name: str) -> None:
        """Drop a request nobody waits for any more. Unknown names are ignored."""
        self._withdraw(name, "failed")

    def _withdraw(self, name: str, event: str) -> None:
        ticket = self._forget(name)
        if ticket is None:
            return
        self._session.request(event, name, num_tokens=len(ticket.request.output))
        self.scheduler.abort(name)
        self._settle(self._clock())

    def _forget(self, name: str) -> Ticket | None:
        ticket = self._tickets.pop(name, None)
        if not self._tickets:
            self._drained.set()
        return ticket

    def abort_all(self, why: str) -> None:
        """End every request with a reason."""
        for name in list(self._tickets):
            self.scheduler.abort(name)
            self._end(name, End(None, RequestError(why, status=503, code="aborted")))
        self._settle(self._clock())

    async def drained(self) -> None:
        """Return once no request is left."""
        while self._tickets:
            self._drained.clear()
            await self._drained.wait()

    # -- steps ---------------------------------------------------------------------------------------------------

    def end_warmup(self) -> None:
        """Tell everybody that what follows is traffic."""
        step_id, num_blocks = self.scheduler.next_step, self.scheduler.limits.num_blocks
        self._session.event("kv_pool", f"{num_blocks} blocks of {BLOCK_SIZE} token positions")
        self._session.event("warmup_end", f"steps below {step_id} were warm-up", step_id=step_id - 1)
        for link in self.links:
            link.send(Traffic(step_id))

    def _on_sampled(self, message: Sampled, now: int) -> None:
        if self.status == "failed":
            return
        for outcome in self.scheduler.complete(message.step_id, message.ids):
            self._deliver(outcome, message.step_id, now)
        self._settle(now)

    def _settle(self, now: int) -> None:
        """Send what can run now; where nothing is left to do anywhere, say so."""
        if self.scheduler.has_work:
            self._pump(now)
        else:
            for link in self.links:
                link.send(Idle(now))

    def _deliver(self, outcome: Outcome, step_id: int, now: int) -> None:
        name, request = outcome.request.name, outcome.request
        ticket = self._tickets.get(name)
        if ticket is None:
            return
        if outcome.token is None:
            error = RequestError(NOT_FINITE_TEXT, status=500, code="not_finite")
            self._end(name, End(None, error), step_id)
            return
        event = "first_token" if len(request.output) == 1 else "token"
        self._session.request(event, name, step_id=step_id, num_tokens=len(request.output), t_ns=now)
        ticket.updates.put_nowait(outcome.token)
        if outcome.finish is not None:
            self._end(name, End(outcome.finish), step_id)

    def _end(self, name: str, end: End, step_id: int = -1) -> None:
        ticket = self._forget(name)
        assert ticket is not None, f"request {name} ends once"
        event = "finished" if end.error is None else "failed"
        self._session.request(event, name, step_id=step_id, num_tokens=len(ticket.request.output))
        ticket.updates.put_nowait(end)

    def _pump(self, ready_ns: int) -> None:
        """Send every step that can run to every rank. ready_ns: when what they waited for was there."""
        while (plan := self.scheduler.plan()) is not None:
            plan.demand_since_ns = self._demand_since_ns
            plan.ready_ns = ready_ns
            plan.send_ns = self._clock()
            data = frame(plan)
            for link in self.links:
                link.write(data)
            for row in plan.rows:
                ticket = self._tickets.get(row.request)
                if ticket is not None and not ticket.scheduled:
                    ticket.scheduled = True
                    self._session.request("scheduled", row.request, step_id=plan.step_id, t_ns=plan.send_ns)
        for request in self.scheduler.take_starved():
            self._session.request("kv_wait", request.name, num_tokens=request.most_positions, t_ns=ready_ns)
