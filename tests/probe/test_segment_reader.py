"""The reader: a file cut or changed anywhere gives only what was written, and says what is missing."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.layout import Key
from insitu.segments.message import PREFIX_BYTES, read_head
from insitu.segments.reader import recent_keys
from insitu.segments.shard import SegmentName, ShardWriter, TailReader

NAME = SegmentName("events", "shard", 0)
NUM_BATCHES = 4
SOME_OR_ALL = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
"""Of the places in a file: no multiple of what Arrow aligns to, so that all kinds of place are tried."""


def events(seq: int, num_rows: int = 2) -> Batch:
    rows = [
        {
            "epoch": 7,
            "rank": -1,
            "stage": -1,
            "row_seq": 10 * seq + i,
            "t_ns": -1,
            "kind": "incident",
            "text": "né" * seq,
        }
        for i in range(num_rows)
    ]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one segment, open (all batches written) and sealed."""
    store = tmp_path_factory.mktemp("store")
    writer = ShardWriter(store, "shard")
    for seq in range(NUM_BATCHES):
        writer.append(events(seq))
    still_open = NAME.path(store, "open").read_bytes()
    writer.close()
    return {"open": still_open, "sealed": NAME.path(store, "sealed").read_bytes()}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Batch], TailReader]]:
    def read_bytes(data: bytes, *, final: bool = True) -> tuple[list[Batch], TailReader]:
        path = NAME.path(tmp_path, "open")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # some file systems sync a file that is overwritten
        path.write_bytes(data)
        reader = TailReader(tmp_path, NAME)
        batches = reader.read(final=final)
        reader.close()
        return batches, reader

    return read_bytes


Read = Callable[..., tuple[list[Batch], TailReader]]


def ends_of(data: bytes, read: Read) -> list[int]:
    """Where each batch of the open file ends."""
    ends: list[int] = []
    for cut in range(8, len(data) + 1, 8):
        batches, _ = read(data[:cut], final=False)
        if len(batches) > len(ends):
            ends.append(cut)
    return ends


@SOME_OR_ALL
def test_a_file_cut_anywhere_in_its_last_batch_keeps_all_before_it(
    stored: dict[str, bytes], read: Read, every: int
) -> None:
    data = stored["open"]
    ends = ends_of(data, read)
    assert len(ends) == NUM_BATCHES
    assert ends[-1] == len(data)
    for cut in range(ends[-2], ends[-1], every):
        batches, reader = read(data[:cut])
        assert [batch.body for batch in batches] == [events(seq).body for seq in range(NUM_BATCHES - 1)]
        if cut == ends[-2]:
            assert reader.damage == []
            continue
        (damage,) = reader.damage
        assert (damage.torn, damage.offset, damage.num_bytes) == (True, ends[-2], cut - ends[-2])
        assert (damage.epoch, damage.seq, damage.num_rows) in [(None, None, None), (7, NUM_BATCHES - 1, 2)]
        batches, reader = read(data[:cut], final=False)
        assert (len(batches), reader.damage, reader.finished) == (NUM_BATCHES - 1, [], False)
    _, reader = read(data[: ends[-1] - 1])
    assert reader.damage[0].num_rows == 2, "with its head there, the lost batch is known to the row"


@SOME_OR_ALL
@pytest.mark.parametrize("state", ["open", "sealed"])
def test_one_flipped_bit_never_changes_a_row_and_every_lost_batch_is_told(
    stored: dict[str, bytes], read: Read, state: str, every: int
) -> None:
    data = stored[state]
    bodies = [events(seq).body for seq in range(NUM_BATCHES)]
    lost = 0
    for place in range(8, len(data), every):
        changed = bytearray(data)
        changed[place] ^= 1 << (place * 5) % 8
        batches, reader = read(bytes(changed))
        found = [batch.body for batch in batches]
        assert [body for body in bodies if body in found] == found, f"byte {place}: rows nobody wrote"
        assert len(found) >= NUM_BATCHES - 1, f"byte {place}: more than the damaged batch is lost"
        assert len(found) == NUM_BATCHES or reader.damage, f"byte {place}: a batch is lost without a word"
        lost += NUM_BATCHES - len(found)
    assert lost > 1000 / every


@SOME_OR_ALL
@pytest.mark.parametrize("max_bytes", [1, 700])
def test_a_file_that_is_read_piece_by_piece_gives_the_same_and_tells_the_same(
    stored: dict[str, bytes], read: Read, tmp_path: Path, every: int, max_bytes: int
) -> None:
    data = stored["sealed"]
    for place in [None, *range(8, len(data), 5 * every)]:
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1 << (place * 5) % 8
        whole, told = read(bytes(changed))
        reader = TailReader(tmp_path, NAME)
        pieces: list[Batch] = []
        while found := reader.read(final=True, max_bytes=max_bytes):
            assert len(found) == 1 or max_bytes > 1 or place is not None, "no more than was asked for, or one batch"
            pieces += found
        reader.close()
        assert [piece.body for piece in pieces] == [batch.body for batch in whole]
        assert reader.damage == told.damage
        assert reader.finished


