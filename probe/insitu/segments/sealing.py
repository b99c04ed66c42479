"""Sealing what a writer left open: the file itself where only its end is missing, else a copy of what is whole.

Both write no batch anew: messages stay the bytes they are, with columns that this version may not know. Torch-free.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from insitu.segments import disk
from insitu.segments.file import create, publish
from insitu.segments.footer import Block, closing
from insitu.segments.layout import OPEN, SegmentName, is_full, remove
from insitu.segments.message import MAGIC
from insitu.segments.reader import FIRST_MESSAGE, Placed

_START: Final = MAGIC.ljust(FIRST_MESSAGE, b"\0")
_log = logging.getLogger("insitu")


@dataclass(frozen=True, slots=True)
class Remains:
    """What is whole of an open segment."""

    schema_message: bytes
    blocks: list[Block]
    """The batches, in order; at least one."""


def seal_in_place(store: Path, name: SegmentName, remains: Remains) -> bool:
    """Seal an open segment that nobody writes, as it lies there; return whether that could be done.

    It can where its batches follow the schema, and one another, without anything between, and no call of the disk
    fails. A crash leaves it open, with the same batches and a torn tail or none. Raises OSError when the disk is full,
    or the whole file cannot be moved.
    """
    path = name.path(store, OPEN)
    try:
        fd = disk.open(path, os.O_RDWR)
    except PermissionError:  # read-only already, and we are not root
        return False
    try:
        if not _is_contiguous(fd, remains):
            return False
        _finish(fd, remains.blocks[-1].end, closing(remains.schema_message, remains.blocks))
    except OSError as error:
        if is_full(error):
            raise
        # The kernel forgets which pages failed, so a second sync of this file would prove nothing.
        _log.warning("insitu: %s is copied, since it cannot be completed (%s)", name, error)
        return False
    finally:
        disk.close(fd)
    publish(store, name, path)
    return True


def _is_contiguous(fd: int, remains: Remains) -> bool:
    start = _START + remains.schema_message
    ends = [len(start), *(block.end for block in remains.blocks)]
    follows = all(block.offset == end for block, end in zip(remains.blocks, ends, strict=False))
    return bool(remains.schema_message) and follows and disk.pread(fd, len(start), 0) == start


def _finish(fd: int, end: int, tail: bytes) -> None:
    """Have the file end in `tail` behind its last whole batch, durably. What is torn is cut for good first."""
    num_bytes = disk.fstat(fd).st_size
    if num_bytes != end + len(tail) or disk.pread(fd, len(tail), end) != tail:
        if num_bytes > end:
            disk.ftruncate(fd, end)
            disk.fdatasync(fd)
        _write(fd, tail, end)
    disk.fdatasync(fd)
    disk.fchmod(fd, 0o400)


def seal_copy(store: Path, name: SegmentName, schema_message: bytes, batches: Iterable[Placed]) -> None:
    """Write batches of an open segment as a sealed one, by way of a draft that no reader takes for a segment."""
    draft = name.path(store, OPEN).with_suffix(".draft")
    remove(draft)
    fd = create(draft)
    try:
        at = _write(fd, _START + schema_message, 0)
        blocks: list[Block] = []
        for placed in batches:
            blocks.append(replace(placed.block, offset=at))
            at = _write(fd, placed.message, at)
        _write(fd, closing(schema_message, blocks), at)
        disk.fdatasync(fd)
        disk.fchmod(fd, 0o400)
        publish(store, name, draft)
    finally:
        disk.close(fd)
        remove(draft)


def _write(fd: int, data: bytes | memoryview, at: int) -> int:
    """Write all of it, and return where it ends. A disk that becomes full takes a part, and raises at the next call."""
    view = memoryview(data)
    while view:
        num_bytes = disk.pwrite(fd, view, at)
        view, at = view[num_bytes:], at + num_bytes
    return at
