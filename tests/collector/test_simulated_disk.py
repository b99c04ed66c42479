"""The simulated disk is as forgetful as a real one may be, and no more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
from simulated_disk import Killed, SimulatedDisk

SEEDS = range(60)
A, B = Path("/a"), Path("/b")


def synced(disk: SimulatedDisk, folder: Path) -> None:
    disk.fsync(disk.open(folder, os.O_RDONLY))


def test_what_was_synced_is_there_and_what_was_not_may_be_there_in_part() -> None:
    left = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        fd = disk.open(A, os.O_CREAT)
        disk.pwrite(fd, b"kept", 0)
        disk.fdatasync(fd)
        synced(disk, Path("/"))
        disk.pwrite(fd, b"----", 4)
        disk.lose_power()
        data = disk.bytes_of(A)
        assert data[:4] == b"kept"
        left.add(data[4:])
    assert {b"", b"-", b"--", b"----", bytes(4)} <= left


def test_a_name_is_durable_once_its_folder_is_synced() -> None:
    there = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        disk.open(A, os.O_CREAT)
        synced(disk, Path("/"))
        disk.open(B, os.O_CREAT)
        disk.unlink(A)
        disk.lose_power()
        there.add(tuple(sorted(disk.listdir(Path("/")))))
    assert there == {("a",), ("a", "b"), ("b",), ()}


def test_a_rename_never_loses_the_file() -> None:
    there = set()
    for seed in SEEDS:
        disk = SimulatedDisk(seed)
        disk.open(A, os.O_CREAT)
        synced(disk, Path("/"))
        disk.rename(A, B)
        disk.lose_power()
        there.add(tuple(sorted(disk.listdir(Path("/")))))
    assert there == {("a",), ("a", "b"), ("b",)}


def test_a_write_that_finds_no_room_is_short_and_raises() -> None:
    disk = SimulatedDisk(0, capacity=3)
    disk.open(A, os.O_CREAT)
    with pytest.raises(OSError) as raised:
        disk.sink(A).write(b"12345")
    assert (raised.value.errno, disk.bytes_of(A)) == (errno.ENOSPC, b"123")


def test_who_was_killed_changes_nothing_more() -> None:
    disk = SimulatedDisk(0)
    disk.open(A, os.O_CREAT)

    def die(label: str) -> None:
        if label == "before rename":
            raise Killed(label)

    disk.on_call = die
    for _ in range(2):
        with pytest.raises(Killed):
            disk.rename(A, B)
    with pytest.raises(Killed):
        disk.unlink(A)
    assert disk.listdir(Path("/")) == ["a"]


def test_what_arrow_writes_is_what_it_reads() -> None:
    disk = SimulatedDisk(0)
    disk.open(A, os.O_CREAT)
    batch = pa.record_batch({"n": [1, 2]})
    with disk.sink(A) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert pa.ipc.open_file(pa.py_buffer(disk.bytes_of(A))).get_batch(0) == batch


def test_a_second_sync_does_not_make_good_what_the_first_could_not() -> None:
    assert {_synced_again(seed) for seed in range(8)} > {b"12345"}


def _synced_again(seed: int) -> bytes:
    """Return what a power loss leaves of a file whose sync failed, and was then asked for again."""
    disk = SimulatedDisk(seed)
    fd = disk.open(A, os.O_CREAT)
    disk.pwrite(fd, b"12345", 0)
    disk.fsync(disk.open(A.parent, os.O_RDONLY))
    disk.fail_writeback(fd)
    disk.fdatasync(fd)
    disk.lose_power()
    return disk.bytes_of(A)


def test_a_cut_is_durable_only_after_a_sync() -> None:
    assert {_cut(seed, sync=False) for seed in range(32)} >= {b"12345", b"12"}
    assert {_cut(seed, sync=True) for seed in range(32)} == {b"12"}


def _cut(seed: int, *, sync: bool) -> bytes:
    """Return what a power loss leaves of a durable file that was cut since."""
    disk = SimulatedDisk(seed)
    fd = disk.open(A, os.O_CREAT)
    disk.pwrite(fd, b"12345", 0)
    disk.fdatasync(fd)
    disk.fsync(disk.open(A.parent, os.O_RDONLY))
    disk.ftruncate(fd, 2)
    if sync:
        disk.fdatasync(fd)
    disk.lose_power()
    return disk.bytes_of(A)
