"""Sealing what a writer left open: the file itself, whatever its last bytes; a copy where that cannot be."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insitu.exporters.base import Batch
from insitu.records import schema_of, table_spec
from insitu.segments import disk, reader
from insitu.segments.file import batch_metadata, file_schema
from insitu.segments.footer import Block, closing
from insitu.segments.message import END_MARK, MAGIC, head_bytes, read_head
from insitu.segments.reader import FIRST_MESSAGE, TailReader
from insitu.segments.recovery import Recovered, recover_segment
from insitu.segments.sealing import seal_copy
from insitu.segments.shard import SegmentName, ShardWriter, list_segments

NAME = SegmentName("events", "dead", 0)
TEXTS = ("", "short", "x" * 700, None, "y" * 40)
IN_ONE_FOLDER = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def events(seq: int, text: str | None = None) -> Batch:
    identity = {"epoch": 7, "rank": 0, "stage": 0}
    rows = [{**identity, "row_seq": seq, "t_ns": 0, "kind": "incident", "text": text}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def open_bytes(folder: Path) -> bytes:
    """Return what a writer that died behind five whole batches left."""
    writer = ShardWriter(folder, "dead")
    for seq, text in enumerate(TEXTS):
        writer.append(events(seq, text))
    data = NAME.path(folder, "open").read_bytes()
    writer.close()
    return data


def newer_bytes() -> bytes:
    """Return an open file of a later minor version, whose table has another column."""
    schema = schema_of("events").append(pa.field("mood", pa.string()))
    sink = pa.BufferOutputStream()
    sink.write(MAGIC.ljust(FIRST_MESSAGE, b"\0"))
    with pa.ipc.new_stream(sink, schema.with_metadata({"insitu.table": "events", "insitu.version": "1.99"})) as writer:
        for seq in range(3):
            known = events(seq)
            data = pa.RecordBatch.from_arrays([*known.data.columns, pa.array([f"mood {seq}"])], schema=schema)
            named = {**batch_metadata(known), "crc32": batch_metadata(Batch(7, seq, data, "events"))["crc32"]}
            writer.write_batch(data, custom_metadata=named)
    return bytes(sink.getvalue())[:-8]


def left_open(store: Path, data: bytes, name: SegmentName = NAME) -> Path:
    shutil.rmtree(store, ignore_errors=True)
    path = name.path(store, "open")
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def blocks_of(data: bytes) -> list[Block]:
    """Return where each whole message lies, the schema's first."""
    view, at, found = memoryview(data), FIRST_MESSAGE, []
    while at < len(data) and (head := read_head(view, at)) and not head.is_end and at + head.num_bytes <= len(data):
        found.append(Block(at, head_bytes(view, at), head.num_bytes))
        at += head.num_bytes
    return found


