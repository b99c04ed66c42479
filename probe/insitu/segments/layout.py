"""Where segments lie in a store, who may write them, and the room kept for a full disk. Torch-free."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from insitu.segments import disk

FORMAT: Final = "v1"
OPEN: Final = "open"
SEALED: Final = "sealed"
QUARANTINE: Final = "quarantine"
STATES: Final = (OPEN, SEALED, QUARANTINE)
REPLACING: Final = "replacing"
"""Folder of notes that say which sealed segments another one takes the place of."""

_FILE_NAME: Final = re.compile(r"(?P<shard>.+)-(?P<number>\d{10})\.(?:arrow|json|parquet)")
_NOT_IN_SHARD: Final = re.compile(r"[^A-Za-z0-9._-]+")
GONE: Final = (FileNotFoundError, NotADirectoryError)
"""What a file is whose store was removed, or has a file in its place."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Key(NamedTuple):
    """Which batch: one of one stream of one process."""

    epoch: int
    stream: int
    seq: int


class StoreFull(OSError):
    """The disk has no room. Nothing of the batch was kept; what was durable stays."""


class StoreGone(OSError):
    """The store's folder was removed, or another is in its place, while it was written. Nothing more is taken."""


class ShardLocked(OSError):
    """Another live process writes this shard."""

    @property
    def holder(self) -> str:
        """Its process id, or `unknown`."""
        with contextlib.suppress(OSError):
            return Path(self.filename).read_text().strip() or "unknown"
        return "unknown"


def is_full(error: OSError) -> bool:
    """Return whether an error says that there is no room (disk, quota or file size limit)."""
    return isinstance(error, StoreFull) or error.errno in _FULL


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """One segment: the same in every state."""

    table: str
    shard: str
    number: int

    def __str__(self) -> str:
        return self.file

    @property
    def file(self) -> str:
        """`<table>/<shard>-<number>.arrow`, as `gaps.file` has it."""
        return f"{self.table}/{self.shard}-{self.number:010}.arrow"

    def path(self, store: Path, state: str) -> Path:
        """Return `STORE/v1/<state>/<table>/<shard>-<number>.arrow`."""
        return store / FORMAT / state / self.file


def shard_name(host: str, pid: int) -> str:
    """Return the shard of a process that writes its own files."""
    return f"{_NOT_IN_SHARD.sub('_', host)}-{pid}"


def list_segments(store: Path, state: str, table: str | None = None) -> list[SegmentName]:
    """Return the segments of a state in order of name; files that are none are left out.

    Of sealed segments and the one that takes their place, only the latter, from the moment it is there.
    """
    named = files_in(store, state, ".arrow", table)
    odd = set(_odd_of(store, state, named))
    found = [name for name in named if name not in odd]
    if state != SEALED:
        return found
    # Notes are read after the files: one that has gone meanwhile took its segments with it.
    there, replaced = set(found), set[SegmentName]()
    for note in files_in(store, REPLACING, ".json", table):
        if note in there:
            replaced.update(replaced_by(store, note))
    return [name for name in found if name not in replaced]


def odd_segments(store: Path, state: str) -> list[SegmentName]:
    """Return what has the name of a segment and is no file, in order of name: `list_segments` leaves it out."""
    return _odd_of(store, state, files_in(store, state, ".arrow"))


def _odd_of(store: Path, state: str, named: list[SegmentName]) -> list[SegmentName]:
    root = store / FORMAT / state
    odd: dict[str, set[str]] = {}
    for table in {name.table for name in named}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            odd[table] = set(disk.not_files(root / table))
    return [name for name in named if name.path(store, state).name in odd.get(name.table, ())]


def files_in(store: Path, folder: str, suffix: str, table: str | None = None) -> list[SegmentName]:
    """Return what `STORE/v1/<folder>/<table>/<shard>-<n><suffix>` there is, in order of name."""
    root = store / FORMAT / folder
    tables = [table] if table is not None else names_in(root)
    found: list[SegmentName] = []
    for name in tables:
        for file in names_in(root / name):
            match = _FILE_NAME.fullmatch(file) if file.endswith(suffix) else None
            if match:
                found.append(SegmentName(name, match["shard"], int(match["number"])))
    return sorted(found)


