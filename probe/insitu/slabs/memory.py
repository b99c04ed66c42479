"""Whether memory for slabs is there: what would take most of it is not made, and what is wanted of it is left off."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import torch

SHARE: Final = 0.5
"""Of the memory that is available: the rest stays the model's."""
MEMINFO = Path("/proc/meminfo")


class NoMemory(ValueError):
    """What slabs would take is not there; the message says how much that is."""


def available_bytes(device: torch.device) -> int:
    """Return how much memory can still be had on a device; more than there is where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return sys.maxsize
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else sys.maxsize


def check_room(what: str, num_bytes: int, device: torch.device) -> None:
    """Raise NoMemory, one line, where so many bytes are more than `SHARE` of what is available."""
    most = int(SHARE * available_bytes(device))
    if num_bytes > most:
        raise NoMemory(f"{what} would take {num_bytes >> 20} MiB of memory, and may take {most >> 20}")
