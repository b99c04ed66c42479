"""How vLLM ends, and that its last rows are sent before it kills.

vLLM's server tells an engine to end and kills it and its ranks at once, its `LLM` does after 5 s. Here whoever starts
engines waits until their sessions are closed, no longer: each holds a lock on a file that the starting process made,
and who dies lets go of it, too.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final

from insitu.vllm.hooks import NotThere, guard, say, wrap

if TYPE_CHECKING:
    from insitu.session.live import Session

LAST_WORDS_S: Final = 2.0
"""For the rows of one process. All of an engine end within 5 s, of which vLLM needs some itself."""
GRACE_S: Final = 5.0
"""How long an engine that would be killed at once is waited for at most: what vLLM leaves it elsewhere."""
POLL_S: Final = 0.02
FILE: Final = "INSITU_CHILD_ENDING"
"""Names the file to the processes of an engine; unset where nobody waits."""


class Ending:
    """The end of one session in a process of an engine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held: int | None = None
        with suppress(KeyError, OSError):  # else nobody waits
            self._held = os.open(os.environ[FILE], os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._held, fcntl.LOCK_SH)

    def close(self) -> None:
        """Close the session. Raises nothing."""
        try:
            self._session.close(LAST_WORDS_S)
            if self._held is not None:
                fcntl.flock(self._held, fcntl.LOCK_UN)  # a forked child may have it open, too
        except Exception as error:
            guard.contain(error)

    def close_beside(self, end: Callable[[], Any]) -> Any:
        """Close the session while something else ends, so that neither waits for the other; return what that does."""
        closing = threading.Thread(target=self.close, name="insitu-ending", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # Python itself ends: there are no new threads
            self.close()
            return end()
        try:
            return end()
        finally:
            closing.join(LAST_WORDS_S)


class Endings:
    """The ends of all sessions of some engines, for the process that starts these."""

    def __init__(self) -> None:
        self._file, self._name = tempfile.mkstemp(prefix="insitu-ending-")
        weakref.finalize(self, _remove, self._file, self._name)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let processes that are started in here know of the file."""
        os.environ[FILE] = self._name
        try:
            yield
        finally:
            os.environ.pop(FILE, None)

    def wait(self, within_s: float) -> bool:
        """Return whether all are closed: once they are, or the time is over."""
        until = time.monotonic() + within_s
        while not (are_closed := self._are_closed()) and time.monotonic() < until:
            time.sleep(POLL_S)
        return are_closed

    def _are_closed(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return True


def _remove(file: int, name: str) -> None:
    os.close(file)
    with suppress(OSError):
        os.unlink(name)


def wait_for_endings() -> None:
    """Let a process that starts engines wait for their sessions before it kills them. Raises NotThere."""
    engines = sys.modules.get("vllm.v1.engine.utils")
    if engines is None:  # this process starts none
        return
    kill = getattr(sys.modules.get("vllm.v1.utils"), "kill_process_tree", None)
    if kill is None:
        raise NotThere("this vLLM has no vllm.v1.utils.kill_process_tree")

    def around_init(init: Callable[..., Any]) -> Callable[..., Any]:
        def start(self: Any, *args: Any, **kwargs: Any) -> None:
            self.insitu = _endings()
            with nullcontext() if self.insitu is None else self.insitu.told():
                init(self, *args, **kwargs)

        return start

    def around_shutdown(shutdown: Callable[..., Any]) -> Callable[..., Any]:
        def shut_down(self: Any, timeout: float | None = None) -> Any:
            endings = getattr(self, "insitu", None)
            # Where requests may finish first (--shutdown-timeout), more time would let them go on.
            is_at_once = timeout == getattr(self, "_request_shutdown_timeout", None) == 0
            if endings is not None and is_at_once:
                _end(self.processes, endings, kill)
            return shutdown(self, timeout)

        return shut_down

    wrap(engines.CoreEngineProcManager, "__init__", (), around_init)
    wrap(engines.CoreEngineProcManager, "shutdown", ("timeout",), around_shutdown)


def _endings() -> Endings | None:
    try:
        return Endings()
    except OSError as error:  # no folder for such files
        say("the last second of engines that are killed: not observed: %s", error)
        return None


def _end(processes: Any, endings: Endings, kill: Callable[[int], None]) -> None:
    """Do as vLLM does, and wait in between. Told once more it would die before its ranks, and nobody kill those."""
    try:
        alive = [each for each in processes if each.is_alive()]
        for each in alive:
            each.terminate()
        if alive:
            endings.wait(GRACE_S)
        for each in alive:
            kill(each.pid)
            each.join(GRACE_S)  # vLLM's own shutdown finds them dead
    except Exception as error:
        guard.contain(error)
