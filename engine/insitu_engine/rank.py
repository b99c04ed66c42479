"""One rank's loop: runs the driver's plans in order, and says through the probe where its time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import insitu
from insitu_engine.messages import Idle, RowPlan, Sampled, StepPlan, Traffic
from insitu_engine.rank_link import Link
from insitu_engine.sampling import sample
from insitu_engine.stage import Stage, step_inputs

if TYPE_CHECKING:
    import torch

    from insitu.session.intervals import Interval
    from insitu_engine.injector import Injector
    from insitu_engine.kv_cache import KvCache
    from insitu_engine.transport import Receipt, Transport

DRIVER: Final = -1
"""`peer` of the driver."""
LAST_WORDS_S: Final = 2.0


class Rank:
    """One outer `host` interval holds it all; what waits, computes or sends opens inner ones."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        link: Link,
        stage: Stage,
        cache: KvCache,
        transport: Transport | None,
        session: insitu.Session,
        injector: Injector | None,
    ) -> None:
        self._link = link
        self._stage = stage
        self._cache = cache
        self._transport = transport
        self._session = session
        self._injector = injector
        self._rank = rank
        self.param_bytes = sum(p.nbytes for p in stage.parameters())
        self._device = cache.device
        last = num_ranks - 1
        self._ids_from = last if stage.is_first and not stage.is_last else DRIVER
        """Whom a wait for the next plan waits for: the first stage waits for the ids the last one samples."""
        self._idle = True

    def run(self) -> None:
        """Run plans until told to stop. Raises DriverGone, PeerLost."""
        with self._session.interval("host") as host:
            while (plan := self._next_plan(host)) is not None:
                host.step_id, host.mb = plan.step_id, plan.mb
                self._run_step(plan)

    def close(self) -> dict[str, Any]:
        """Leave the other ranks, make the probe's records durable, and return its account."""
        if self._injector is not None:
            self._injector.close()
        if self._transport is not None:
            self._transport.close()
        self._session.close()
        return self._session.stats().to_json()

    def abandon(self) -> None:
        """Ship what the probe holds, quickly: this rank cannot go on."""
        self._session.close(LAST_WORDS_S)

    def _next_plan(self, host: Interval) -> StepPlan | None:
        wait = (
            self._session.interval("idle") if self._idle else self._session.interval("recv_wait", peer=self._ids_from)
        )
        with wait:
            host.step_id = host.mb = -1  # until the next plan: a rank may end long after its last step
            while True:
                message = self._link.read()
                if isinstance(message, StepPlan):
                    self._attribute(wait, message)
                    return message
                if isinstance(message, Idle):
                    wait.turn("idle", message.at_ns, peer=DRIVER)
                    self._idle = True
                elif isinstance(message, Traffic):
                    if self._injector is not None:
                        self._injector.traffic_from(message.step_id)
                else:
                    return None

    def _attribute(self, wait: Interval, plan: StepPlan) -> None:
        """Say what the wait that just ended was for, by the times the driver put into the plan."""
        if self._idle:
            wait.turn("recv_wait", plan.demand_since_ns, peer=self._ids_from)
            self._idle = False
        wait.step_id, wait.mb = plan.step_id, plan.mb
        if self._ids_from != DRIVER:
            wait.turn("recv_wait", plan.ready_ns, peer=DRIVER)
        wait.turn("recv_xfer", plan.send_ns, peer=DRIVER)

    def _run_step(self, plan: StepPlan) -> None:
        session, stage = self._session, self._stage
        receipt = None
        if not stage.is_first:
            assert self._transport is not None, "a stage that is not the first has one before it"
            receipt = self._transport.post_receive(plan.step_id, plan.num_rows)
        if plan.scrub:
            self._cache.scrub(plan.scrub)
        step = step_inputs(plan, self._cache, self._device)
        inputs = step.tokens if receipt is None else self._receive(receipt, plan)
        if self._injector is not None:
            self._injector.begin_step(plan.step_id, plan.rows)
        with (
            session.step(plan.step_id, mb=plan.mb, phase=plan.phase, rows=row_map(plan.rows), num_rows=plan.num_rows),
            session.interval("compute", step_id=plan.step_id, mb=plan.mb),
        ):
            output = stage(inputs, step)
        if stage.is_last:
            self._sample(output, plan)
        else:
            self._send(output, plan)

    def _receive(self, receipt: Receipt, plan: StepPlan) -> torch.Tensor:
        with self._session.interval("recv_wait", step_id=plan.step_id, mb=plan.mb, peer=self._rank - 1) as wait:
            sent_ns = receipt.wait_header(plan.step_id)
            hidden = receipt.wait_hidden()
            if sent_ns is None:  # no usable clock here (contract C7): all of it stays `recv_wait`
                wait.num_bytes = receipt.num_bytes
            else:
                wait.turn("recv_xfer", sent_ns, num_bytes=receipt.num_bytes)
            return hidden.to(self._device)

    def _sample(self, logits: torch.Tensor, plan: StepPlan) -> None:
        with self._session.interval("sample", step_id=plan.step_id, mb=plan.mb):
            ids = sample(logits, [row for row in plan.rows if row.sample_row >= 0])
        self._link.send(Sampled(plan.step_id, plan.mb, ids))

    def _send(self, hidden: torch.Tensor, plan: StepPlan) -> None:
        session, transport = self._session, self._transport
        assert transport is not None, "a stage that is not the last has one after it"
        fields = {"step_id": plan.step_id, "mb": plan.mb, "peer": self._rank + 1}
        if transport.send_pending:
            with session.interval("send_wait", **fields):
                transport.wait_sent()
        with session.interval("send_xfer", num_bytes=hidden.nbytes, **fields):
            transport.send(plan.step_id, plan.mb, hidden, time.monotonic_ns())


def row_map(rows: Sequence[RowPlan]) -> list[insitu.Rows]:
    """Return a plan's rows as the probe's row map."""
    return [
        insitu.Rows(
            row.request,
            start=row.start,
            count=row.count,
            position=row.position,
            phase=row.phase,
            sample_row=row.sample_row,
            capture=row.capture,
            trace=_context(row.trace) if row.trace else None,
        )
        for row in rows
    ]


@lru_cache(maxsize=1024)
def _context(traceparent: str) -> insitu.RequestContext:
    """Return a request's place in its trace: read once, not at each of its steps."""
    return insitu.request_context({"traceparent": traceparent})
