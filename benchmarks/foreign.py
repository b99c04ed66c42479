"""How much of the cores other processes take while something is measured."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def tree_cpu_s() -> float:
    """Return the CPU-seconds of this process and all that it started, those that have ended included."""
    spent = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:4])  # user, system, and both of children that were waited for
    return spent


class Foreign:
    """How much of the cores others take while a block runs."""

    def __enter__(self) -> Foreign:
        self._begun = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, ours = (after - before for after, before in zip(self._now(), self._begun, strict=True))
        self.share = max(0.0, (busy - ours) / wall / (os.cpu_count() or 1))

    def _now(self) -> tuple[float, float, float]:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return time.monotonic(), (sum(fields) - fields[3] - fields[4]) / _TICKS, tree_cpu_s()
