"""Forks a process for each query of a stranger. It imports once, and holds no store, no secret and no thread.

A collector runs it as `python -m insitu_collector.query.fork_server`, with a socket as fd 0. Each byte on that brings
two sockets more. One is for the new process, which is asked and answers there. The other one stays here: when the
collector shuts it down the process is killed, and on it goes how the process ended (as `os.waitpid` has it). It ends
when the collector does, and takes the others with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from insitu_collector.query.sql_child import answer
from insitu_collector.query.sql_frames import OUT_OF_MEMORY, STATUS
from insitu_collector.stopping import NICENESS

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


class ForkServer:
    """Forks at each byte on a socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wake, wake = os.pipe()
        for end in (self._wake, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self._children: dict[int, int] = {}
        """By the socket of each that stays here: its process."""
        self._poll = select.poll()
        for fd in (control.fileno(), self._wake):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Serve until the collector has gone."""
        while True:
            ready = {fd for fd, _ in self._poll.poll()}
            for fd in ready & self._children.keys():
                self._poll.unregister(fd)
                os.kill(self._children[fd], signal.SIGKILL)
            if self._wake in ready:
                self._reap()
            if self._control.fileno() in ready and not self._fork():  # last: numbers of files are used again
                return

    def _fork(self) -> bool:
        """Fork for the next query; return whether there may be more."""
        asked, sockets, _, _ = socket.recv_fds(self._control, 1, 2)
        if not asked:
            return False
        parent, child = os.getpid(), None
        with suppress(OSError):  # no process is to be had: the collector finds both sockets closed
            child = os.fork() if len(sockets) == 2 else None
        if child == 0:
            _serve(sockets[0], parent)
        for fd in sockets[: 2 if child is None else 1]:
            os.close(fd)
        if child is not None:
            self._children[sockets[1]] = child
            self._poll.register(sockets[1], select.POLLIN)
        return True

    def _reap(self) -> None:
        os.read(self._wake, 1024)
        for fd, child in list(self._children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with suppress(OSError):  # nobody asks any more
                    os.write(fd, STATUS.pack(status))
                with suppress(KeyError):
                    self._poll.unregister(fd)
                del self._children[fd]
                os.close(fd)


def _serve(socket_fd: int, parent: int) -> NoReturn:
    """Answer one question in a new process, and end it."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _end_with(parent)
        os.dup2(socket_fd, 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the sockets of others
        answer(socket.socket(fileno=0))
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    except BrokenPipeError:  # the collector wants no more of it
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the one that forked it ends."""
    prctl = getattr(_LIBC, "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def give_way() -> None:
    """Let the kernel end this process, and what it forks, before others when memory is short; leave no core."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # no /proc, or not ours to say
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    give_way()
    gc.freeze()  # what was imported is not touched, so it stays one copy for all
    ForkServer(socket.socket(fileno=0)).run()
    os._exit(0)  # nothing is to be put in order, and DuckDB's bindings would tell of what they did not
