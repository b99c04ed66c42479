"""Freed blocks of a frame's size are used again, and not asked of the kernel each time."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from insitu_collector.service.allocator import reuse_freed_blocks

if sys.argv[1] == "told":
    assert reuse_freed_blocks()

def a_window_of_frames():
    return [bytearray(b"x") * (1 << 20) for _ in range(16)]

for _ in range(3):
    a_window_of_frames()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    a_window_of_frames()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 16 * 256
"""Of ten windows of sixteen frames of 1 MiB."""


def faults(how: str) -> int:
    """Return how many pages a fresh process had to be given anew for ten windows of frames."""
    ran = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_pages_of_freed_frames_are_used_again() -> None:
    assert faults("as it is") > PAGES / 2, "without it, nearly every page is new"
    assert faults("told") < PAGES / 20
