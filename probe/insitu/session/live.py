"""A session: one process's probe, from the rings on the step thread to the exporter."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock, get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from insitu.arguments import MOST, rules_of, seconds
from insitu.config import DEFAULT_QUEUE_BYTES
from insitu.credentials import NONE, Credentials
from insitu.destinations import folder_now
from insitu.drain.inlet import Inlet
from insitu.drain.outbox import Outbox
from insitu.drain.thread import Drain
from insitu.exporters import Exporter, open_exporter
from insitu.exporters.contained import Contained
from insitu.exporters.deferred import Deferred
from insitu.flight.recorder import FlightRecorder
from insitu.flight.settings import ASKED_ONLY, Flight
from insitu.flight.signals import on_signal
from insitu.identity import Source
from insitu.rules.rule import RuleError, Standing
from insitu.session import process
from insitu.session.accounts import Coverage, FlushReport, Stats, coverage_of, stats_of
from insitu.session.appended import checked
from insitu.session.gc_pauses import GcPauses
from insitu.session.intervals import Interval, Recorder
from insitu.session.open_step import Step
from insitu.session.request_names import named_as, naming
from insitu.session.row_map import FARTHEST, MOST_ROWS, Rows, check_request, check_text, check_trace, covered_by, within
from insitu.session.stated import Stated
from insitu.session.step import StepRecord, phase_of
from insitu.session.step_traces import StepTraces
from insitu.session.trace_context import RequestContext
from insitu.vocabulary import Numbers, RequestEvent

if TYPE_CHECKING:
    import torch

    from insitu.rules.changes import RuleChanges
    from insitu.rules.rule import Rule
    from insitu.segments.retention import Keep
    from insitu.session.collecting import Collected
    from insitu.sites.site import Site
    from insitu.taps.observer import Observer

logger = logging.getLogger("insitu")

State = Callable[["torch.nn.Module", Sequence[Any], Mapping[str, Any]], Stated]
_EVENTS: Final = Numbers(RequestEvent, "event of a request")


class Session:
    """What `insitu.attach` and `insitu.start` return; use those. Use from the step thread, except where said.

    source: who writes its rows. to, keep, flight, max_queue_bytes, spool: as settled (docs/probe.md, "Settings"), and
    credentials: what a collector is shown.
    Raises ValueError for a bad destination, OSError for one that cannot be written.
    """

    def __init__(
        self,
        source: Source,
        to: str | Exporter,
        keep: Keep | None = None,
        flight: Flight | None = None,
        max_queue_bytes: int = DEFAULT_QUEUE_BYTES,
        spool: str | None = None,
        credentials: Credentials = NONE,
    ) -> None:
        self.source = source
        self.to = to
        self._keep = keep
        self._asked_flight = flight or ASKED_ONLY
        self._max_queue_bytes = max_queue_bytes
        self._spool = spool
        self._credentials = credentials
        self._folder = folder_now()
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._wait: Callable[[], None] | None = None
        """What a step waits for before it begins; only `collect` has it wait."""
        self._observer: Observer | None = None
        self._state: State | None = None
        """Who says what a forward computes, where somebody follows the model's calls."""
        self.has_all_logits = False
        """Whether a row map that says nothing of sampled rows means that each row of tokens has logits."""
        self._undo: list[Callable[[], None]] = []
        self._next_step = 0
        self._step_id = -1
        self._closed = False
        self._running = False
        self._assemble(is_child=False)
        self._run()
        process.add(self)

    def _assemble(self, *, is_child: bool) -> None:
        self._gate, self._numbering = Lock(), Lock()
        self._open: StepRecord | None = None
        self._open_thread = 0
        self._inlet = Inlet()
        self._recorder = Recorder()
        self._pauses = GcPauses()
        self._traces = StepTraces()
        self._flight = FlightRecorder(self._asked_flight, self.source)
        self._exporter = Contained(self._open_exporter(is_child=is_child))
        self._outbox = Outbox(self.source.epoch, self._exporter, self._max_queue_bytes)
        self._drain = Drain(
            self.source, self._outbox, self._inlet, self._recorder, self._pauses, lambda: self._observer, self._flight
        )

    def _changes(self) -> RuleChanges | None:
        return self._observer.changes if self._observer else None

    def _open_exporter(self, *, is_child: bool) -> Exporter:
        """Open the destination; a forked child does so at its first batch."""
        to = self.to
        if not isinstance(to, str):
            return to
        open_it = partial(
            open_exporter,
            to,
            self.source,
            self._keep,
            self._put_rows,
            self._traces,
            self._flight.asked,
            self._changes,
            self._spool,
            self._credentials,
            self._folder if is_child else "",  # a child may have gone elsewhere
        )
        return Deferred(open_it) if is_child else open_it()

    def _put_rows(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._inlet.put_row(table, row)

    def _run(self) -> None:
        """Start the drain: at once, and in a forked child when the child first uses the session."""
        self._running = True
        self._inlet.put_row("sources", self.source.row())
        self._pauses.install()
        try:
            self._drain.start()
        except RuntimeError as error:  # no thread can be had any more
            self._drain.guard.contain(error)

    def observe_with(self, observer: Observer, model: torch.nn.Module | None = None) -> None:
        """Give the session its model's observer, and the model (`insitu.attach` does). Raises nothing."""
        self._observer = observer
        self._model = None if model is None else weakref.ref(model)
        observer.changes.tell = lambda kind, text, step_id: self.event(kind, text, step_id=step_id)

    def wait_for_traffic(self) -> None:
        """Take it as it is that no step comes for long: the model is there, and so far nobody asks. Raises nothing."""
        self._drain.notices.no_steps.stop()

    def set_rules(self, rules: Sequence[Rule], *, for_s: float | None = None, who: str = "this process") -> int:
        """Follow other rules from the next step on; return their version (0: those of attach). Any thread.

        Only sites that were attached can be named. for_s: seconds, after which the rules before are in force again.
        who: a text, told in `events`. Raises RuleError, ValueError for what is no text, and nothing changes.
        """
        rules = rules_of(rules)
        check_text("who", who)
        if self._observer is None:
            raise RuleError("this session observes no model; rules are for one that attach was given")
        return self._observer.changes.set_here(rules, who, for_s)

    def rules(self) -> Standing:
        """Return the rules as they are now. Any thread."""
        return self._observer.changes.standing() if self._observer else Standing(0, (), None, 0)

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Remember how to undo a change to the model; `detach` undoes the latest first. Raises nothing itself."""
        self._undo.append(undo)

    # -- recording -----------------------------------------------------------------------------------------------

    def step(
        self,
        step_id: int | None = None,
        *,
        mb: int = 0,
        phase: str | None = None,
        rows: Sequence[Rows] | None = None,
        num_rows: int | None = None,
        num_padded: int = 0,
    ) -> Step:
        """Return the context in which the model runs one step.

        step_id: the scheduler's number, the same on every rank; None counts this session's own. mb: the micro-batch
        slot. rows: the row map, stated from what really runs. num_rows: valid rows (default: what the row map covers;
        else all). num_padded: rows beyond them. phase: "prefill", "decode" or "mixed" (default: what the row map says).
        Raises KeyError for a phase that is none, ValueError for a number or a row map that is none; what the model
        raises inside goes on to the caller.
        """
        step_id = None if step_id is None else within("step_id", step_id, -FARTHEST, FARTHEST)
        mb, num_padded = within("mb", mb, -MOST - 1, MOST), within("num_padded", num_padded, 0, MOST_ROWS)
        num_rows = None if num_rows is None else within("num_rows", num_rows, 0, MOST_ROWS)
        covered, samples, phases = (0, 0, ()) if rows is None else covered_by(rows)
        with self._numbering:
            if step_id is None:
                step_id = self._next_step
            self._next_step = max(self._next_step, step_id + 1)
        if num_rows is None and rows:
            num_rows = covered
        record = StepRecord(
            step_id, mb, phase_of(phase, phases), time.monotonic_ns(), rows, num_rows, num_padded, samples
        )
        record.has_all_logits = self.has_all_logits and bool(rows) and not samples
        return Step(self, record)

    def step_stating(self, stated: Stated) -> Step:
        """Return the context of a step of which somebody else says what it computes (stated). Raises nothing."""
        if stated.rows is None:
            return self.step()
        step = self.step(rows=stated.rows, num_padded=stated.num_padded)
        step.record.has_all_logits = stated.has_all_logits
        return step

    def step_of(self, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Return the context of a forward, model(*args, **kwargs), that nobody opened a step for. Raises nothing."""
        return self.step() if self._state is None else self.step_stating(self._state(model, args, kwargs))

    def follow(self, state: State) -> None:
        """Ask `state(model, args, kwargs)` what each forward computes that is a step by itself. It raises nothing."""
        self._state = state

    @contextmanager
    def requests(self, names: Sequence[str], *, capture: bool = False) -> Iterator[None]:
        """Let forwards in this block be of these requests, one a sequence of the batch, in order (`model.generate`).

        capture: they opt in to rules with `requests="opt-in"`. For models of transformers (docs/integrations.md);
        others state rows in `step`. Raises ValueError for what is no list of names, or no switch.
        """
        with naming(named_as(names, capture)):
            yield

    @property
    def is_closed(self) -> bool:
        """True once it was closed: it records nothing more."""
        return self._closed

    @property
    def in_step(self) -> bool:
        """True on the thread whose step is open."""
        return self._open_thread == get_ident()

    @property
    def in_interval(self) -> bool:
        """True while an interval is open."""
        return self._recorder.open is not None

    @property
    def step_id(self) -> int:
        """The step that is open, or was last."""
        return self._step_id

    def interval(self, cls: str, *, step_id: int = -1, mb: int = -1, peer: int = -1, num_bytes: int = 0) -> Interval:
        """Return the context of a timed stretch of the step thread; `cls` is a name of `IntervalClass`, in lower case.

        An inner interval takes its time from the outer one. Inside an open step it belongs to that step unless
        `step_id` says another. mb: the micro-batch slot. peer: the rank that is waited for, -1 the driver. num_bytes:
        what is sent or received. Other threads record nothing. Raises KeyError for a class that is none, ValueError
        for a number that cannot be.
        """
        if mb != -1 or peer != -1:
            mb, peer = within("mb", mb, -1, MOST), within("peer", peer, -1, MOST)
        if step_id != -1 or num_bytes:
            step_id = within("step_id", step_id, -FARTHEST, FARTHEST)
            num_bytes = within("num_bytes", num_bytes, -FARTHEST, FARTHEST)
        if not self.in_step:
            self._recorder.pin()
        elif step_id == -1:
            step_id = self._step_id
        return self._recorder.interval(cls, step_id, mb, peer, num_bytes)

    def request(
        self,
        event: str,
        request: str,
        *,
        step_id: int = -1,
        num_tokens: int | None = None,
        trace_id: str | None = None,
        trace: RequestContext | None = None,
        t_ns: int | None = None,
    ) -> None:
        """Record an event of a request: a name of `RequestEvent`, in lower case. Any thread.

        step_id: the step that did it, -1 for none. num_tokens: tokens so far; of `arrived` those of the prompt. t_ns:
        when, on this host's monotonic clock (now). trace: where it stands in its trace (`insitu.request_context`);
        `trace_id`, 32 hex digits, where that is all there is: who asked is not known then. Raises KeyError for an event
        that is none, ValueError for what is no text, number or trace.
        """
        check_request(request)
        step_id = within("step_id", step_id, -FARTHEST, FARTHEST)
        num_tokens = None if num_tokens is None else within("num_tokens", num_tokens, 0, MOST_ROWS)
        t_ns = time.monotonic_ns() if t_ns is None else within("t_ns", t_ns, -FARTHEST, FARTHEST)
        check_trace(trace)
        parent_span_id = sampled = None
        if trace_id is not None:
            check_text("trace_id", trace_id)
        if trace is not None:
            trace_id = trace.trace_id
            parent_span_id, sampled = trace.span_id, trace.sampled
            self._traces.note_request(request, trace)
        self.append(
            "requests",
            {
                "request": request,
                "trace_id": trace_id,
                "event": _EVENTS[event],
                "t_ns": t_ns,
                "step_id": step_id,
                "num_tokens": num_tokens,
                "parent_span_id": parent_span_id,
                "sampled": sampled,
            },
        )

    def event(self, kind: str, text: str = "", *, step_id: int = -1) -> None:
        """Record a named moment: its kind, a text for people, the step it belongs to (step_id, -1: none). Any thread.

        Raises ValueError for what is no text or no number; what finds no room is counted.
        """
        if not isinstance(kind, str) or not isinstance(text, str):
            raise ValueError(f"an event is two texts, its kind and what it says, not {kind!r} and {text!r}")
        check_text("kind", kind)
        check_text("text", text)
        step_id = within("step_id", step_id, -FARTHEST, FARTHEST)
        self.append("events", {"t_ns": time.monotonic_ns(), "kind": kind, "step_id": step_id, "text": text})

    def explicit_tap(self, tensor: torch.Tensor, name: str) -> None:
        """Tap a tensor under a name; what `insitu.tap` calls inside an open step, with its shapes. Raises nothing."""
        if self._observer is not None:
            self._observer.explicit_tap(tensor, name)

    def append(self, table: str, row: Mapping[str, Any]) -> None:
        """Append one row to any table; for rare rows.

        Raises KeyError for an unknown table or column, ValueError, one line, for what is no row, for a value that its
        column cannot take and where one is missing that readers need (`insitu.records.NEEDED`).
        """
        taken = checked(table, row)
        if not self._running:
            self._run()
        self._inlet.put_row(table, taken)

    # -- looking -------------------------------------------------------------------------------------------------

    def sites(self) -> tuple[Site, ...]:
        """Return the resolved sites, in order of execution."""
        return self._observer.sites if self._observer else ()

    def coverage(self) -> Coverage:
        """Return which sites fired in the steps that are over."""
        if not self._closed:
            self.flush(0.0)  # the drain looks at what is finished
        return coverage_of(self._observer)

    def stats(self) -> Stats:
        """Return the session's account; exact once `close` has returned."""
        return stats_of(
            self.source, self._inlet, self._drain, self._outbox, self._exporter, self._flight, self._observer
        )

    def dump(self, why: str) -> str | None:
        """Ship what the flight recorder holds, and what comes in the next seconds; on every rank, through a collector.

        why: told with it. Return the incident; None where the last was asked for less than `Flight.again_after_s` ago,
        and once the session is closed. Any thread. Raises ValueError for what is no text, and nothing else.
        """
        check_text("why", why)
        if self._closed:
            return None
        if not self._running:
            self._run()
        return self._flight.ask(why, self._step_id)

    def dump_on_signal(self) -> None:
        """Listen to the signal that `Flight` names, until `detach`."""
        number = self._asked_flight.signal_number
        if number is not None:
            self.on_detach(on_signal(number, lambda name: self._flight.signalled(name)))

    # -- offline -------------------------------------------------------------------------------------------------

    def collect(
        self, inputs: Iterable[Any], call: Callable[[Any], Any] | None = None, *, timeout_s: float = 60.0
    ) -> Collected:
        """Run the model over inputs and return what the rules took of it; here, and nowhere else, steps wait for room.

        inputs: each is what the model is given: a dictionary by name, a tuple in order, or the one argument. call: what
        to do with each instead (generate, say). A model without a step so far is called with the first input twice.
        Raises TimeoutError where the destination takes nothing for `timeout_s`, ValueError where there is neither a
        model nor a call, and what the model raises.
        """
        from insitu.session.collecting import caller, collect

        seconds("timeout_s", timeout_s)
        if not isinstance(inputs, Iterable):
            raise ValueError(f"inputs: {inputs!r:.80} is no list of inputs; write collect([x]) for one")
        model = None if self._model is None else self._model()
        if call is None and model is None:
            raise ValueError("this session observes no model; say what to do with each input: collect(inputs, call)")
        return collect(self, inputs, call or caller(model), timeout_s)

    @contextmanager
    def waiting(self, wait: Callable[[], None], keep: Callable[[str, Any], None]) -> Iterator[None]:
        """For `collect`: let each step wait, and give `keep` what is shipped, on the drain's thread. Raises nothing."""
        self._wait, self._outbox.keep = wait, keep
        observer = self._observer
        try:
            with observer.overhead.unbounded() if observer is not None else nullcontext():
                yield
        finally:
            self._wait = self._outbox.keep = None

    @property
    def has_room(self) -> bool:
        """Whether a step would find a place for all that it leaves."""
        observer, outbox = self._observer, self._outbox
        needed = self._drain.held_bytes + (observer.waiting_bytes if observer else 0)
        is_free = self._inlet.has_room and (observer is None or observer.has_room)
        is_empty = not outbox.num_bytes and (observer is None or observer.is_read)
        return is_free and (is_empty or outbox.room_bytes >= needed)

    @property
    def next_step(self) -> int:
        """The number of the next step that says none."""
        return self._next_step

    @property
    def is_learning(self) -> bool:
        """True before the first step of a model, which tells how wide rows are."""
        return self._observer is not None and self._observer.current.learning

    # -- ending --------------------------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 5.0) -> FlushReport:
        """Return once everything produced so far is durable, or timeout_s is over; says what is not.

        timeout_s: seconds; inf waits without end. Raises ValueError for what is no number, and nothing else.
        """
        seconds("timeout_s", timeout_s)
        if self._closed:
            return self._report()
        counts = self._drain.flush(timeout_s) if self._running else None
        return FlushReport(*(counts or self._outbox.counts))

    def _report(self) -> FlushReport:
        return FlushReport(*self._outbox.counts)

    def detach(self) -> None:
        """Undo every change to the model. The session goes on without it."""
        self._drain.notices.no_steps.stop()
        self._state = None
        while self._undo:
            self._undo.pop()()
        if self._observer is not None:
            self._observer.taps.remove()

    def close(self, timeout_s: float = 5.0) -> FlushReport:
        """Detach, make everything durable within timeout_s, and let go. Safe to call twice. Raises nothing."""
        if self._closed:
            return self._report()
        self._closed = True
        process.discard(self)
        self.detach()
        self._pauses.remove()
        if not self._running:
            return self._report()
        counts = self._drain.flush(timeout_s, closing=True)
        given_up = self._drain.give_up() if counts is None else self._drain.num_given_up
        if given_up:
            logger.warning("insitu: %d rows were not durable at exit and are counted as dropped", given_up)
        return self._report()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        """Start over in a forked child: the same place in the grid, a new epoch, a thread of its own."""
        self._pauses.remove()
        self.source = self.source.after_fork()
        self._running = False
        if self._observer is not None:
            self._observer.start_over()
        self._assemble(is_child=True)
