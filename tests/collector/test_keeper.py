"""The collector keeps its own store while it runs: merges, erases at once when asked, and never counts a row twice."""

from __future__ import annotations

import json
import logging
import time
import zlib
from pathlib import Path

import pytest
from store_kit import EPOCH, batch, events, rows_in, run, seal

from insitu.exporters.base import Batch
from insitu.records import table_spec
from insitu.segments.claims import Claims
from insitu.segments.expiry import SWEEP_S
from insitu.segments.layout import SEALED, SegmentName, ShardLocked, StoreGone, list_segments
from insitu.segments.retention import Keep
from insitu.segments.shard import Limits, ShardWriter
from insitu.vocabulary import ERASED, NOT_LOST
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.keeping import places
from insitu_collector.keeping.catalog import read_catalog
from insitu_collector.keeping.keeper import LOOK_S, Keeper
from insitu_collector.keeping.merge_plan import MergeRules
from insitu_collector.keeping.places import file_system_of, warn_of_remote
from insitu_collector.keeping.twins import list_twins
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

RULES = MergeRules(min_inputs=4)


def frame(of: Batch) -> Frame:
    spec = table_spec(of.table)
    return Frame(
        stream=spec.stream,
        seq=of.seq,
        schema=spec.digest,
        num_rows=of.num_rows,
        crc32=zlib.crc32(of.body),
        body=of.body,
    )


class Rig:
    """A collector's store and keeper without its threads: each batch is sealed by itself, time is what a test says."""

    def __init__(self, store: Path, keep: Keep | None = None, rules: MergeRules | None = RULES) -> None:
        self.now = 0.0
        self.writer = ShardWriter(store, SHARD, limits=Limits(max_bytes=1))
        self.ingest = Ingest(self.writer, clock=lambda: self.now, keep=keep)
        self.keeper = Keeper(self.writer, self.ingest, self.ingest.commit, rules=rules, clock=lambda: self.now)

    def take(self, *batches: Batch) -> None:
        for each in batches:
            self.ingest.take(each.epoch, frame(each))
            self.ingest.commit()

    def minute(self) -> None:
        self.now += LOOK_S
        self.keeper.tick()


def gone(store: Path) -> int:
    """Return the rows of `events` that are told to have gone, of files that have."""
    there = {name.file for name in list_segments(store, SEALED)}
    rows = [row for row in open_store(store).table("gaps").to_pylist() if row["reason"] in NOT_LOST]
    told = {(row["file"], row["source_epoch"]): row["num_rows"] for row in rows if row["table"] == "events"}
    return sum(num for (file, _), num in told.items() if file not in there)


def test_it_merges_once_there_is_enough_and_what_was_stored_is_not_taken_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.take(*(events(n) for n in range(3)))
    rig.minute()
    assert len(list_segments(tmp_path, SEALED, "events")) == 3
    rig.take(events(3))
    rig.minute()
    (merged,) = list_segments(tmp_path, SEALED, "events")
    assert rows_in(tmp_path, "events") == [(EPOCH, n) for n in range(12)]
    assert merged in (read_catalog(tmp_path) or {})
    rig.take(events(4))
    rig.ingest.close()
    again = Rig(tmp_path)
    again.take(*(events(n) for n in range(5)))  # a probe sends all of it again
    again.ingest.close()
    assert rows_in(tmp_path, "events") == [(EPOCH, n) for n in range(15)]
    numbers = [name.number for name in list_segments(tmp_path, SEALED)]
    assert len(set(numbers)) == len(numbers), "no number twice"


def test_without_compaction_it_still_erases_and_keeps_the_catalog(tmp_path: Path) -> None:
    rig = Rig(tmp_path, rules=None)
    rig.take(*(events(n) for n in range(6)))
    rig.minute()
    assert len(list_segments(tmp_path, SEALED, "events")) == 6
    assert read_catalog(tmp_path) and not list_twins(tmp_path)
    rig.ingest.close()


def test_what_expires_while_it_merges_is_in_the_account_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, keep=Keep(max_bytes=1, max_age_s=None))
    rig.take(*(events(n) for n in range(8)))
    for _ in range(6):
        rig.now += SWEEP_S
        rig.ingest.commit()  # tells what is to go, and unlinks what was told
        rig.keeper.look()
        assert len(rows_in(tmp_path, "events")) + gone(tmp_path) == 24
    rig.ingest.close()
    assert gone(tmp_path) > 0


def test_what_one_part_has_claimed_no_other_takes() -> None:
    claims = Claims()
    a, b, c = (SegmentName("events", "a", n) for n in range(3))
    assert claims.take([a, b])
    assert not claims.take([b, c]) and claims.take([c])
    claims.give([a, b])
    assert claims.take([b])