def replaced_by(store: Path, name: SegmentName) -> list[SegmentName]:
    """Return the segments that a note says `name` takes the place of; none where there is no note any more."""
    try:
        numbers = json.loads(read_file(note_path(store, name)))["replaces"]
    except FileNotFoundError:
        return []
    return [SegmentName(name.table, name.shard, number) for number in numbers]


def note_path(store: Path, name: SegmentName) -> Path:
    """Return `STORE/v1/replacing/<table>/<shard>-<number>.json`."""
    return name.path(store, REPLACING).with_suffix(".json")


def first_free_number(store: Path, shard: str) -> int:
    """Return the number of a shard's next segment: higher than any it ever had. The caller holds its lock."""
    files = [name for state in STATES for name in files_in(store, state, ".arrow")]
    files += files_in(store, REPLACING, ".json")
    numbers = [name.number for name in files if name.shard == shard]
    return 1 + max([*numbers, *(number for _, number in _kept_numbers(store, shard))], default=-1)


def keep_number(store: Path, shard: str) -> None:
    """Write down the highest number of a shard all of whose segments may now go. The caller holds its lock.

    An empty file whose name says it: there is room for that on a full disk.
    """
    earlier = [path for path, _ in _kept_numbers(store, shard)]
    path = store / FORMAT / f"{shard}-{first_free_number(store, shard) - 1:010}.last"
    disk.close(disk.open(path, os.O_CREAT | os.O_RDWR))
    sync_folder(path.parent)
    for other in earlier:
        if other != path:
            remove(other)


def _kept_numbers(store: Path, shard: str) -> list[tuple[Path, int]]:
    found = re.compile(re.escape(shard) + r"-(\d{10})\.last")
    names = [match for name in names_in(store / FORMAT) if (match := found.fullmatch(name))]
    return [(store / FORMAT / match[0], int(match[1])) for match in names]


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none where there is no folder."""
    try:
        return disk.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder of the store where there is none, and make its name durable."""
    if not is_there(folder):
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(folder, 0o700)
        try:
            sync_folder(folder.parent)
        except OSError:  # there, it would be taken for durable
            with contextlib.suppress(OSError):
                disk.rmdir(folder)
            raise


def sync_names(store: Path) -> None:
    """Make all names in a store durable: who wrote before may have died between changing one and its sync."""
    for state in STATES:
        folder = store / FORMAT / state
        for name in names_in(folder):
            with contextlib.suppress(NotADirectoryError):
                sync_folder(folder / name)
        if is_there(folder):
            sync_folder(folder)
    sync_folder(store / FORMAT)
    sync_folder(store)
    with contextlib.suppress(PermissionError):  # where the store lies may be another's
        sync_folder(store.parent)


def is_there(path: Path) -> bool:
    """Return whether there is a file or folder of this name."""
    try:
        disk.stat(path)
    except FileNotFoundError:
        return False
    return True


def remove(path: Path) -> None:
    """Unlink a file, if it is there."""
    with contextlib.suppress(*GONE):
        disk.unlink(path)


