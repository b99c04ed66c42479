"""A file system in memory that keeps two states of everything: what processes see, and what a power loss leaves.

It stands in for `insitu.segments.disk`. As strict as POSIX allows: bytes are durable after fdatasync, names after an
fsync of their folder; of all else a power loss keeps any part (a write torn at any byte or sector, writes and names
in any order, a file's length without its bytes), drawn from a seed. A rename never loses the file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest
from volatile_nodes import Change, Node, after_a_loss, apply, flush, put

from insitu.segments import disk

BLOCK_BYTES: Final = 4096
FIRST_FD: Final = 1 << 20
"""No descriptor of the real process."""


class Killed(BaseException):
    """The process ends here, as by SIGKILL: nothing may catch this and go on."""


class SimulatedDisk:
    """The calls of `insitu.segments.disk`, of one process that may be killed at any of them."""

    def __init__(self, seed: int, capacity: int = 64 << 20) -> None:
        self.chance = random.Random(seed)
        self.capacity = capacity
        self.now_ns = 10**18
        self.on_call: Callable[[str], None] = lambda _: None
        """Told before and after every call that changes something; may raise OSError or Killed."""
        self.unlinked: list[Path] = []
        self._is_dead = False
        self._num_nodes = 0
        self._root = self._new_node(is_folder=True)
        self._changes: list[Change] = []
        self._open: dict[int, Node] = {}
        self._locks: dict[Node, int] = {}
        self._next_fd = FIRST_FD
        self._used = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Lay this under the real code."""
        for name in disk.CALLS:
            patch.setattr(disk, name, getattr(self, name))

    # -- what a test does to it ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process: its locks are gone, its page cache is not."""
        self._is_dead = False
        self._locks.clear()
        self.on_call = lambda _: None

    def lose_power(self) -> None:
        """Keep what is durable, and any part of what is not."""
        self.kill()
        self._open.clear()
        for change in self._kept_changes():
            apply(change)
        self._changes.clear()
        self._remount(self._root)
        self._used = sum(len(node.data) + node.allocated for node in self._files(self._root))

    def _kept_changes(self) -> list[Change]:
        keep_share = self.chance.choice([0.0, 0.5, 0.9, 1.0])
        kept: list[Change] = []
        dropped: set[tuple[Node, str]] = set()
        for change in self._changes:
            place = (change.folder, change.name)
            is_possible = place not in dropped and (change.after is None or change.after in kept)
            if is_possible and self.chance.random() < keep_share:
                kept.append(change)
            else:
                dropped.add(place)
        return kept

    def _remount(self, folder: Node) -> None:
        folder.names = dict(folder.durable_names)
        for node in folder.names.values():
            if node.is_folder:
                self._remount(node)
            elif node.unsynced or node.data != node.durable:
                node.durable = after_a_loss(node, self.chance)
                node.data, node.unsynced, node.allocated = bytearray(node.durable), [], 0

    def fail_writeback(self, fd: int) -> None:
        """A sync failed: some of the bytes are on disk, all count as clean, and the cache may be dropped."""
        node = self._open[fd]
        node.durable, node.unsynced = after_a_loss(node, self.chance), []
        if self.chance.random() < 0.5:
            node.data = bytearray(node.durable)

    @property
    def free(self) -> int:
        return max(0, self.capacity - self._used)

    def bytes_of(self, path: Path) -> bytes:
        """Return what a process sees of a file."""
        return bytes(self._find(path).data)

    def _files(self, folder: Node) -> Iterator[Node]:
        for node in folder.names.values():
            if node.is_folder:
                yield from self._files(node)
            else:
                yield node

    # -- the calls -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self, label: str) -> Iterator[None]:
        if self._is_dead:
            raise Killed(label)
        try:
            self.on_call(f"before {label}")
            yield
            self.on_call(f"after {label}")
        except Killed:
            self._is_dead = True
            raise

    def _new_node(self, *, is_folder: bool) -> Node:
        self._num_nodes += 1
        return Node(self._num_nodes, is_folder)

    def _find(self, path: Path) -> Node:
        node = self._root
        for part in path.parts[1:]:
            if not node.is_folder:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            if part not in node.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            node = node.names[part]
        return node

    def _set(self, path: Path, node: Node | None, after: Change | None = None) -> Change:
        folder = self._find(path.parent)
        if node is None:
            del folder.names[path.name]
        else:
            folder.names[path.name] = node
        change = Change(folder, path.name, node, after)
        self._changes.append(change)
        return change

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        try:
            node = self._find(path)
            if flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            with self._changing("create"):
                self._room_for(1)
                node = self._new_node(is_folder=False)
                node.mode = mode
                self._set(path, node)
        self._next_fd += 1
        self._open[self._next_fd] = node
        return self._next_fd

    def close(self, fd: int) -> None:
        node = self._open.pop(fd, None)
        if node is not None and self._locks.get(node) == fd:
            del self._locks[node]

    def _stat(self, node: Node) -> os.stat_result:
        kind = stat.S_IFDIR if node.is_folder else stat.S_IFREG
        seconds = node.mtime_ns // 10**9
        shown = (kind | node.mode, node.number, 1, 1, 0, 0, len(node.data), seconds, seconds, seconds)
        return os.stat_result(shown + (float(seconds),) * 3 + (node.mtime_ns,) * 3)

    def fstat(self, fd: int) -> os.stat_result:
        return self._stat(self._open[fd])

    def stat(self, path: Path) -> os.stat_result:
        return self._stat(self._find(path))

    def statvfs(self, path: Path) -> os.statvfs_result:
        self._find(path)
        blocks, free = self.capacity // BLOCK_BYTES, self.free // BLOCK_BYTES
        return os.statvfs_result((BLOCK_BYTES, BLOCK_BYTES, blocks, free, free, 1, 1, 1, 0, 255))

    def not_files(self, folder: Path) -> list[str]:
        return [name for name, node in self._find(folder).names.items() if node.is_folder]

    def listdir(self, folder: Path) -> list[str]:
        node = self._find(folder)
        if not node.is_folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        return list(node.names)

    def pread(self, fd: int, num_bytes: int, at: int) -> bytes:
        return bytes(self._open[fd].data[at : at + num_bytes])

    def pwrite(self, fd: int, data: bytes, at: int) -> int:
        self.write(self._open[fd], data, at)
        return len(data)

    def write(self, node: Node, data: bytes, at: int) -> None:
        """Write all, or what there is room for and raise; any part of it, when the process is killed meanwhile."""
        grows = max(0, at + len(data) - len(node.data))
        room = min(self.free, grows)
        written = data[: len(data) - grows + room]
        try:
            with self._changing("write"):
                self._put(node, written, at)
                if room < grows:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except Killed as killed:
            if str(killed) == "before write":
                self._put(node, written[: self.chance.randint(0, len(written))], at)
            raise

    def _put(self, node: Node, data: bytes, at: int) -> None:
        self._used += max(0, at + len(data) - len(node.data))
        put(node.data, at, data)
        node.unsynced.append((at, bytes(data)))
        node.mtime_ns = self.now_ns

    def ftruncate(self, fd: int, num_bytes: int) -> None:
        with self._changing("truncate"):
            node = self._open[fd]
            self._used -= len(node.data) - num_bytes
            del node.data[num_bytes:]
            node.unsynced.append((num_bytes, None))

    def _sync(self, fd: int) -> None:
        node = self._open[fd]
        flush(node)
        for change in [change for change in self._changes if change.folder is node]:
            self._make_durable(change)

    def _make_durable(self, change: Change) -> None:
        if change.after is not None and change.after in self._changes:
            self._make_durable(change.after)
        apply(change)
        self._changes.remove(change)

    def fdatasync(self, fd: int) -> None:
        try:
            with self._changing("fdatasync"):
                self._sync(fd)
        except OSError:
            self.fail_writeback(fd)
            raise

    def fsync(self, fd: int) -> None:
        with self._changing("fsync folder"):
            self._sync(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        with self._changing("chmod"):
            self._open[fd].mode = mode

    def utime(self, fd: int, unix_ns: int) -> None:
        with self._changing("utime"):
            self._open[fd].mtime_ns = unix_ns

    def mkdir(self, folder: Path, mode: int) -> None:
        with self._changing("mkdir"):
            if folder.name in self._find(folder.parent).names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
            self._set(folder, self._new_node(is_folder=True))

    def rmdir(self, folder: Path) -> None:
        with self._changing("rmdir"):
            if self._find(folder).names:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
            self._set(folder, None)

    def rename(self, path: Path, target: Path) -> None:
        with self._changing("rename"):
            there = self._find(target.parent).names.get(target.name)
            self._used -= 0 if there is None else len(there.data)
            new = self._set(target, self._find(path))
            self._set(path, None, after=new)

    def unlink(self, path: Path) -> None:
        node = self._find(path)
        with self._changing("unlink"):
            self._used -= len(node.data) + node.allocated
            self._set(path, None)
            self.unlinked.append(path)

    def posix_fallocate(self, fd: int, at: int, num_bytes: int) -> None:
        with self._changing("allocate"):
            self._room_for(num_bytes)
            node = self._open[fd]
            self._used += num_bytes - node.allocated
            node.allocated = num_bytes

    def _room_for(self, num_bytes: int) -> None:
        if self.free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flock(self, fd: int) -> None:
        if self._locks.setdefault(self._open[fd], fd) != fd:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    def sink(self, path: Path) -> pa.NativeFile:
        return pa.PythonFile(_Sink(self, self._find(path)), mode="w")

    @contextlib.contextmanager
    def mapped(self, path: Path) -> Iterator[memoryview]:
        yield memoryview(bytes(self._find(path).data))

    def buffer(self, path: Path) -> memoryview:
        return memoryview(self.bytes_of(path))


class _Sink(io.RawIOBase):
    """What pyarrow writes a segment into."""

    def __init__(self, on: SimulatedDisk, node: Node) -> None:
        self._disk, self._node, self._at = on, node, 0

    def write(self, data: Any) -> int:
        self._disk.write(self._node, bytes(data), self._at)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def writable(self) -> bool:
        return True
