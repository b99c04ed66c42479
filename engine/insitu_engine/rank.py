"""One rank: holds a stage, runs the driver's plans in order, and says through the probe where its time goes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import insitu
from insitu_engine.errors import EngineError, PeerLost, one_line
from insitu_engine.inject import LOG_VARIABLE, check_faults, inherited_faults
from insitu_engine.messages import (
    Failed,
    Idle,
    Ready,
    RowPlan,
    Sampled,
    StepPlan,
    Stop,
    Stopped,
    ToDriver,
    Traffic,
    frame,
    read_length,
    to_rank,
)

if TYPE_CHECKING:
    import torch

    from insitu.intervals import Interval
    from insitu_engine.checkpoint import Checkpoint
    from insitu_engine.injector import Injector
    from insitu_engine.kv_cache import KvCache
    from insitu_engine.stage import Stage
    from insitu_engine.transport import Receipt, Transport

DRIVER: Final = -1
"""`peer` of the driver."""
LAST_WORDS_S: Final = 2.0
_DIE_WITH_PARENT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank is told when it starts."""

    rank: int
    layers: tuple[range, ...]
    """Global layer indices of every stage; this rank's are `layers[rank]`."""
    checkpoint: Checkpoint
    num_blocks: int
    token_budget: int
    dtype: str
    device: str
    to: str | None
    store: Path
    """File through which the ranks find each other."""
    driver_pid: int

    @property
    def num_ranks(self) -> int:
        return len(self.layers)


class DriverGone(Exception):
    """The driver's end of the socket is closed."""


class Link:
    """This rank's end of its socket to the driver. Blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader: BinaryIO = end.makefile("rb")

    def read(self) -> StepPlan | Idle | Traffic | Stop:
        """Wait for the next message. Raises DriverGone."""
        head = self._reader.read(4)
        body = self._reader.read(read_length(head)) if len(head) == 4 else b""
        if not body:
            raise DriverGone
        message: StepPlan | Idle | Traffic | Stop = to_rank.decode(body)
        return message

    def send(self, message: ToDriver) -> None:
        try:
            self._socket.sendall(frame(message))
        except OSError:
            raise DriverGone from None


class Rank:
    """The loop. One outer `host` interval holds it all; what waits, computes or sends opens inner ones."""

    def __init__(
        self,
        spec: RankSpec,
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
        self._rank = spec.rank
        self.param_bytes = sum(p.nbytes for p in stage.parameters())
        self._device = cache.device
        last = spec.num_ranks - 1
        self._ids_from = last if stage.is_first and not stage.is_last else DRIVER
        """Whom a wait for the next plan waits for: the first stage waits for the ids the last one samples."""
        self._idle = True

    def run(self) -> None:
        """Run plans until told to stop. Raises DriverGone, PeerLost."""
        with self._session.interval("host") as host:
            while (plan := self._next_plan()) is not None:
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

    def _next_plan(self) -> StepPlan | None:
        wait = (
            self._session.interval("idle") if self._idle else self._session.interval("recv_wait", peer=self._ids_from)
        )
        with wait:
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
        from insitu_engine.stage import step_inputs

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
            wait.turn("recv_xfer", sent_ns, num_bytes=receipt.num_bytes)
            return hidden.to(self._device)

    def _sample(self, logits: torch.Tensor, plan: StepPlan) -> None:
        from insitu_engine.sampling import sample

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
        )
        for row in rows
    ]


def attach(spec: RankSpec, stage: Stage) -> insitu.Session:
    """Return the rank's probe. Opted-in requests give the rows after every layer, and their logits."""
    if spec.to is None:
        return insitu.off()
    rules = [insitu.Rule(sites="L*.resid_post")]
    if stage.is_last:
        rules.append(insitu.Rule(sites="logits"))
    return insitu.attach(
        stage,
        to=spec.to,
        rules=rules,
        role="rank",
        rank=spec.rank,
        stage=spec.rank,
        pp_rank=spec.rank,
        model_name=spec.checkpoint.name,
        max_rows=spec.token_budget,
        axes={"final_norm": "samples", "logits": "samples"},
    )


def build(spec: RankSpec, link: Link) -> Rank:
    """Load the stage, find the neighbours, warm the kernels, attach. Raises EngineError, ValueError, OSError."""
    import torch

    from insitu_engine.kv_cache import KvCache
    from insitu_engine.stage import Stage, heat

    faults = inherited_faults()
    check_faults(faults, spec.num_ranks, spec.checkpoint.num_layers)
    torch.set_num_threads(1)
    checkpoint, layers = spec.checkpoint, spec.layers[spec.rank]
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    hidden_size = checkpoint.config.hidden_size
    transport = None
    if spec.num_ranks > 1:
        from insitu_engine.transport import Transport

        transport = Transport(spec.rank, spec.num_ranks, spec.store, hidden_size, dtype)
    stage = Stage(checkpoint, layers)
    stage.load(checkpoint, dtype, device)
    cache = KvCache(layers, spec.num_blocks, checkpoint.num_kv_heads, checkpoint.head_dim, dtype, device)
    heat(stage, cache, hidden_size, device)
    # What start-up made stays for good: no later collection has to walk it.
    gc.collect()
    gc.freeze()
    injector = None
    if faults:
        from insitu_engine.injector import install

        log = os.environ.get(LOG_VARIABLE)
        injector = install(
            stage,
            faults,
            layers=layers,
            stage_number=spec.rank,
            rank=spec.rank,
            log=Path(log) if log else None,
        )
        gc.freeze()
    session = attach(spec, stage)
    return Rank(spec, link, stage, cache, transport, session, injector)


def rank_main(spec: RankSpec, end: socket.socket, inherited: Sequence[socket.socket]) -> None:
    """Run a rank in this process until the driver says stop, goes away, or something breaks. Exits the process."""
    for other in inherited:
        other.close()
    _leave_no_orphan(spec.driver_pid)
    link, rank, status = Link(end), None, 1
    try:
        import torch

        with torch.inference_mode():
            rank = build(spec, link)
            link.send(Ready(rank.param_bytes))
            rank.run()
        link.send(Stopped(rank.close()))
        status = 0
    except Exception as error:
        if not isinstance(error, DriverGone):
            with suppress(DriverGone):
                link.send(Failed(_reason(error), isinstance(error, PeerLost)))
        if rank is not None:
            rank.abandon()
    os._exit(status)


def _reason(error: Exception) -> str:
    if isinstance(error, EngineError | ValueError):
        return " ".join(str(error).split())
    return one_line(error)


def _leave_no_orphan(driver_pid: int) -> None:
    """Die with the driver; leave signals and stdout to it."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != driver_pid:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
