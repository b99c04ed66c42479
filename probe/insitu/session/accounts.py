"""What a session says of itself: rows durable and not, its own cost, which sites fired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from insitu.drain.inlet import Inlet, hook_ns
from insitu.drain.outbox import Outbox
from insitu.drain.thread import Drain
from insitu.exporters.contained import Contained
from insitu.flight.recorder import FlightRecorder
from insitu.identity import Source
from insitu.session.trace_context import bad_headers

if TYPE_CHECKING:
    from insitu.taps.observer import Observer


@dataclass(frozen=True, slots=True)
class FlushReport:
    """Rows so far: `durable`, safe on disk at the destination; `pending`, still on their way; `dropped`, given up.

    `stats().dropped` has the reasons. What was made is the sum of the three.
    """

    durable: int
    pending: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The session's own account, in rows: `produced` = `durable` + pending + `dropped` (by reason), a table at a time.

    epoch, role, rank, stage: who tells it. num_steps: steps of its model that are over.
    """

    epoch: int
    role: str
    rank: int
    stage: int
    produced: dict[str, int]
    durable: dict[str, int]
    dropped: dict[str, dict[str, int]]
    num_steps: int
    concurrent_forward: int
    """Forwards, or steps, that ran while another step was open: not observed, and in no other count."""
    overhead_share: float
    """(CPU of the drain, and of an exporter that tells its own, + time in hooks and around steps) / time in steps."""
    drain_cpu_s: float = 0.0
    """CPU-seconds of the drain's thread so far."""
    bad_headers: dict[str, int] = field(default_factory=dict)
    """By name, of the whole process: headers of requests that break their specification and were left out."""
    flight: dict[str, int] = field(default_factory=dict)
    """What the flight recorder holds, bytes now, at most so far and at most ever, and what came of triggers."""
    governor: dict[str, float | int | None] | None = None
    """The overhead budget, and what became of it in the last window (docs/probe.md); None without a model."""
    left_out: int = 0
    """Rows of `captures` that `max_bytes_per_s` of their rules left out: never produced, and in no other count."""
    untaken: int = 0
    """Rows of `captures` that were due in the model's first step, which tells how wide rows are: as `left_out`."""
    queue_bytes: int = 0
    """What waits in this process: collected, queued, and sent without being known to be durable."""
    max_queue_bytes: int = 0
    """Its bound, the setting of this name; while a batch is made, at most half of it more."""
    probe_errors: int = 0
    """Errors of the probe and its plug-ins that were contained."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many sites `fired`, the names of those that `never_fired`, and in how many `steps`."""

    fired: int
    never_fired: list[str]
    steps: int
    taps: str = "torch"
    """What takes the sites of an eager model: one kernel a site ("triton"), or operations of torch."""
    fires: dict[str, int] = field(default_factory=dict)
    """Names of sites whose module ran several times in the first step, and how often: its last call is kept."""
    compiled_apart: dict[str, str] = field(default_factory=dict)
    """Of those that never fired: which lie in a part that is compiled by itself, where no tap runs, and its path."""


def coverage_of(observer: Observer | None) -> Coverage:
    """Return which sites fired in the steps that are over."""
    if observer is None:
        return Coverage(0, [], 0)
    silent = [site.name for site in observer.sites if not observer.num_fired[site.number]]
    num_fired, apart = len(observer.sites) - len(silent), observer.compiled_apart(silent)
    return Coverage(num_fired, silent, observer.num_steps, observer.taps_by, observer.fires, apart)


def stats_of(
    source: Source,
    inlet: Inlet,
    drain: Drain,
    outbox: Outbox,
    exporter: Contained,
    flight: FlightRecorder,
    observer: Observer | None,
) -> Stats:
    """Return the account of the session that these are parts of."""
    spent = drain.cpu_ns + getattr(exporter, "cpu_ns", 0) + hook_ns(observer, inlet)
    guards = [drain.guard, exporter.guard, *([observer.guard] if observer else [])]
    return Stats(
        epoch=source.epoch,
        role=str(source.role),
        rank=source.rank,
        stage=source.stage,
        produced=dict(drain.produced),
        durable=dict(outbox.durable),
        dropped={table: dict(reasons) for table, reasons in list(outbox.dropped.items()) if reasons},
        num_steps=observer.num_steps if observer else 0,
        concurrent_forward=inlet.num_concurrent,
        overhead_share=spent / inlet.step_ns if inlet.step_ns else 0.0,
        drain_cpu_s=drain.cpu_ns / 1e9,
        bad_headers=bad_headers(),
        flight=flight.stats(),
        governor=observer.overhead.report() if observer else None,
        left_out=observer.num_left_out if observer else 0,
        untaken=observer.num_untaken if observer else 0,
        queue_bytes=outbox.num_bytes + drain.held_bytes,
        max_queue_bytes=outbox.max_bytes,
        probe_errors=sum(guard.num_errors for guard in guards),
    )
