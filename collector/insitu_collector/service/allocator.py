"""How the collector's process gets memory for frames: from what earlier frames gave back."""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
LARGEST_FRAME_BYTES: Final = 32 << 20
"""glibc's own limit of M_MMAP_THRESHOLD, too."""
KEPT_BYTES: Final = 64 << 20
"""Freed memory at the end of a heap that is kept for the next frames."""


def reuse_freed_blocks() -> bool:
    """Let glibc hand out freed blocks again, where it would ask the kernel for each block of a frame's size anew.

    New pages are cleared one by one as they are first written: a third of what a frame of 1 MiB cost the collector.
    Return whether this allocator could be told; any other is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = (mallopt(_M_MMAP_THRESHOLD, LARGEST_FRAME_BYTES), mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
    return all(told)
