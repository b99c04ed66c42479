"""Queries of strangers, each in a process of its own: what one takes or breaks there, a collector does not feel.

A function may take memory that DuckDB does not account for, and may crash. Such a process has limits that the kernel
keeps, and is killed when its time is over or nobody waits for it any more.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Final, Self

from insitu.segments.erased_file import ErasedUnreadable
from insitu.segments.layout import SegmentName
from insitu.segments.reader import Damage
from insitu.wire.insitu_pb2 import Part
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import end_of
from insitu_collector.query.sql import TOO_MUCH_MEMORY, Limits, QueryFailed, QueryTooLarge
from insitu_collector.query.sql_frames import OUT_OF_MEMORY, STATUS, BrokenFrame, Kind, receive, send_json
from insitu_collector.store import Store

START_S: Final = 60.0
"""Longest until a query begins: imports, and a look at who wrote the store."""
END_S: Final = 5.0
"""Longest wait for a process that was killed, and for one that ended to be told of."""
MOST_LINES: Final = 1000
"""Of what processes said of the store; each is logged once."""
MOST_QUERY: Final = 4 << 20
"""Characters."""
LATE: Final = "took too long; ask for less"
GIVEN_UP: Final = "was given up"
FROM_OUTSIDE: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
"""All that such a process learns of the collector's environment, where tokens may be."""
ENVIRONMENT: Final = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve address space, which is what is limited
    "ARROW_IO_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # who forks has one thread
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_RAISED: Final = {each.__name__: each for each in (QueryTooLarge, BadQuestion, ErasedUnreadable, QueryFailed)}

_log = logging.getLogger("insitu")