def test_what_is_behind_a_batch_of_a_wrong_length_is_found_piece_by_piece_too(
    stored: dict[str, bytes], read: Read, tmp_path: Path
) -> None:
    changed = bytearray(stored["sealed"])
    begin = ends_of(stored["sealed"], read)[0]
    (metadata_bytes,) = struct.unpack_from("<i", changed, begin + 4)
    head = read_head(memoryview(changed), begin)
    assert head is not None
    place = changed.index(struct.pack("<q", head.num_bytes - PREFIX_BYTES - metadata_bytes), begin)
    changed[place] += 1
    assert read_head(memoryview(changed), begin) == replace(head, num_bytes=head.num_bytes + 1)
    whole, told = read(bytes(changed))
    reader = TailReader(tmp_path, NAME)
    pieces = [batch for _ in range(NUM_BATCHES) for batch in reader.read(final=True, max_bytes=700)]
    reader.close()
    assert [piece.body for piece in pieces] == [batch.body for batch in whole]
    assert (reader.damage, reader.finished) == (told.damage, True)


@pytest.mark.parametrize("seed", range(150))
def test_garbage_is_never_a_row_and_never_ends_the_process(seed: int, stored: dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(seed)
    data = bytearray(stored[chance.choice(["open", "sealed"])])
    for _ in range(chance.randrange(1, 30)):
        at = chance.randrange(8, len(data))
        width = min(chance.choice([1, 2, 4, 8, 64]), len(data) - at)
        data[at : at + width] = chance.choice([chance.randbytes(width), bytes(width), b"\xff" * width])
    path = NAME.path(tmp_path, "open")
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    reader = TailReader(tmp_path, NAME)
    bodies = [events(seq).body for seq in range(NUM_BATCHES)]
    found = reader.read() + reader.read(final=True)
    reader.close()
    assert all(batch.body in bodies for batch in found)
    assert len(found) == NUM_BATCHES or reader.damage
    assert sum(damage.num_bytes for damage in reader.damage) <= len(data)


def test_good_batches_behind_a_damaged_one_are_read_while_the_file_still_grows(
    stored: dict[str, bytes], read: Read, tmp_path: Path
) -> None:
    data = bytearray(stored["open"])
    first, second, *_ = ends_of(bytes(data), read)
    data[second - 8 : second] = bytes(8)
    path = NAME.path(tmp_path, "open")
    path.write_bytes(data[:second])
    reader = TailReader(tmp_path, NAME)
    assert [batch.seq for batch in reader.read()] == [0]
    with path.open("ab") as file:
        file.write(data[second:])
    assert [batch.seq for batch in reader.read()] == [2, 3]
    (damage,) = reader.damage
    assert (damage.torn, damage.offset, damage.seq, damage.num_rows) == (False, first, 1, 2)
    reader.close()


def test_a_file_that_is_sealed_and_moved_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard")
    writer.append(events(0))
    reader = TailReader(tmp_path, NAME)
    assert [batch.seq for batch in reader.read()] == [0]
    assert reader.read() == []
    writer.append(events(1))
    writer.close()
    assert [batch.body for batch in reader.read()] == [events(1).body]
    assert (reader.finished, reader.damage) == (True, [])
    assert reader.read(final=True) == []
    reader.close()
    reader.close()


def test_a_missing_segment_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TailReader(tmp_path, NAME)


def write_as(store: Path, schema: pa.Schema, data: pa.RecordBatch) -> None:
    """Write a segment as another version of insitu would have."""
    import zlib

    path = NAME.path(store, "sealed")
    path.parent.mkdir(parents=True)
    metadata = {"epoch": "7", "stream": "9", "seq": "0", "crc32": str(zlib.crc32(data.serialize()))}
    with pa.ipc.new_file(path, schema) as writer:
        writer.write_batch(data, custom_metadata=metadata)


def test_a_newer_file_is_read_without_its_new_column_and_an_older_with_nulls(tmp_path: Path) -> None:
    today = events(3)
    newer = today.data.append_column("added", pa.array([1, 2]))
    write_as(tmp_path / "newer", newer.schema, newer)
    reader = TailReader(tmp_path / "newer", NAME)
    assert [batch.body for batch in reader.read(final=True)] == [today.body]
    reader.close()
    older = today.data.select(today.data.schema.names[:-1])
    write_as(tmp_path / "older", older.schema, older)
    reader = TailReader(tmp_path / "older", NAME)
    (batch,) = reader.read(final=True)
    reader.close()
    assert batch.data.schema.equals(today.data.schema)
    assert batch.data.column("text").null_count == 2
    assert batch.data.column("kind").equals(today.data.column("kind"))


def test_recent_keys_are_those_of_the_newest_sealed_segments(tmp_path: Path) -> None:
    for first in (0, 2):
        writer = ShardWriter(tmp_path, "shard")
        writer.append(events(first))
        writer.append(events(first + 1))
        writer.close()
    assert set(recent_keys(tmp_path, "shard")) == {Key(7, 9, seq) for seq in range(4)}
    assert set(recent_keys(tmp_path, "shard", max_bytes=1)) == {Key(7, 9, 2), Key(7, 9, 3)}
    assert set(recent_keys(tmp_path, "other")) == set()