def test_an_order_that_is_due_is_carried_out_at_the_next_tick_in_open_files_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.writer._limits = Limits()
    rig.take(batch("captures", [{"request": "mine"}, {"request": "other"}], seq=0, first=0))
    seal(tmp_path, batch("captures", [{"request": "mine"}], seq=0, first=0, epoch=8), shard="dead")
    run("erase", tmp_path, "--request", "mine", "--yes", "--now", "--timeout", "1s")
    rig.keeper.tick()
    assert b"mine" not in b"".join(path.read_bytes() for path in (tmp_path / "v1").rglob("captures/*.arrow"))
    erased = [row for row in open_store(tmp_path).table("gaps").to_pylist() if row["reason"] == ERASED]
    assert sorted((row["source_epoch"], row["num_rows"]) for row in erased) == [(EPOCH, 1), (8, 1)]
    before = list_segments(tmp_path, SEALED)
    rig.keeper.tick()
    assert list_segments(tmp_path, SEALED) == before, "once is enough"
    rig.ingest.close()


def test_a_running_collector_erases_when_a_command_asks(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server:
        rows = batch("captures", [{"request": "mine"}, {"request": "other"}], seq=0, first=0)
        server.ingest.take(EPOCH, frame(rows))
        server.ingest.commit()
        done = run("erase", tmp_path, "--request", "mine", "--yes", "--now", "--json")
        assert (done.exit_code, json.loads(done.stdout)["still_in"]) == (0, []), done.output
        assert b"mine" not in b"".join(path.read_bytes() for path in (tmp_path / "v1").rglob("captures/*"))
        server.ingest.take(EPOCH, frame(rows))  # sent again: known, though a row of it has gone
    assert rows_in(tmp_path, "captures") == [(EPOCH, 1)]


def test_whatever_fails_is_said_once_and_the_next_look_does_better(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.take(*(events(n) for n in range(4)))
    (tmp_path / "v1" / "erased.json").write_text("{")
    rig.minute()
    rig.minute()
    assert caplog.text.count("cannot be kept in order for now") == 1
    (tmp_path / "v1" / "erased.json").unlink()
    rig.minute()
    assert len(list_segments(tmp_path, SEALED, "events")) == 1
    rig.ingest.close()


def test_it_gets_out_of_the_way_when_the_collector_stops(tmp_path: Path) -> None:
    begin = time.monotonic()
    CollectorServer(tmp_path, port=0).stop()
    assert time.monotonic() - begin < 30


def test_row_31_a_second_collector_on_one_store_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as first:
        with pytest.raises(ShardLocked, match="already writes shard 'collector'"):
            CollectorServer(tmp_path, port=0)
        first.ingest.take(EPOCH, frame(events(0)))
    assert len(rows_in(tmp_path, "events")) == 3


def test_row_31_a_store_whose_disk_was_swapped_under_its_collector_loses_nothing_it_called_durable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    rig = Rig(store)
    rig.writer._limits = Limits()
    rig.ingest.health.readiness.started()
    rig.take(events(0))
    store.rename(away)
    with pytest.raises(StoreGone):
        rig.take(events(1))  # nothing is mounted there: not taken, so its probe keeps it
    store.mkdir()
    with caplog.at_level(logging.ERROR, "insitu"), pytest.raises(StoreGone):
        rig.take(events(1))  # another disk is, without what tells whose rows these are
    rig.ingest.commit()
    assert "has gone while it was written" in caplog.text
    assert "not ready: the store has gone; put it back, or start again this collector" in caplog.text
    assert list(store.iterdir()) == [], "nothing is made anew"
    assert len(rows_in(away, "events")) == 3
    store.rmdir()
    away.rename(store)
    rig.take(events(1))
    rig.ingest.close()
    assert len(rows_in(store, "events")) == 6


MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:40 / /data rw - nfs4 server:/data rw
31 30 8:2 / /data/local rw shared:7 - xfs /dev/sdb rw
32 22 0:41 / /with\040space rw - fuse.sshfs me@host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/store", "ext4"),
        ("/data/store", "nfs4"),
        ("/data/local/store", "xfs"),
        ("/database", "ext4"),
        ("/with space/store", "fuse.sshfs"),
    ],
)
def test_row_31_the_file_system_of_a_store_is_known(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_row_31_a_store_on_another_machine_s_disk_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 8:1 / / rw - ext4 /dev/root rw\n30 22 0:40 / {tmp_path} rw - nfs4 server:/data rw\n")
    assert warn_of_remote(tmp_path / "store", mounts)
    assert "lies on nfs4: a lock may not hold against another machine" in caplog.text
    assert not warn_of_remote(Path("/"), mounts)
    assert places.MOUNTS.exists() and not warn_of_remote(tmp_path), "this machine's own"
