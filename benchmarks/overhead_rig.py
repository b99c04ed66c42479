"""The rig of the price: a collector with its judge, and the clocks of everything that runs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

from insitu.segments.layout import FORMAT
from insitu.vocabulary import Role
from insitu_collector.store import open_store
from insitu_engine.processes import Children

READY_S: Final = 60.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Helpers:
    """The processes beside the step's own."""

    address: str
    collector: int
    judge: int


@contextmanager
def collecting(store: Path) -> Iterator[Helpers]:
    """Run `insitu collect --judge` on a store for as long as the context lasts. Raises ChildFailed."""
    with Children() as children:
        arguments = ["collect", "--store", str(store), "--port", "0", "--judge"]
        child = children.start("insitu collect", arguments)
        found = child.wait_for_line(r"collecting on (\S+) into", READY_S, children.interrupted)
        yield Helpers(found[1], child.process.pid, _judge_of(store, child.process.pid))
        children.check()


def _judge_of(store: Path, collector: int) -> int:
    """Return the judge's process id once its first row is durable: from then on it judges."""
    pause, deadline = Event(), time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if (store / FORMAT).is_dir():
            for row in open_store(store).table("sources").select(["role", "pid"]).to_pylist():
                if row["role"] == Role.CLIENT and row["pid"] != collector:
                    return int(row["pid"])
        pause.wait(0.1)
    raise TimeoutError(f"the judge of {store} has not begun within {READY_S:.0f} s")


def cpu_of(pid: int) -> float:
    """Return the CPU-seconds of a process, all threads that ever were, to the nanosecond."""
    return time.clock_gettime(~pid << 3 | 2)


def host_busy_s() -> float:
    """Return the CPU-seconds of all cores since boot: everything but idle, waiting for disks, and stolen."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(words[place]) for place in (0, 1, 2, 5, 6)) / _TICKS


class Foreign:
    """How much of the cores others took, over all stretches that were watched."""

    def __init__(self, helpers: Helpers) -> None:
        self._pids = (helpers.collector, helpers.judge)
        self._others_s = 0.0
        self._wall_s = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        began, busy, ours = time.monotonic(), host_busy_s(), self._ours_s()
        yield
        self._others_s += (host_busy_s() - busy) - (self._ours_s() - ours)
        self._wall_s += time.monotonic() - began

    def _ours_s(self) -> float:
        return time.process_time() + sum(map(cpu_of, self._pids))

    @property
    def share(self) -> float:
        cores = os.cpu_count() or 1
        return max(0.0, self._others_s / self._wall_s / cores) if self._wall_s else 0.0


def cpu_model() -> str:
    """Return what the kernel calls this machine's processor."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else "unknown processor"
