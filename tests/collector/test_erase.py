"""`insitu store erase`: hidden at once, gone from every file in time, and every row still accounted for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from query_kit import verdict
from store_kit import batch, damage, rows_in, run, seal, source

from insitu.segments.erased_file import ErasedFile, ErasedUnreadable
from insitu.segments.layout import OPEN, QUARANTINE, SEALED, list_segments
from insitu.segments.reader import recent_keys
from insitu.segments.replacement import Step
from insitu.segments.shard import ShardWriter
from insitu.vocabulary import ERASED, RequestEvent
from insitu_collector.keeping.passes import Clean, erase_shard
from insitu_collector.keeping.recorder import Recorder
from insitu_collector.keeping.rewriting import Rewritten
from insitu_collector.keeping.shards import dead_shard
from insitu_collector.keeping.twins import list_twins
from insitu_collector.store import open_store

SECRET = "patient-4711"
TRACE = "00112233445566778899aabbccddeeff"


def fill(store: Path, shard: str = "a") -> None:
    """Write a store in which one of two requests is to be erased."""
    captures = [
        {"step_id": n, "site": 1, "request": SECRET if n % 3 == 0 else "other", "data": b"\x01\x02\x03\x04" * 8}
        for n in range(9)
    ]
    requests = [
        {"request": name, "trace_id": trace, "event": int(RequestEvent.ARRIVED), "t_ns": 1}
        for name, trace in ((SECRET, TRACE), ("other", "f" * 32))
    ]
    steps = [{"step_id": 0, "rows": [{"request": SECRET, "row": 0}, {"request": "other", "row": 1}]}]
    spans = [{"trace_id": TRACE, "name": "mine"}, {"trace_id": "f" * 32, "name": "another's"}]
    verdicts = [verdict(7, "cafecafe-1", f"requests {SECRET}, other", requests=[SECRET, "other"])]
    seal(store, source(7), shard=shard)
    for n in range(3):
        seal(store, batch("captures", captures[3 * n : 3 * n + 3], seq=n, first=3 * n), shard=shard)
    for table, rows in (("requests", requests), ("steps", steps), ("spans", spans), ("verdicts", verdicts)):
        seal(store, batch(table, rows, seq=0, first=0), shard=shard)


def holds(store: Path, word: str = SECRET) -> list[str]:
    """Return the files of a store that have a word in them."""
    files = [path for path in store.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(store)) for path in files if word.encode() in path.read_bytes())


def account(store: Path) -> dict[str, int]:
    """Return the erased rows by table, of files that have gone."""
    there = {name.file for name in list_segments(store, SEALED)}
    gone = {}
    for row in open_store(store).table("gaps").to_pylist():
        if row["reason"] == ERASED and row["file"] not in there:
            gone[row["file"], row["source_epoch"]] = row["table"], row["num_rows"]
    counted: dict[str, int] = {}
    for table, num_rows in gone.values():
        counted[table] = counted.get(table, 0) + num_rows
    return counted


def test_without_yes_it_only_says_what_it_would_do(tmp_path: Path) -> None:
    fill(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = run("erase", tmp_path, "--request", SECRET, "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert (answer["done"], answer["rows"]) == (False, {"captures": 3, "requests": 1, "spans": 1})
    assert answer["names_taken_out"] == {"steps": 1, "verdicts": 1}
    assert "add --yes" in found.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_it_is_hidden_at_once_and_gone_with_the_next_compaction(tmp_path: Path) -> None:
    fill(tmp_path)
    run("compact", tmp_path)
    assert list_twins(tmp_path)
    done = run("erase", tmp_path, "--request", SECRET, "--yes", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["due_unix_ns"] - time.time_ns() == pytest.approx(24 * 3600 * 1e9, rel=0.01)
    store = open_store(tmp_path)
    assert store.table("captures")["request"].to_pylist() == ["other"] * 6
    assert store.hidden == {("captures", 7): 3}
    assert store.table("spans")["name"].to_pylist() == ["another's"]
    assert [e["request"] for e in store.table("steps")["rows"].to_pylist()[0]] == ["other"]
    assert store.table("verdicts")["requests"].to_pylist() == [["other"]]
    assert store.sql("select count(*) as n from captures").to_pylist() == [{"n": 6}]
    assert holds(tmp_path), "the bytes are there until they are due"
    assert not any("twins" in name for name in holds(tmp_path)), "other programs read twins, so these went at once"
    assert run("compact", tmp_path).exit_code == 0
    assert holds(tmp_path) == [] == holds(tmp_path, TRACE)
    assert account(tmp_path) == {"captures": 3, "requests": 1, "spans": 1}
    again = open_store(tmp_path)
    assert len(again.table("captures")) + account(tmp_path)["captures"] == 9, "stored + erased = produced"
    assert again.hidden == {}
    assert run("verify", tmp_path).exit_code == 0


def test_with_now_the_bytes_are_gone_when_it_returns(tmp_path: Path) -> None:
    fill(tmp_path)
    done = run("erase", tmp_path, "--request", SECRET, "--yes", "--now", "--json")
    assert (done.exit_code, json.loads(done.stdout)["still_in"]) == (0, [])
    assert holds(tmp_path) == []
    (event,) = open_store(tmp_path).table("events").to_pylist()
    assert event["kind"] == "erased"
    assert "5 rows (3 of captures, 1 of requests, 1 of spans) hidden" in event["text"]
    assert SECRET not in event["text"]


def test_what_comes_later_of_an_erased_request_is_hidden_and_goes_too(tmp_path: Path) -> None:
    fill(tmp_path)
    run("erase", tmp_path, "--request", SECRET, "--yes", "--now")
    late = batch("captures", [{"step_id": 99, "request": SECRET}], seq=9, first=50)
    seal(tmp_path, late)
    assert (7, 50) not in rows_in(tmp_path, "captures")
    run("compact", tmp_path)
    assert holds(tmp_path) == []
    assert account(tmp_path)["captures"] == 4


def test_a_batch_that_lost_all_its_rows_is_still_known_so_that_none_comes_again(tmp_path: Path) -> None:
    seal(tmp_path, batch("captures", [{"request": SECRET}], seq=5, first=0))
    run("erase", tmp_path, "--request", SECRET, "--yes", "--now")
    assert [key.seq for key in recent_keys(tmp_path, "a")] == [5]
    assert rows_in(tmp_path, "captures") == []


def test_a_crash_between_telling_and_rewriting_counts_no_row_twice(tmp_path: Path) -> None:
    fill(tmp_path)
    run("erase", tmp_path, "--request", SECRET, "--yes")

    def fail(step: Step) -> None:
        if step is Step.CHECKED:
            raise OSError("the disk has gone")

    erased = ErasedFile(tmp_path).read()
    with Recorder(tmp_path) as recorder, dead_shard(tmp_path, "a", recorder.tell) as shard:
        assert shard is not None
        with pytest.raises(OSError, match="has gone"):
            erase_shard(tmp_path, shard, erased, recorder.tell, Clean(), Rewritten(), fail)
    assert account(tmp_path) == {}, "told, and its file is still there"
    run("compact", tmp_path)
    assert account(tmp_path)["captures"] == 3 and holds(tmp_path) == []


def test_quarantined_files_and_what_is_damaged_keep_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    first = list_segments(tmp_path, SEALED, "captures")[0]
    damage(first.path(tmp_path, SEALED), b"\x01\x02\x03\x04")
    kept = first.path(tmp_path, QUARANTINE)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(first.path(tmp_path, SEALED).read_bytes())
    done = run("erase", tmp_path, "--request", SECRET, "--yes", "--now", "--json")
    assert json.loads(done.stdout)["quarantined"] == 1
    assert holds(tmp_path) == []
    reasons = {row["reason"] for row in open_store(tmp_path).table("gaps").to_pylist()}
    assert reasons == {ERASED, "corrupt"}


def test_of_a_shard_that_is_being_written_it_is_hidden_and_that_is_said(tmp_path: Path) -> None:
    fill(tmp_path)
    writer = ShardWriter(tmp_path, "living")
    writer.append(batch("captures", [{"request": SECRET}, {"request": "other"}], seq=0, first=100))
    writer.sync()
    done = run("erase", tmp_path, "--request", SECRET, "--yes", "--now", "--timeout", "1s", "--json")
    assert (done.exit_code, json.loads(done.stdout)["still_in"]) == (5, ["captures/living-0000000000.arrow"])
    assert SECRET not in open_store(tmp_path).table("captures")["request"].to_pylist()
    found = run("verify", tmp_path, "--json")
    assert found.exit_code == 3
    assert [p["kind"] for p in json.loads(found.stdout)["problems"]] == ["not_erased"]
    writer.close()
    assert run("compact", tmp_path).exit_code == 0
    assert holds(tmp_path) == []
    assert run("verify", tmp_path).exit_code == 0


def test_an_order_names_nobody_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    fill(tmp_path)
    run("erase", tmp_path, "--request", SECRET, "--yes", "--now")
    path = tmp_path / "v1" / "erased.json"
    assert SECRET not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    orders = json.loads(path.read_text())["erasures"]
    run("erase", tmp_path, "--request", SECRET, "--yes")
    again = json.loads(path.read_text())["erasures"]
    assert len(again) == 1 and again[0]["traces"] == orders[0]["traces"] != [], "what was known of it is kept"


def test_when_orders_cannot_be_read_nothing_is_shown(tmp_path: Path) -> None:
    fill(tmp_path)
    run("erase", tmp_path, "--request", SECRET, "--yes")
    (tmp_path / "v1" / "erased.json").write_text("{")
    with pytest.raises(ErasedUnreadable, match="could not be hidden"):
        open_store(tmp_path).table("captures")
    found = run("ls", tmp_path)
    assert found.exit_code == 1 and "erased.json cannot be read" in found.output


def test_open_files_of_dead_writers_are_looked_through_too(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "dead")
    writer.append(batch("captures", [{"request": SECRET}, {"request": "other"}], seq=0, first=0))
    writer.sync()
    writer._shard_lock.release()  # as a kill does
    assert list_segments(tmp_path, OPEN)
    run("erase", tmp_path, "--request", SECRET, "--yes", "--now")
    assert holds(tmp_path) == [] and rows_in(tmp_path, "captures") == [(7, 1)]
    writer._open["captures"].close()


def test_one_of_request_and_tenant_is_given_and_a_tenant_is_known(tmp_path: Path) -> None:
    fill(tmp_path)
    assert "one of them" in run("erase", tmp_path).output
    assert "no process of tenant 'acme'" in run("erase", tmp_path, "--tenant", "acme", "--yes").output
    assert "is no length of time" in run("erase", tmp_path, "--request", "a", "--within", "soon").output
    assert "no store at" in run("erase", tmp_path / "nowhere", "--request", "a").output


@pytest.mark.parametrize("option", ["--request", "--tenant"])
@pytest.mark.parametrize("name", ["", " \t", "\udcff\udcfe"])
def test_a_name_that_is_none_erases_nothing(tmp_path: Path, option: str, name: str) -> None:
    fill(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = run("erase", tmp_path, option, name, "--yes", "--now")
    assert found.exit_code == 2 and f"Error: {option} is " in found.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_of_a_tenant_all_that_its_processes_wrote_and_write_goes(tmp_path: Path) -> None:
    seal(tmp_path, source(7, tenant="acme"), source(8, tenant="other"))
    captures = [{"request": "one"}, {"request": "two"}]
    seal(tmp_path, batch("captures", captures, seq=0, first=0), batch("captures", captures, seq=0, first=0, epoch=8))
    found = json.loads(run("erase", tmp_path, "--tenant", "acme", "--yes", "--now", "--json").stdout)
    assert found["rows"] == {"sources": 1, "captures": 2}
    seal(tmp_path, batch("captures", captures, seq=1, first=2))
    assert rows_in(tmp_path, "captures") == [(8, 0), (8, 1)]
    run("compact", tmp_path)
    assert account(tmp_path) == {"sources": 1, "captures": 4}
