"""Writing one segment file. Torch-free; `insitu.segments` decides when."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.identity import package_version
from insitu.records import VERSION, TableSpec
from insitu.segments import disk
from insitu.segments.layout import OPEN, SEALED, Key, SegmentName, make_folder, remove, sync_folder


@dataclass(frozen=True, slots=True)
class Limits:
    """When an open segment is sealed."""

    max_bytes: int = 128 << 20
    max_age_s: float = 60.0
    max_idle_s: float = 10.0


class OpenSegment:
    """One file being written. After an OSError of `append` or `seal` only `sync` and `close` may be called."""

    def __init__(self, store: Path, name: SegmentName, spec: TableSpec, now: float) -> None:
        self.name = name
        self.opened_at = self.appended_at = now
        self.unsynced: list[Key] = []
        """Appended since the last sync; whoever syncs takes the list."""
        self.num_bytes = 0
        self.epochs: set[int] = set()
        """Whose rows it holds."""
        self._store = store
        self._path = name.path(store, OPEN)
        self._is_named = False
        self._synced_bytes = 0
        self._fd = create(self._path)
        try:
            self._sink = disk.sink(self._path)
            self._writer = pa.ipc.new_file(self._sink, file_schema(name, spec))
        except OSError:
            self.close()
            remove(self._path)
            raise

    def append(self, batch: Batch, now: float) -> None:
        self._writer.write_batch(batch.data, custom_metadata=batch_metadata(batch))
        self.unsynced.append(Key(batch.epoch, batch.stream, batch.seq))
        self.epochs.add(batch.epoch)
        self.num_bytes = self._sink.tell()
        self.appended_at = now

    def is_due(self, now: float, limits: Limits) -> bool:
        """Return whether it is time to seal."""
        return (
            self.num_bytes >= limits.max_bytes
            or now - self.opened_at >= limits.max_age_s
            or now - self.appended_at >= limits.max_idle_s
        )

    def sync(self) -> None:
        """Put every whole batch on disk, and the file's name with the first of them."""
        num_bytes = self.num_bytes
        disk.fdatasync(self._fd)
        if not self._is_named:
            sync_folder(self._path.parent)
            self._is_named = True
        self._synced_bytes = num_bytes

    def cut_unsynced(self) -> None:
        """Take away what no sync has reached, after one that failed.

        The kernel forgets which pages failed and shows them as written, so nobody could tell later what is on disk.
        """
        with contextlib.suppress(OSError):
            disk.ftruncate(self._fd, self._synced_bytes)

    def seal(self) -> None:
        """Write the footer, make the file read-only and move it to `sealed`."""
        self._writer.close()
        self._sink.close()
        disk.fdatasync(self._fd)
        disk.fchmod(self._fd, 0o400)
        publish(self._store, self.name, self._path)
        self.close()

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Let go of the file as it is. Safe to call twice."""
        if self._fd >= 0:
            disk.close(self._fd)
            self._fd = -1


def publish(store: Path, name: SegmentName, path: Path) -> None:
    """Move a finished file to `sealed` so that the move survives a power loss."""
    target = name.path(store, SEALED)
    make_folder(target.parent)
    disk.rename(path, target)
    sync_folder(target.parent)
    sync_folder(path.parent)


def file_schema(name: SegmentName, spec: TableSpec) -> pa.Schema:
    """Return the table's schema with what a file says of itself."""
    return spec.schema.with_metadata(
        {
            "insitu.table": name.table,
            "insitu.version": VERSION,
            "insitu.writer": f"insitu {package_version()} {name.shard}",
        }
    )


def batch_metadata(batch: Batch) -> dict[str, str]:
    """Return the custom metadata of one batch."""
    return {
        "epoch": str(batch.epoch),
        "stream": str(batch.stream),
        "seq": str(batch.seq),
        "crc32": str(batch.crc32),
    }


def create(path: Path) -> int:
    """Create a file and return a descriptor to sync it by.

    Opened before the first write, so that the kernel reports this file's write-back errors to it.
    """
    make_folder(path.parent)
    return disk.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
