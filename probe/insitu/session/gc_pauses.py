"""Pauses of Python's cyclic garbage collector, in a ring of their own: one can strike inside an interval write."""

from __future__ import annotations

import gc
from time import monotonic_ns, thread_time_ns
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SHORTEST_NS: Final = 100_000
"""Shorter pauses stay in the interval they struck; the youngest generation is collected many times a second."""
CAPACITY: Final = 4096


class GcPauses:
    """Records (t0_ns, t1_ns, cpu_ns) of every collection in this process, whichever thread it struck.

    A collection holds the interpreter, so the step thread stands still whoever triggered it. cpu_ns: what the thread
    that collected was on a core meanwhile; on a busy host the rest was waiting for one.
    """

    def __init__(self) -> None:
        self._ring = np.zeros((CAPACITY, 3), np.int64)
        self._head = 0
        self._tail = 0
        self._began_ns = 0
        self._began_cpu_ns = 0
        self.num_lost = 0

    def install(self) -> None:
        gc.callbacks.append(self._on_collection)

    def remove(self) -> None:
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)

    def _on_collection(self, when: str, info: dict[str, Any]) -> None:
        now = monotonic_ns()
        if when == "start":
            self._began_ns, self._began_cpu_ns = now, thread_time_ns()
            return
        began, self._began_ns = self._began_ns, 0
        if not began or now - began < SHORTEST_NS:
            return
        if self._head - self._tail >= CAPACITY:
            self.num_lost += 1
            return
        self._ring[self._head % CAPACITY] = began, now, thread_time_ns() - self._began_cpu_ns
        self._head += 1

    def take_until(self, t_ns: int) -> NDArray[np.int64]:
        """Return the pauses that ended by `t_ns`, shape [m, 3], oldest first, and free their places."""
        tail = self._tail
        while tail < self._head and self._ring[tail % CAPACITY, 1] <= t_ns:
            tail += 1
        taken = self._ring[np.arange(self._tail, tail) % CAPACITY]
        self._tail = tail
        return taken
