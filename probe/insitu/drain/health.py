"""What the kernel knows about this process and host: is it computing, waiting for a core, or being kept from one?

Every reading is cumulative since process (or host) start; None where this kernel does not say.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Final

SEVERAL: Final = 0
"""Instead of a thread's id: steps ran on several threads, so no one thread's counters say what the steps got."""

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _status_number(text: str | None, key: str) -> int | None:
    for line in (text or "").splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return None


def _pressure_ns() -> int | None:
    """Time in which some task of the host waited for a core (PSI)."""
    text = _text("/proc/pressure/cpu")
    if not text:
        return None
    return int(text.splitlines()[0].rpartition("total=")[2]) * 1000


def _throttled_ns() -> int | None:
    """Time this process's cgroup was kept off the cores by its quota."""
    group = (_text("/proc/self/cgroup") or "").strip().rpartition("::")[2].lstrip("/")
    usec = _status_number(_text(f"/sys/fs/cgroup/{group}/cpu.stat"), "throttled_usec")
    return None if usec is None else usec * 1000


def _host_times_ns() -> tuple[int | None, int | None]:
    """Return (busy, stolen) of all cores together; idle and I/O wait are not busy."""
    fields = [int(field) for field in (_text("/proc/stat") or "cpu").splitlines()[0].split()[1:]]
    if len(fields) < 8:
        return None, None
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq) * _TICK_NS, steal * _TICK_NS


def reading(step_thread: int | None) -> dict[str, int | None]:
    """Return the kernel's columns of one `health` row.

    step_thread: the step thread's native id; None: no step ran yet, so that it will be the main thread is assumed;
    `SEVERAL`: the columns of the step thread are null.
    """
    task = f"/proc/self/task/{os.getpid() if step_thread is None else step_thread}"
    times = [int(field) for field in (_text(f"{task}/schedstat") or "0 0 0").split()]
    on_cpu, delay = (None, None) if step_thread == SEVERAL else times[:2]
    pages = (_text("/proc/self/statm") or "0 0").split()[1]
    busy, stolen = _host_times_ns()
    return {
        "t_ns": time.monotonic_ns(),
        "cpu_ns": time.process_time_ns(),
        "step_cpu_ns": on_cpu,
        "run_delay_ns": delay,
        "involuntary_switches": _status_number(_text(f"{task}/status"), "nonvoluntary_ctxt_switches"),
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "rss_bytes": int(pages) * _PAGE_BYTES,
        "throttled_ns": _throttled_ns(),
        "host_busy_ns": busy,
        "host_steal_ns": stolen,
        "host_cores": os.cpu_count(),
        "host_pressure_ns": _pressure_ns(),
    }
