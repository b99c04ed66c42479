"""Child processes that cannot be left behind: each in a process group of its own, stopped in order, then killed.

Signals only set a flag, which every wait here looks at; so no interrupt can fall between the birth of a process
and the moment it is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Thread
from types import FrameType, TracebackType
from typing import IO, Any, Final

KEPT_LINES: Final = 200
POLL_S: Final = 0.1
"""How soon a signal is noticed."""
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)


class Flag:
    """What a signal handler may set, whatever it interrupts; a wait for it looks every `POLL_S`.

    A `threading.Event` has a lock. The main thread may hold it when a signal comes, and would then wait for itself.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Return once it is set, or timeout_s is over; say whether it is set."""
        deadline = time.monotonic() + timeout_s
        while not self._is_set and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(left_s, POLL_S))
        return self._is_set


class Interrupted(Exception):
    """Somebody asked the whole to stop (Ctrl-C, SIGTERM, SIGHUP)."""


class ChildFailed(Exception):
    """A child ended, or said nothing in time, before it did what was waited for. The message is one line."""


class Child:
    """One `insitu ...` subprocess, its last lines of stdout and stderr, and what happens to each new one."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        on_stderr: Callable[[str], None] | None = None,
        vital: bool = True,
    ) -> None:
        self.name = name
        self.vital = vital
        """Whether the whole fails when this child ends by itself."""
        self.stdout: deque[str] = deque(maxlen=KEPT_LINES)
        self.stderr: deque[str] = deque(maxlen=KEPT_LINES)
        self._news = Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "insitu", *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self.process.stdout is not None and self.process.stderr is not None, "both are pipes"
        self._readers = [
            self._reader(self.process.stdout, self.stdout, None),
            self._reader(self.process.stderr, self.stderr, on_stderr),
        ]

    def _reader(self, stream: IO[str], lines: deque[str], on_line: Callable[[str], None] | None) -> Thread:
        def read() -> None:
            with stream:
                for line in stream:
                    with self._news:
                        lines.append(line.rstrip("\n"))
                        self._news.notify_all()
                    if on_line is not None:
                        on_line(line.rstrip("\n"))

        thread = Thread(target=read, name=f"read {self.name}", daemon=True)
        thread.start()
        return thread

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_for_line(self, pattern: str, timeout_s: float, interrupted: Flag) -> re.Match[str]:
        """Return the match of the first stderr line that has `pattern`. Raises ChildFailed or Interrupted."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in list(self.stderr):
                if found := re.search(pattern, line):
                    return found
            if interrupted.is_set():
                raise Interrupted
            if self.ended:
                raise self.failure()
            if time.monotonic() > deadline:
                raise ChildFailed(f"{self.name} said nothing of being ready within {timeout_s:.0f} s{self._last()}")
            with self._news:
                self._news.wait(POLL_S)

    def failure(self) -> ChildFailed:
        """Return what to say about a child that ended too early: its name and its last line of stderr."""
        self.join()
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
        return ChildFailed(f"{self.name} {how}{self._last()}")

    def _last(self) -> str:
        said = next((line.strip() for line in reversed(self.stderr) if line.strip()), "")
        return f": {re.sub(r'^(Error|insitu( [a-z]+)?): ', '', said)}" if said else ""

    def join(self, timeout_s: float = 2.0) -> None:
        """Wait until everything an ended child printed has been read."""
        for reader in self._readers:
            reader.join(timeout_s)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Signal the child, or its whole group; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


class Children:
    """A context that starts children and, however it is left, ends all of them: asked first, killed at a deadline."""

    def __init__(self) -> None:
        self.interrupted = Flag()
        self._hurry = Flag()
        self._children: list[Child] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted.is_set():
            self._hurry.set()
        self.interrupted.set()

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_stderr: Callable[[str], None] | None = None,
        vital: bool = True,
    ) -> Child:
        """Start `insitu ARGUMENTS` in a process group of its own. Raises Interrupted."""
        if self.interrupted.is_set():
            raise Interrupted
        child = Child(name, arguments, environment or {}, on_stderr, vital)
        self._children.append(child)
        return child

    def check(self, *may_end: Child) -> None:
        """Raise Interrupted or ChildFailed when it is time to stop: any vital child but `may_end` must be running."""
        if self.interrupted.is_set():
            raise Interrupted
        for child in self._children:
            if child.vital and child.ended and not (child in may_end and child.process.returncode == 0):
                raise child.failure()

    def stop(self, child: Child, deadline_s: float) -> bool:
        """End one child by SIGTERM, then its whole group by SIGKILL. Return whether it ended by itself, with 0."""
        asked = time.monotonic()
        child.signal(signal.SIGTERM)
        while not child.ended and time.monotonic() - asked < deadline_s and not self._hurry.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(POLL_S)
        clean = child.process.poll() == 0
        child.signal(signal.SIGKILL, group=True)  # what the child itself had started and left
        child.process.wait()
        child.join()
        if child in self._children:
            self._children.remove(child)
        return clean

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(list(self._children)):
            self.stop(child, deadline_s=10.0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask the kernel to end this child when the parent is killed without a chance to end it. After fork only."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
