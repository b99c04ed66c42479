"""The catalog says what is in each sealed segment, is made of the files alone, and lost it is made again."""

from __future__ import annotations

import sqlite3
import zlib
from pathlib import Path

import pytest
from store_kit import batch, damage, events, run, seal, source

from insitu.records import VERSION
from insitu.segments.layout import SEALED
from insitu_collector.keeping import catalog
from insitu_collector.keeping.catalog import CatalogBusy, catalog_path, read_catalog, refresh
from insitu_collector.keeping.facts import SegmentFacts
from insitu_collector.store import open_store


def test_it_says_what_is_in_each_segment(tmp_path: Path) -> None:
    first, second = seal(tmp_path, events(0), events(1))
    seal(tmp_path, source(7, anchor_ns=1000))
    assert read_catalog(tmp_path) is None
    done = refresh(tmp_path)
    assert (done.num_segments, done.num_added, done.rebuilt) == (3, 3, True)
    known = read_catalog(tmp_path)
    assert known is not None
    facts = known[second]
    assert (facts.state, facts.num_rows, facts.num_batches, facts.version) == ("sealed", 3, 1, VERSION)
    assert (facts.unix_ns, facts.steps) == ((1003, 1005), (3, 5))
    assert facts.crc32 == zlib.crc32(second.path(tmp_path, SEALED).read_bytes())
    assert [(e, x.first_seq, x.last_seq, x.num_rows) for e, x in facts.epochs.items()] == [(7, 1, 1, 3)]
    first.path(tmp_path, SEALED).unlink()
    seal(tmp_path, events(2))
    done = refresh(tmp_path)
    assert (done.num_segments, done.num_added, done.num_removed, done.rebuilt) == (3, 1, 1, False)
    assert refresh(tmp_path).num_added == 0, "a segment is read once"


def test_times_of_a_process_that_is_not_known_are_not_guessed(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0))
    refresh(tmp_path)
    known = read_catalog(tmp_path)
    assert known is not None
    assert known[name].unix_ns is None
    assert known[name].may_hold(unix_ns=(10**18, 10**18 + 1)), "so it is read"


def test_segments_are_left_out_by_time_step_and_process(tmp_path: Path) -> None:
    seal(tmp_path, source(7, anchor_ns=1000))
    names = seal(tmp_path, events(0), events(1), events(2))
    seal(tmp_path, source(8, anchor_ns=1000))
    of_another = seal(tmp_path, events(1, epoch=8))
    refresh(tmp_path)
    known = read_catalog(tmp_path)
    assert known is not None

    def chosen(**asked: object) -> list[int]:
        return [n for n, name in enumerate([*names, *of_another]) if SegmentFacts.may_hold(known[name], **asked)]  # type: ignore[arg-type]

    assert chosen(unix_ns=(1003, 1004)) == [1, 3]
    assert chosen(unix_ns=(1006, 9999)) == [2]
    assert chosen(unix_ns=(0, 1000)) == []
    assert chosen(steps=(0, 3)) == [0, 1, 3]
    assert chosen(epochs={8}) == [3]
    tail = open_store(tmp_path).tail(["events"], skip=lambda name: not known[name].may_hold(steps=(6, 6)))
    assert tail.poll(final=True)["events"]["step_id"].to_pylist() == [6, 7, 8]
    tail.close()


@pytest.mark.parametrize("harm", ["deleted", "garbage", "empty", "of another version", "a table is gone"])
def test_row_08_lost_or_corrupt_it_is_made_again_with_identical_counts(tmp_path: Path, harm: str) -> None:
    seal(tmp_path, *(events(n) for n in range(4)), source(7))
    refresh(tmp_path)
    before, path = read_catalog(tmp_path), catalog_path(tmp_path)
    if harm == "deleted":
        path.unlink()
    elif harm in ("garbage", "empty"):
        path.write_bytes(b"no database" * 1000 if harm == "garbage" else b"")
    else:
        db = sqlite3.connect(path)
        db.execute("pragma user_version = 99" if harm == "of another version" else "drop table epochs")
        db.close()
    assert len(open_store(tmp_path).table("events")) == 12, "readers work without it"
    done = refresh(tmp_path)
    assert (done.rebuilt, done.num_added) == (True, 5)
    assert read_catalog(tmp_path) == before


def test_a_damaged_segment_is_in_it_as_such(tmp_path: Path) -> None:
    names = seal(tmp_path, events(0), events(1))
    damage(names[0].path(tmp_path, SEALED))
    refresh(tmp_path)
    known = read_catalog(tmp_path)
    assert known is not None
    assert [known[name].state for name in names] == ["damaged", "sealed"]


def test_while_another_writes_it_nobody_waits_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "WAIT_S", 0.01)
    seal(tmp_path, events(0))
    refresh(tmp_path)
    other = sqlite3.connect(catalog_path(tmp_path), isolation_level=None)
    other.execute("begin exclusive")
    seal(tmp_path, events(1))
    with pytest.raises(CatalogBusy, match="try again"):
        refresh(tmp_path)
    assert read_catalog(tmp_path) is None
    assert run("ls", tmp_path).exit_code == 0, "it is read from the files"
    other.execute("rollback")
    other.close()
    assert refresh(tmp_path).num_added == 1


def test_rows_without_times_and_steps_have_none(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, batch("sites", [{"site": 1, "name": "logits"}], seq=0, first=0))
    refresh(tmp_path)
    known = read_catalog(tmp_path)
    assert known is not None
    assert (known[name].unix_ns, known[name].steps) == (None, None)
