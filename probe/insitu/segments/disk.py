"""Every call that segments make of a file system, so that a test can lay another one under the real code. Torch-free.

Each is the call of `os` of that name, but for the last four. Nothing of a segment is read, written or moved past them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pyarrow as pa

CALLS: Final = (
    *(
        "open",
        "close",
        "fstat",
        "stat",
        "statvfs",
        "listdir",
        "not_files",
        "pread",
        "pwrite",
        "ftruncate",
        "fdatasync",
        "fsync",
    ),
    *("fchmod", "utime", "mkdir", "rmdir", "rename", "unlink", "posix_fallocate", "flock", "sink", "mapped", "buffer"),
)
"""What another file system has to bring."""


def open(path: Path, flags: int, mode: int = 0o600) -> int:
    return os.open(path, flags, mode)


def close(fd: int) -> None:
    os.close(fd)


def fstat(fd: int) -> os.stat_result:
    return os.fstat(fd)


def stat(path: Path) -> os.stat_result:
    return os.stat(path)


def statvfs(path: Path) -> os.statvfs_result:
    return os.statvfs(path)


def listdir(folder: Path) -> list[str]:
    return os.listdir(folder)


def not_files(folder: Path) -> list[str]:
    """Return the names there that open as no file: folders, links to nothing. Only a link costs a call of its own."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not _is_file(entry)]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links that lead to each other
        return False


def pread(fd: int, num_bytes: int, at: int) -> bytes:
    return os.pread(fd, num_bytes, at)


def pwrite(fd: int, data: bytes | memoryview, at: int) -> int:
    return os.pwrite(fd, data, at)


def ftruncate(fd: int, num_bytes: int) -> None:
    os.ftruncate(fd, num_bytes)


def fdatasync(fd: int) -> None:
    os.fdatasync(fd)


def fsync(fd: int) -> None:
    os.fsync(fd)


def fchmod(fd: int, mode: int) -> None:
    os.fchmod(fd, mode)


def utime(fd: int, unix_ns: int) -> None:
    """Say when a file was last written."""
    os.utime(fd, ns=(unix_ns, unix_ns))


def mkdir(folder: Path, mode: int) -> None:
    os.mkdir(folder, mode)


def rmdir(folder: Path) -> None:
    os.rmdir(folder)


def rename(path: Path, target: Path) -> None:
    os.rename(path, target)


def unlink(path: Path) -> None:
    os.unlink(path)


def posix_fallocate(fd: int, at: int, num_bytes: int) -> None:
    os.posix_fallocate(fd, at, num_bytes)


def flock(fd: int) -> None:
    """Take the lock of a file for this descriptor. Raises BlockingIOError when another has it."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sink(path: Path) -> pa.NativeFile:
    """Return an existing file, emptied, to write a segment into; a short write raises OSError."""
    import pyarrow as pa  # whoever only asks where segments lie does without

    return pa.OSFile(str(path), "wb")  # a PythonFile would take a short write for a whole one


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """Yield the bytes of a file that is not empty, and that nobody cuts meanwhile."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view


def buffer(path: Path) -> memoryview:
    """Return the bytes of a file that is not empty and that nobody cuts, mapped for as long as anybody holds them."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
