"""Sealing in place over a simulated disk: killed, or without power, at every call it makes, and started again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from crash_kit import rows_of
from simulated_disk import Killed, SimulatedDisk

from insitu.exporters.base import Batch
from insitu.segments import disk
from insitu.segments.layout import OPEN, QUARANTINE, SEALED, SegmentName, list_segments
from insitu.segments.reader import recent_keys
from insitu.segments.shard import Key, ShardWriter, TailReader

pytestmark = pytest.mark.matrix

STORE = Path("/store")
NAME = SegmentName("events", "a", 0)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        yield patched


def batch(seq: int) -> Batch:
    return Batch(7, seq, rows_of("events", 7, seq, 1), "events")


def left_by_a_killed_writer(patch: pytest.MonkeyPatch, seed: int, num_synced: int = 2) -> SimulatedDisk:
    """Return a disk with an open file: batches 0 and 1 durable, 2 whole, 3 torn; at most so many of them synced."""
    sim = SimulatedDisk(seed)
    sim.install(patch)
    writer = ShardWriter(STORE, "a")
    for seq in range(3):
        writer.append(batch(seq))
        if seq < num_synced:
            writer.sync()
    stop_at(sim, "after write", 1)
    with pytest.raises(Killed):
        writer.append(batch(3))
    sim.kill()
    return sim


def stop_at(sim: SimulatedDisk, label: str, num_calls: int, what: Callable[[str], BaseException] = Killed) -> None:
    left = num_calls

    def count(call: str) -> None:
        nonlocal left
        left -= call.startswith(label)
        if left == 0:
            sim.on_call = lambda _: None
            raise what(call)

    sim.on_call = count


def calls_of_a_recovery(seed: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        sim = left_by_a_killed_writer(patch, seed)
        calls: list[str] = []
        sim.on_call = calls.append
        ShardWriter(STORE, "a")
    return calls


def stored() -> list[int]:
    """Return the batches that are sealed, in files that Arrow opens and we read without damage."""
    seqs: list[int] = []
    for name in list_segments(STORE, SEALED):
        with disk.mapped(name.path(STORE, SEALED)) as data, pa.ipc.open_file(pa.py_buffer(bytes(data))) as file:
            num_batches = file.num_record_batches
        reader = TailReader(STORE, name, SEALED)
        found = reader.read(final=True)
        assert (reader.damage, len(found)) == ([], num_batches)
        seqs += [each.seq for each in found]
    return sorted(seqs)


CALLS = calls_of_a_recovery(0)


def test_it_cuts_syncs_writes_syncs_and_moves() -> None:
    """And writes no batch again."""
    done = [call.removeprefix("before ") for call in CALLS if call.startswith("before ")]
    steps = [call for call in done if call in ("truncate", "write", "fdatasync", "chmod", "rename")]
    at = steps.index("fdatasync") - 1
    assert steps[at : at + 6] == ["truncate", "fdatasync", "write", "fdatasync", "chmod", "rename"]
    assert done.count("rename") == 1


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_start_that_ends_at_any_call_is_made_good_by_the_next(number: int, power: bool) -> None:
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            sim = left_by_a_killed_writer(patch, seed)
            stop_at(sim, "", number + 1)
            with pytest.raises(Killed):
                ShardWriter(STORE, "a")
            if power:
                sim.lose_power()
            else:
                sim.kill()
            ShardWriter(STORE, "a")
            assert list_segments(STORE, OPEN) == []
            found = stored()
            assert found in ([[0, 1, 2], [0, 1]] if power else [[0, 1, 2]])
            told = sorted(key.seq for key in recent_keys(STORE, "a"))
            sim.lose_power()
            assert stored() == told == found, "what a start has found is durable"
            assert power or list_segments(STORE, QUARANTINE) == []


@pytest.mark.parametrize("seed", range(24))
def test_what_a_failed_sync_left_in_memory_is_not_taken_for_durable(patch: pytest.MonkeyPatch, seed: int) -> None:
    sim = SimulatedDisk(seed)
    sim.install(patch)
    writer = ShardWriter(STORE, "a")
    writer.append(batch(0))
    writer.sync()
    writer.append(batch(1))

    def fail(call: str) -> None:
        if call == "before fdatasync":
            stop_at(sim, "after truncate", 1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    sim.on_call = fail
    with pytest.raises(Killed):
        writer.sync()
    sim.kill()
    ShardWriter(STORE, "a")
    told = set(recent_keys(STORE, "a"))
    sim.lose_power()
    ShardWriter(STORE, "a")
    assert {Key(7, batch(0).stream, 0)} <= told <= set(recent_keys(STORE, "a"))


@pytest.mark.parametrize("seed", range(24))
def test_a_sync_that_fails_in_a_recovery_is_not_asked_for_again(patch: pytest.MonkeyPatch, seed: int) -> None:
    """The bytes are written anew, into another file."""
    sim = left_by_a_killed_writer(patch, seed)
    stop_at(sim, "before fdatasync", 1, lambda _: OSError(errno.EIO, os.strerror(errno.EIO)))
    try:
        ShardWriter(STORE, "a")
    except OSError:  # what was seen has gone from memory too
        sim.kill()
        ShardWriter(STORE, "a")
    told = sorted(key.seq for key in recent_keys(STORE, "a"))
    sim.lose_power()
    assert told[:2] == [0, 1]
    assert stored() == told
