"""A step from its beginning to its end, as the step thread goes through it. The hot path, beside the taps."""

from __future__ import annotations

import time
from threading import get_ident, get_native_id
from types import TracebackType
from typing import TYPE_CHECKING

from insitu.session.step import StepRecord

if TYPE_CHECKING:
    from insitu.session.live import Session


class Step:
    """An open step; a context manager. It opens and closes what its session has, as nobody else may."""

    __slots__ = ("_began_ns", "_session", "is_observed", "record")

    def __init__(self, session: Session, record: StepRecord) -> None:
        self._session = session
        self.record = record
        self._began_ns = 0
        self.is_observed = False
        """Inside the block: whether this is the session's open step; False where another thread's is."""

    @property
    def step_id(self) -> int:
        """Its number."""
        return self.record.step_id

    def __enter__(self) -> Step:
        began = time.monotonic_ns()
        self.is_observed = self._begin()
        if self.is_observed:
            self._began_ns = time.monotonic_ns()
            self._session._inlet.enter_ns += self._began_ns - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        ended = time.monotonic_ns()
        self.record.t1_ns = ended
        if not self._end():
            return
        if kind is not None:
            self._session._flight.note_exception(kind, self.record)
        inlet = self._session._inlet
        inlet.step_ns += ended - self._began_ns
        inlet.enter_ns += time.monotonic_ns() - ended

    def _begin(self) -> bool:
        """Open the step if none is; return whether it is observed. The gate makes sure of it, whoever calls when."""
        session, record = self._session, self.record
        if session._wait is not None:
            session._wait()
        if not session._running:
            session._run()
        if not session._gate.acquire(blocking=False):
            session._inlet.count_concurrent()
            return False
        session._open = record
        session._open_thread = get_ident()
        session._step_id = record.step_id
        session._recorder.follow(session._open_thread)
        session._inlet.note_thread(get_native_id())
        session._traces.note(record)
        observer = session._observer
        if observer is not None and not observer.guard.num_errors:
            try:
                observer.begin(record)
            except Exception as error:
                observer.silence()
                observer.guard.contain(error)
        return True

    def _finish(self) -> None:
        """Take what waits for the end of an open step: part of what the step costs, not of what is around it."""
        observer = self._session._observer
        if observer is not None and self._session._open is self.record:
            try:
                observer.finish()
            except Exception as error:
                observer.silence()
                observer.guard.contain(error)

    def _end(self) -> bool:
        """Close the step if it is open; return whether it was. One that was open at a fork is the parent's alone."""
        session = self._session
        if session._open is not self.record:
            return False
        try:
            self._hand_over()
        finally:
            session._open = None
            session._open_thread = 0
            session._gate.release()
        return True

    def _hand_over(self) -> None:
        session, record = self._session, self.record
        observer = session._observer
        if observer is not None:
            try:
                observer.end(record)
            except Exception as error:
                observer.silence()
                observer.guard.contain(error)
            rows, statistics, plugged = observer.row_slabs, observer.statistic_slabs, observer.plugged
            if (
                observer.slabs.ring.is_filling
                or (rows and rows.is_filling)
                or (statistics and statistics.ring.is_filling)
                or (plugged and plugged.ring.is_filling)
            ):
                session._drain.wake()
        session._inlet.put_step(record)
