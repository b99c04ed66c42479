"""Whether memory for slabs is there: what would take most of it is not made, and what is wanted of it is left off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

SHARE: Final = 0.5
"""Of the memory that is available: the rest stays the model's."""
ROOT = Path("/")
"""Where the kernel's `proc` and `sys` are."""


class NoMemory(ValueError):
    """What slabs would take is not there; the message says how much that is."""


@dataclass(frozen=True, slots=True)
class _Cgroups:
    """Where a version of cgroups says what a group may have and has, in bytes."""

    folder: str
    limit: str
    usage: str
    inactive: str
    """In `memory.stat`: what files have of that and the kernel takes back first."""


_V1: Final = _Cgroups("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: Final = _Cgroups("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_bytes(device: torch.device, root: Path | None = None) -> int:
    """Return how much memory can still be had on a device; more than there is where nobody says.

    Of the host it is the least of what the machine and the cgroups of this process leave, as files below `root` say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    root = ROOT if root is None else root
    kib = _number(_text(root / "proc/meminfo"), "MemAvailable:")
    machine = sys.maxsize if kib is None else kib << 10
    return min((machine, *_cgroups_leave(root)))


def check_room(what: str, num_bytes: int, device: torch.device, root: Path | None = None) -> None:
    """Raise NoMemory, one line, where so many bytes are more than `SHARE` of what is available."""
    most = int(SHARE * available_bytes(device, root))
    if num_bytes > most:
        raise NoMemory(f"{what} would take {num_bytes >> 20} MiB of memory, and may take {most >> 20}")


def _cgroups_leave(root: Path) -> Iterator[int]:
    """Yield what the process's own cgroup and each around it leave, of those that have a limit.

    A container that sees its group as the root may be told the name that it has outside: what is not there is passed.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        kind, group = _V1 if controllers else _V2, Path(path.lstrip("/"))
        if ".." in group.parts:  # it lies outside of what is mounted
            group = Path()
        for each in (group, *group.parents):
            if (left := _left(root / kind.folder / each, kind)) is not None:
                yield left


def _left(group: Path, kind: _Cgroups) -> int | None:
    limit, usage = _whole(_text(group / kind.limit)), _whole(_text(group / kind.usage))
    if limit is None or usage is None:
        return None
    inactive = _number(_text(group / "memory.stat"), kind.inactive) or 0
    return max(0, limit - max(0, usage - inactive))


def _number(text: str, name: str) -> int | None:
    """Return the number on the line that begins with a name."""
    lines = (line.split() for line in text.splitlines())
    return next((_whole(words[1]) for words in lines if words[:1] == [name] and len(words) > 1), None)


def _whole(text: str) -> int | None:
    """Return a number of bytes; None for `max` and what is none."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""
