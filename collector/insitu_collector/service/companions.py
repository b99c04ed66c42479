"""Processes that run beside a collector: started, started again when they die, stopped with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from insitu_collector.access.children import Child
from insitu_collector.stopping import NICENESS

RESTART_S: Final = 1.0
STOP_S: Final = 8.0
"""More than a session takes to give up what no store takes, so that a judge still gives its account."""
RUN: Final = """
import ctypes, os

prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM: a collector that is killed leaves nothing behind
if os.getppid() == {collector}:  # else it was killed before that
    from insitu.cli import main
    main()
"""
LOOK_S: Final = 0.2

_log = logging.getLogger("insitu")


@dataclass(frozen=True, slots=True)
class Companion:
    """One `insitu` command to keep running."""

    name: str
    """For people."""
    arguments: Sequence[str]
    child: Child
    """How the collector lets it in."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Over that of the collector: a process list shows arguments to everybody, and an address may be a secret."""

    def start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in a terminal reaches the collector, which stops the others in order.
        process = subprocess.Popen(
            [sys.executable, "-c", RUN.format(collector=os.getpid()), *self.arguments],
            env={**os.environ, **self.environment, **self.child.environment},
            pass_fds=self.child.fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process


def keep_running(companions: Sequence[Companion], stop: threading.Event) -> None:
    """Run them all until `stop`; start again what dies."""
    running = {companion.name: companion.start() for companion in companions}
    due: dict[str, float] = {}
    try:
        while not stop.wait(LOOK_S):
            for companion in companions:
                process = running[companion.name]
                if process.poll() is None:
                    continue
                if companion.name not in due:
                    due[companion.name] = time.monotonic() + RESTART_S
                    _log.warning(
                        "insitu: %s ended with status %d; it is started again", companion.name, process.returncode
                    )
                elif time.monotonic() >= due[companion.name]:
                    del due[companion.name]
                    running[companion.name] = companion.start()
    finally:
        _stop(list(running.values()))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + STOP_S
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