def read_file(path: Path) -> bytes:
    """Return all of a small file. Raises FileNotFoundError."""
    fd = disk.open(path, os.O_RDONLY)
    try:
        return disk.pread(fd, disk.fstat(fd).st_size, 0)
    finally:
        disk.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file durably: after a crash there is the old one or the new."""
    make_folder(path.parent)
    draft = path.with_name(f"{path.name}.draft")
    fd = disk.open(draft, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    try:
        disk.pwrite(fd, data, 0)
        disk.fdatasync(fd)
    finally:
        disk.close(fd)
    disk.rename(draft, path)
    sync_folder(path.parent)


def free_bytes(folder: Path) -> int:
    """Return the bytes an ordinary user may still write where `folder` lies."""
    room = disk.statvfs(folder)
    return room.f_bavail * room.f_frsize


def is_read_only(folder: Path) -> bool:
    """Return whether `folder` lies in a file system that takes no writes."""
    return bool(disk.statvfs(folder).f_flag & os.ST_RDONLY)


class ShardLock:
    """`STORE/v1/<shard>.lock`, held by flock for the life of a writer.

    Raises ShardLocked when another process holds it, OSError when the store cannot be written.
    """

    def __init__(self, store: Path, shard: str) -> None:
        self.path = store / FORMAT / f"{shard}.lock"
        make_folder(self.path.parent)
        self._fd: int | None = None
        while self._fd is None:
            self._fd = self._try()
        with contextlib.suppress(OSError):  # a full disk holds the lock all the same
            disk.ftruncate(self._fd, 0)
            disk.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        _HELD.add(self)

    def _try(self) -> int | None:
        """Return a locked descriptor, or None when the file was unlinked under us and it must be made anew."""
        fd = disk.open(self.path, os.O_CREAT | os.O_RDWR)
        try:
            disk.flock(fd)
        except BlockingIOError:
            holder = disk.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            disk.close(fd)
            shard = self.path.stem
            raise ShardLocked(
                errno.EWOULDBLOCK, f"process {holder} already writes shard {shard!r} of this store", str(self.path)
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(disk.fstat(fd), disk.stat(self.path)):
                return fd
        disk.close(fd)
        return None

    def has_gone(self) -> bool:
        """Return whether the file is no longer the one that is held: its store was removed, or replaced.

        False where a disk does not say: what is written there will.
        """
        if self._fd is None:
            return False
        try:
            return not os.path.samestat(disk.fstat(self._fd), disk.stat(self.path))
        except OSError as error:
            return isinstance(error, GONE)

    def release(self) -> None:
        """Let go and remove the file, unless it is another's meanwhile. Safe to call twice."""
        if self._fd is not None:
            try:
                if not self.has_gone():
                    remove(self.path)
            finally:
                disk.close(self._fd)
                self._fd = None
        _HELD.discard(self)

    def forget(self) -> None:
        """Close the descriptor only: what a forked child does, so that it cannot outlive the holder's lock."""
        if self._fd is not None:
            disk.close(self._fd)
            self._fd = None


def is_in_use(store: Path, shard: str) -> bool:
    """Return whether a process holds a shard, or may: its lock is another's. Writes nothing."""
    try:
        fd = disk.open(store / FORMAT / f"{shard}.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    try:
        disk.flock(fd)
    except BlockingIOError:
        return True
    finally:
        disk.close(fd)
    return False


_HELD: weakref.WeakSet[ShardLock] = weakref.WeakSet()


def _forget_locks_of_parent() -> None:
    for lock in list(_HELD):
        lock.forget()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks_of_parent)


class Reserve:
    """`STORE/v1/<shard>.reserve`: room that is given back at ENOSPC, so that open files can still be sealed.

    While it is not held, the shard takes no batches.
    """

    def __init__(self, store: Path, shard: str) -> None:
        self._path = store / FORMAT / f"{shard}.reserve"
        room = disk.statvfs(self._path.parent)
        self.num_bytes = min(4 << 20, max(64 << 10, room.f_blocks * room.f_frsize // 16))
        remove(self._path)
        self.held = False

    def take(self, spare_bytes: int) -> bool:
        """Take the room if as much again and `spare_bytes` stay free; return whether it is held."""
        if not self.held and free_bytes(self._path.parent) >= 2 * self.num_bytes + spare_bytes:
            self.held = self._allocate()
        return self.held

    def _allocate(self) -> bool:
        try:
            fd = disk.open(self._path, os.O_CREAT | os.O_RDWR)
            try:
                disk.posix_fallocate(fd, 0, self.num_bytes)
            finally:
                disk.close(fd)
        except OSError as error:
            remove(self._path)
            if not is_full(error):
                raise
            return False
        return True

    def release(self) -> None:
        """Give the room back. Safe to call twice."""
        remove(self._path)
        self.held = False