class SqlProcesses:
    """Answers the queries of strangers about one store. Safe for several threads; starts nothing before the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._said: set[str] = set()
        self._is_closed = False

    def parts(
        self, store: Store, tenant: str, query: str, limits: Limits, ended: Callable[[Callable[[], None]], None]
    ) -> Generator[Part]:
        """Yield the messages of an answer, its end too; as fast as they are taken.

        tenant: whose rows are seen; empty: all there are. ended: is given what ends the query, to be called when
        nobody waits for it any more. Raises BadQuestion, QueryTooLarge, ErasedUnreadable and QueryFailed.
        """
        if len(query) > MOST_QUERY:
            raise QueryTooLarge(f"a query has at most {MOST_QUERY:,} characters; ask for less at a time")
        with self._forked(limits) as process:
            ended(lambda: process.end(GIVEN_UP))
            process.ask(store=str(store.path.absolute()), tenant=tenant, query=query, limits=asdict(limits))
            for kind, body in process.frames():
                if kind is Kind.PART:
                    yield Part.FromString(body)
                else:
                    yield self._end(store, kind, body)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _end(self, store: Store, kind: Kind, body: bytes) -> Part:
        """Return the end of an answer; log and count what its process found. Raises what it raised."""
        told = json.loads(body)
        self._log_once(told["said"])
        if kind is Kind.FAILED:
            raise _RAISED[told["raised"]](told["text"])
        store.all_damage.update(
            Damage(**{**each, "segment": SegmentName(**each["segment"])}) for each in told["damage"]
        )
        return end_of(told["num_rows"], store.num_damaged)

    def _log_once(self, lines: list[str]) -> None:
        with self._lock:
            fresh = [line for line in dict.fromkeys(lines) if line not in self._said]
            fresh = fresh[: MOST_LINES - len(self._said)]
            self._said.update(fresh)
        for line in fresh:
            _log.warning("%s", line)

    def _forked(self, limits: Limits) -> QueryProcess:
        try:
            with ExitStack() as theirs, ExitStack() as ours:
                pairs = [socket.socketpair() for _ in range(2)]
                mine = [ours.enter_context(each) for each, _ in pairs]
                with self._lock:
                    self._send([theirs.enter_context(each) for _, each in pairs])
                ours.pop_all()
        except OSError as error:
            raise QueryFailed(f"no process is to be had for SQL here ({error}); ask again") from None
        return QueryProcess(mine[0], mine[1], limits)

    def _send(self, sockets: list[socket.socket]) -> None:
        if self._is_closed:
            raise QueryFailed("this collector stops; ask again when it is back")
        if self._control is not None:
            with suppress(OSError):  # whoever forks has ended
                socket.send_fds(self._control, [b"f"], [each.fileno() for each in sockets])
                return
            _log.warning("insitu: the process that forks for SQL had ended; another one is started")
            self._stop()
        self._control = self._start()
        socket.send_fds(self._control, [b"f"], [each.fileno() for each in sockets])

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(each for each in sys.path if each)  # what is found here; not what lies where it starts
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "insitu_collector.query.fork_server"],
                env={**{name: os.environ[name] for name in FROM_OUTSIDE if name in os.environ}, **ENVIRONMENT}
                | {"PYTHONPATH": path},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.kill()  # the kernel kills what it forked
            self._server.wait()
            self._server = None


class QueryProcess:
    """The process of one query, as its collector has it: asked once, read to its end, killed with `with`."""

    def __init__(self, answers: socket.socket, held: socket.socket, limits: Limits) -> None:
        self._answers = answers
        self._held = held
        self._limits = limits
        self._lock = threading.Lock()
        self._is_closed = False
        self._why_ended: str | None = None
        self._timer = self._start_timer(START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.end(GIVEN_UP)
        self._status()  # whoever asks next finds its memory free
        with self._lock:
            self._is_closed = True
            self._answers.close()
            self._held.close()

    def ask(self, **question: object) -> None:
        """Send what is asked."""
        with suppress(OSError):  # it has ended; reading says so
            send_json(self._answers, Kind.QUESTION, **question)

    def end(self, why: str) -> None:
        """Kill the process, from any thread; who reads its answer is told why."""
        with self._lock:
            if self._is_closed:
                return
            self._why_ended = self._why_ended or why
            for each, how in ((self._held, socket.SHUT_WR), (self._answers, socket.SHUT_RDWR)):
                with suppress(OSError):
                    each.shutdown(how)

    def frames(self) -> Iterator[tuple[Kind, bytes]]:
        """Yield what the process sends, up to its last. Raises QueryTooLarge and QueryFailed where that never comes."""
        while True:
            frame = self._receive()
            if frame is None or self._why_ended is not None:
                raise self._error()
            kind, body = frame
            if kind is Kind.BEGUN:
                self._timer.cancel()
                self._timer = self._start_timer(self._limits.seconds)
                continue
            yield kind, body
            if kind is not Kind.PART:
                return

    def _receive(self) -> tuple[Kind, bytes] | None:
        try:
            return receive(self._answers)
        except BrokenFrame as error:
            raise QueryFailed(f"the query's process sent what is no answer ({error}); ask again") from None

    def _start_timer(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self.end, (LATE,))
        timer.daemon = True
        timer.start()
        return timer

    def _error(self) -> Exception:
        if self._why_ended is not None:
            return QueryTooLarge(f"the query {self._why_ended}")
        error = _error_of(self._status())
        _log.warning("insitu: %s", error)
        return error

    def _status(self) -> int | None:
        """Return how the process ended, as `os.waitpid` has it; None where nobody can tell."""
        self._held.settimeout(END_S)
        with suppress(OSError):
            told = self._held.recv(STATUS.size)
            if len(told) == STATUS.size:
                return int(STATUS.unpack(told)[0])
        return None


def _error_of(status: int | None) -> Exception:
    """Return what is to be said of a process that ended without an answer."""
    if status is None:
        return QueryFailed("the process of the query ended with all that ran SQL here; ask again")
    code = os.waitstatus_to_exitcode(status)
    if code == OUT_OF_MEMORY:
        return QueryTooLarge(TOO_MUCH_MEMORY)
    if code == -signal.SIGXCPU:
        return QueryTooLarge(f"the query {LATE}")
    if code == -signal.SIGKILL:
        return QueryTooLarge("the process of the query was killed, as where memory is short; ask for less at a time")
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return QueryFailed(f"the process of the query ended with {how}, and only that; ask in another way")
