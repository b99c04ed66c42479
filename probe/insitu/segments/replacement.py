"""One sealed segment takes the place of others: old or new is there at each moment, never both, never neither.

What makes it so is one rename. Before it a note says what the new segment replaces; readers who find note and segment
leave out what it names (`list_segments`). Then the old files are unlinked, and whoever still reads them goes on
undisturbed; last the note goes. A crash in between is finished by the next who has the shard. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import pyarrow as pa

from insitu.segments import disk
from insitu.segments.file import create, publish
from insitu.segments.layout import (
    OPEN,
    QUARANTINE,
    REPLACING,
    SEALED,
    SegmentName,
    files_in,
    is_there,
    make_folder,
    note_path,
    read_file,
    remove,
    replaced_by,
    sync_folder,
    write_file,
)
from insitu.segments.stored import Stored
from insitu.segments.whole import REPLACED_BEFORE, REPLACES, NotWhole, WholeSegment

SCHEMA: Final = "insitu.replacing/1"


class Step(StrEnum):
    """Where a replacement has come to."""

    DRAFTED = "drafted"
    """The new file is on disk, under a name that no reader takes for a segment."""
    CHECKED = "checked"
    """It was read back."""
    NOTED = "noted"
    """The note is on disk."""
    PUBLISHED = "published"
    """The new segment is there, and the old ones are not any more, for whoever lists them."""
    REMOVED = "removed"
    """The old files are gone."""
    DONE = "done"
    """The note is gone."""


Reached = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Replacement:
    """Which segment takes the place of which, all of one table and shard. The caller holds the shard."""

    name: SegmentName
    inputs: Sequence[SegmentName]
    to_quarantine: bool = False
    """Originals are kept in `quarantine`: they are damaged, and what of them is whole is in the new one."""


def replace(
    store: Path,
    what: Replacement,
    schema: pa.Schema,
    metadata: dict[str, str],
    batches: Iterable[Stored],
    reached: Reached = lambda step: None,
) -> int:
    """Carry it out; return the bytes of the new file.

    schema, metadata: as the inputs have them. It is as old as the youngest of its inputs. Raises NotWhole when what was
    written does not read back, OSError; before `PUBLISHED` the old segments are then as they were.
    """
    assert all((n.table, n.shard) == (what.name.table, what.name.shard) for n in what.inputs), "of one table and shard"
    assert all(name.number < what.name.number for name in what.inputs), "numbers go up, so that none is used twice"
    draft = what.name.path(store, OPEN).with_suffix(".draft")
    note = note_path(store, what.name)
    published = False
    try:
        newest_ns = max(disk.stat(name.path(store, SEALED)).st_mtime_ns for name in what.inputs)
        written = _write_draft(draft, schema.with_metadata(metadata), batches, newest_ns)
        reached(Step.DRAFTED)
        _check(draft, what.name.table, written)
        reached(Step.CHECKED)
        _write_note(note, what)
        reached(Step.NOTED)
        num_bytes = disk.stat(draft).st_size
        publish(store, what.name, draft)
        published = True
    finally:
        if not published and not is_there(what.name.path(store, SEALED)):
            remove(draft)
            remove(note)
    reached(Step.PUBLISHED)
    _remove(store, what.inputs, to_quarantine=what.to_quarantine)
    reached(Step.REMOVED)
    _remove_note(note)
    reached(Step.DONE)
    return num_bytes


def finish_replacements(store: Path, shard: str) -> None:
    """Finish what a crash interrupted: forward where the new segment is there, else back. The shard is held."""
    for name in files_in(store, REPLACING, ".json"):
        if name.shard != shard:
            continue
        note = note_path(store, name)
        if is_there(name.path(store, SEALED)):
            to_quarantine = json.loads(read_file(note))["to_quarantine"]
            _remove(store, replaced_by(store, name), to_quarantine=to_quarantine)
        _remove_note(note)


def origin(inputs: Iterable[tuple[SegmentName, WholeSegment]]) -> dict[str, str]:
    """Return the schema metadata that says what a segment was made of."""
    found = list(inputs)
    before = {number for _, segment in found for number in segment.replaces | segment.replaced_before}
    return {
        REPLACES: " ".join(str(name.number) for name, _ in found),
        REPLACED_BEFORE: " ".join(str(number) for number in sorted(before)),
    }


def _write_draft(
    draft: Path, schema: pa.Schema, batches: Iterable[Stored], newest_ns: int
) -> list[tuple[tuple[int, int, int], int, int]]:
    """Write and sync the new file; return key, rows and checksum of each batch."""
    remove(draft)
    fd = create(draft)
    written = []
    try:
        with disk.sink(draft) as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                epoch, stream, seq = batch.key
                names = {"epoch": epoch, "stream": stream, "seq": seq, "crc32": batch.crc32}
                writer.write_batch(batch.data, custom_metadata={name: str(value) for name, value in names.items()})
                written.append((tuple(batch.key), batch.data.num_rows, batch.crc32))
        disk.utime(fd, newest_ns)
        disk.fsync(fd)  # with its times, which say how old its rows are
        disk.fchmod(fd, 0o400)
    finally:
        disk.close(fd)
    return written  # type: ignore[return-value]


def _check(draft: Path, table: str, written: list[tuple[tuple[int, int, int], int, int]]) -> None:
    found = [(tuple(b.key), b.data.num_rows, b.crc32) for b in WholeSegment(draft, table).batches()]
    if found != written:
        raise NotWhole("what was written is not what is read back")


def _write_note(note: Path, what: Replacement) -> None:
    numbers = [name.number for name in what.inputs]
    document = {"schema": SCHEMA, "replaces": numbers, "to_quarantine": what.to_quarantine}
    write_file(note, json.dumps(document).encode())


def _remove(store: Path, names: Iterable[SegmentName], *, to_quarantine: bool) -> None:
    """Unlink or move what was replaced. What has gone already is left out: this may be the second try."""
    folders = set()
    for name in names:
        path = name.path(store, SEALED)
        folders.add(path.parent)
        if to_quarantine and is_there(path):
            kept = name.path(store, QUARANTINE)
            make_folder(kept.parent)
            disk.rename(path, kept)
            folders.add(kept.parent)
        else:
            remove(path)
    for folder in folders:
        sync_folder(folder)


def _remove_note(note: Path) -> None:
    remove(note)
    sync_folder(note.parent)
