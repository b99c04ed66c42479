"""The rig of the collector's benchmark: an `insitu collect` to measure, what it uses, and the raw disk beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overhead_rig import cpu_of

from insitu_engine.processes import Child, Children

READY_S: Final = 600.0
"""Recovery of gigabytes is within it."""
GROUP_BYTES: Final = 8 << 20
"""The collector's group commit, and that of the raw disk beside it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process, in MiB."""

    now_mib: float
    peak_mib: float


class Collector:
    """A running `insitu collect`."""

    def __init__(self, child: Child, address: str) -> None:
        self.address = address
        """HOST:PORT."""
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def cpu_s(self) -> float:
        """Return its CPU-seconds so far."""
        return cpu_of(self.pid)

    def memory(self) -> Memory:
        status = Path(f"/proc/{self.pid}/status").read_text()
        now, peak = (int(status.partition(f"{key}:")[2].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
        return Memory(now, peak)

    def kill(self) -> None:
        """End it as a crash would, and wait until it is gone."""
        self._child.process.kill()
        self._child.process.wait()


@contextmanager
def collecting(store: Path, *options: str) -> Iterator[Collector]:
    """Run `insitu collect` on a store that keeps everything, for as long as the context lasts. Raises ChildFailed."""
    with Children() as children:
        keep = ("--keep-bytes", "none", "--keep-for", "none")
        child = children.start("insitu collect", ["collect", "--store", str(store), "--port", "0", *keep, *options])
        found = child.wait_for_line(r"collecting on grpc://(\S+) into", READY_S, children.interrupted)
        yield Collector(child, found[1])


class RawDisk:
    """Writes to files of its own, synced a group at a time: what the disk takes without anything in between."""

    def __init__(self, folder: Path, block: bytes) -> None:
        self._folder = folder
        self._block = block
        self._number = 0

    def write(self, num_bytes: int) -> None:
        """Write so many bytes into a new file, until they are durable."""
        fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            unsynced = 0
            for _ in range(num_bytes // len(self._block)):
                _write_all(fd, self._block)
                unsynced += len(self._block)
                if unsynced >= GROUP_BYTES:
                    os.fdatasync(fd)
                    unsynced = 0
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Remove what was written, outside the clock."""
        self._path.unlink(missing_ok=True)
        self._number += 1

    @property
    def _path(self) -> Path:
        return self._folder / f"raw-{self._number}"


def _write_all(fd: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(fd, view) :]
