"""How much memory this process has, and giving back what it does not need."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return this process's resident memory; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def give_back() -> None:
    """Let the allocator return what it holds and nobody uses."""
    pa.default_memory_pool().release_unused()