def sealed(store: Path, name: SegmentName = NAME) -> Path:
    return name.path(store, "sealed")


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a sealed file as any reader of Arrow files finds them."""
    with pa.ipc.open_file(path) as file:
        return file.read_all().to_pylist()  # type: ignore[no-any-return]


COLUMNS = st.sampled_from([
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)), (pa.string(), st.text(max_size=20)), (pa.bool_(), st.booleans()),
    (pa.large_binary(), st.binary(max_size=40)), (pa.list_(pa.int32()), st.lists(st.integers(0, 9), max_size=4)),
])  # fmt: skip


@given(data=st.data(), columns=st.lists(COLUMNS, min_size=1, max_size=6), num_batches=st.integers(0, 5))
def test_a_footer_says_what_arrow_says_of_the_same_messages(
    data: st.DataObject, columns: list[tuple[pa.DataType, st.SearchStrategy[Any]]], num_batches: int
) -> None:
    fields = [pa.field(f"c{i}" * (i + 1), kind) for i, (kind, _) in enumerate(columns)]
    schema = pa.schema(fields, metadata=data.draw(st.dictionaries(st.text(max_size=9), st.text(max_size=9))))
    theirs = pa.BufferOutputStream()
    with pa.ipc.new_file(theirs, schema) as writer:
        for number in range(num_batches):
            num_rows = data.draw(st.integers(0, 4))
            arrays = [
                pa.array(data.draw(st.lists(values | st.none(), min_size=num_rows, max_size=num_rows)), kind)
                for kind, values in columns
            ]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
            writer.write_batch(batch, custom_metadata={"number": str(number)})
    whole = bytes(theirs.getvalue())
    first, *batches = blocks_of(whole)
    messages = whole[: batches[-1].end if batches else first.end]
    ours = messages + closing(whole[first.offset : first.end], batches)
    with pa.ipc.open_file(pa.py_buffer(whole)) as expected, pa.ipc.open_file(pa.py_buffer(ours)) as found:
        assert found.schema.equals(expected.schema, check_metadata=True)
        assert found.num_record_batches == expected.num_record_batches == num_batches
        for number in range(num_batches):
            assert found.get_batch_with_custom_metadata(number) == expected.get_batch_with_custom_metadata(number)
        assert found.read_all() == expected.read_all()


@IN_ONE_FOLDER
@given(share=st.floats(0, 1))
def test_any_prefix_of_an_open_file_is_sealed_to_its_whole_batches(tmp_path: Path, share: float) -> None:
    whole = tmp_path / "whole.bin"
    if not whole.exists():
        whole.write_bytes(open_bytes(tmp_path / "living"))
    data = whole.read_bytes()[: round(share * whole.stat().st_size)]
    path = left_open(tmp_path / "store", data)
    inode = path.stat().st_ino
    batches = blocks_of(data)[1:]
    found = recover_segment(tmp_path / "store", NAME)
    assert [key.seq for key in found.keys] == list(range(len(batches)))
    assert not path.exists()
    end = max((block.end for block in blocks_of(data)), default=FIRST_MESSAGE)
    assert sum(damage.num_bytes for damage in found.damage) == max(0, len(data) - end)
    if not batches:
        assert not sealed(tmp_path / "store").exists()
        return
    assert sealed(tmp_path / "store").stat().st_ino == inode, "the same file"
    assert sealed(tmp_path / "store").stat().st_mode & 0o777 == 0o400
    with pa.ipc.open_stream(pa.py_buffer(data[FIRST_MESSAGE : batches[-1].end])) as stream:
        assert rows_in(sealed(tmp_path / "store")) == stream.read_all().to_pylist()
    _assert_as_a_copy(tmp_path, data, sealed(tmp_path / "store").read_bytes())


def _assert_as_a_copy(folder: Path, data: bytes, expected: bytes) -> None:
    left_open(folder / "copied", data)
    tail = TailReader(folder / "copied", NAME)
    batches = list(tail.read_pieces())
    seal_copy(folder / "copied", NAME, tail.schema_message, batches)
    tail.close()
    assert sealed(folder / "copied").read_bytes() == expected


def test_a_footer_cut_anywhere_is_a_torn_tail(tmp_path: Path) -> None:
    data = open_bytes(tmp_path / "living")
    whole = sealed(tmp_path / "living").read_bytes()
    left_open(tmp_path / "store", data)
    recover_segment(tmp_path / "store", NAME)
    ours = sealed(tmp_path / "store").read_bytes()
    for ended in (whole, ours):
        some = random.Random(0).sample(range(len(data) + 10, len(ended) - 10), 20)
        for num_bytes in (*range(len(data), len(data) + 10), *some, *range(len(ended) - 10, len(ended) + 1)):
            left_open(tmp_path / "store", ended[:num_bytes])
            found = recover_segment(tmp_path / "store", NAME)
            assert all(damage.torn and damage.num_rows in (0, None) for damage in found.damage)
            assert sealed(tmp_path / "store").read_bytes() == ours


def test_a_file_that_is_whole_is_only_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_open(tmp_path / "store", open_bytes(tmp_path / "living"))
    recover_segment(tmp_path / "store", NAME)
    left_open(tmp_path / "again", sealed(tmp_path / "store").read_bytes())

    def never(*_: Any) -> int:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(disk, "pwrite", never)
    monkeypatch.setattr(disk, "ftruncate", never)
    assert len(recover_segment(tmp_path / "again", NAME).keys) == len(TEXTS)
    assert sealed(tmp_path / "again").exists()


def test_columns_of_a_newer_version_are_kept(tmp_path: Path) -> None:
    left_open(tmp_path, newer_bytes()[:-3])
    assert [key.seq for key in recover_segment(tmp_path, NAME).keys] == [0, 1]
    assert [row["mood"] for row in rows_in(sealed(tmp_path))] == ["mood 0", "mood 1"]
    assert _seqs(tmp_path) == [0, 1]


def test_columns_of_a_newer_version_are_kept_in_a_copy(tmp_path: Path) -> None:
    data = bytearray(newer_bytes())
    data[data.index(b"mood 1")] ^= 1
    left_open(tmp_path, bytes(data))
    (damage,) = recover_segment(tmp_path, NAME).damage
    assert (damage.torn, damage.seq) == (False, 1)
    assert [row["mood"] for row in rows_in(sealed(tmp_path))] == ["mood 0", "mood 2"]
    assert NAME.path(tmp_path, "quarantine").read_bytes() == bytes(data)


def test_batches_that_are_stored_elsewhere_are_left_out(tmp_path: Path) -> None:
    data = open_bytes(tmp_path / "living")
    everything = [key for batch in range(len(TEXTS)) for key in [reader.key_of(events(batch))]]
    for known in (everything[:1], everything[2:3], everything[4:], everything[3:]):
        left_open(tmp_path / "store", data)
        left = recover_segment(tmp_path / "store", NAME, known).keys
        assert left == [key for key in everything if key not in known]
        assert [row["row_seq"] for row in rows_in(sealed(tmp_path / "store"))] == [key.seq for key in left]


def test_a_damaged_schema_or_magic_is_written_anew(tmp_path: Path) -> None:
    data = open_bytes(tmp_path / "living")
    for what in (MAGIC, b"row_seq", b"kind"):
        changed = bytearray(data)
        changed[data.index(what)] ^= 0x10
        left_open(tmp_path / "store", bytes(changed))
        assert len(recover_segment(tmp_path / "store", NAME).keys) == len(TEXTS)
        with pa.ipc.open_file(sealed(tmp_path / "store")) as file:
            assert file.schema.equals(file_schema(NAME, table_spec("events")), check_metadata=True)
        assert _seqs(tmp_path / "store") == list(range(len(TEXTS)))


def test_a_file_without_a_schema_gets_one(tmp_path: Path) -> None:
    data = open_bytes(tmp_path / "living")
    left_open(tmp_path / "store", data[:FIRST_MESSAGE] + data[blocks_of(data)[1].offset :])
    assert len(recover_segment(tmp_path / "store", NAME).keys) == len(TEXTS)
    assert len(rows_in(sealed(tmp_path / "store"))) == len(TEXTS)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fdatasync", "fchmod"])
def test_a_file_that_cannot_be_completed_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """As after a sync that failed, which a second one does not make good."""
    path = left_open(tmp_path / "store", open_bytes(tmp_path / "living")[:-1])
    inode = path.stat().st_ino
    real = getattr(disk, call)

    def broken(fd: int, *rest: Any) -> Any:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    monkeypatch.setattr(disk, call, broken)
    assert len(recover_segment(tmp_path / "store", NAME).keys) == len(TEXTS) - 1
    assert sealed(tmp_path / "store").stat().st_ino != inode
    assert [row["row_seq"] for row in rows_in(sealed(tmp_path / "store"))] == list(range(len(TEXTS) - 1))
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_leaves_the_file_to_the_next_start(tmp_path: Path) -> None:
    data = open_bytes(tmp_path / "living")
    path = left_open(tmp_path / "store", data[:-1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (blocks_of(data)[-1].offset + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            recover_segment(tmp_path / "store", NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == data[: blocks_of(data)[-1].offset] + END_MARK + path.read_bytes()[-12:]
    recover_segment(tmp_path / "store", NAME)
    assert _seqs(tmp_path / "store") == list(range(len(TEXTS) - 1))


@IN_ONE_FOLDER
@given(chance=st.randoms(use_true_random=False), num_bytes=st.integers(16, 4000), num_changes=st.integers(0, 3))
def test_reading_in_pieces_finds_what_reading_at_once_does(
    tmp_path: Path, chance: Any, num_bytes: int, num_changes: int
) -> None:
    whole = tmp_path / "whole.bin"
    if not whole.exists():
        whole.write_bytes(open_bytes(tmp_path / "living"))
    data = bytearray(whole.read_bytes())
    for _ in range(num_changes):
        data[chance.randrange(FIRST_MESSAGE, len(data))] ^= 1 << chance.randrange(8)
    left_open(tmp_path / "store", bytes(data[: chance.randrange(len(data)) if chance.random() < 0.5 else len(data)]))
    at_once, in_pieces = (TailReader(tmp_path / "store", NAME) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE_BYTES", num_bytes)
        found = [placed.batch for placed in in_pieces.read_pieces()]
    assert [batch.seq for batch in found] == [batch.seq for batch in at_once.read(final=True)]
    assert in_pieces.damage == at_once.damage
    at_once.close()
    in_pieces.close()


def test_recovery_holds_a_piece_of_a_file_in_memory_not_all_of_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "living", "dead")
    for seq in range(40):
        writer.append(events(seq, "z" * (1 << 20)))
    path = left_open(tmp_path / "store", NAME.path(tmp_path / "living", "open").read_bytes()[:-1])
    size = path.stat().st_size
    writer.close()
    tracemalloc.start()
    try:
        found: Recovered = recover_segment(tmp_path / "store", NAME)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.keys) == 39
    assert peak < size / 3


def _seqs(store: Path) -> list[int]:
    """Return the batches of the sealed segments as our own reader finds them, without damage."""
    seqs: list[int] = []
    for name in list_segments(store, "sealed"):
        tail = TailReader(store, name)
        seqs += [batch.seq for batch in tail.read(final=True)]
        assert tail.damage == []
        tail.close()
    return seqs
