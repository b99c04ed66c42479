"""What `insitu store verify` tells to do about what it finds does away with that, or says who has to come first."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from store_kit import batch, damage, events, run, seal, source
from test_keep_store import newer

from insitu.cli import ExitCode
from insitu.segments.erased_file import ErasedFile
from insitu.segments.erasure import Erasure, Kind, digest
from insitu.segments.layout import OPEN, SEALED, SegmentName, list_segments
from insitu.segments.shard import ShardWriter
from insitu_collector.keeping import verifying
from insitu_collector.keeping.catalog import catalog_path
from insitu_collector.keeping.facts import Anchors, SegmentFacts, facts_of
from insitu_collector.keeping.twins import twin_path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one merged segment, with catalog and twins, whose shard `a` nobody writes."""
    seal(tmp_path, *(events(number) for number in range(3)), source(7))
    assert run("compact", tmp_path).exit_code == 0
    return tmp_path


@pytest.fixture
def living(store: Path) -> Iterator[Callable[[str], ShardWriter]]:
    with ExitStack() as stack:
        yield lambda shard: stack.enter_context(closing(ShardWriter(store, shard)))


def verified(store: Path) -> dict[str, Any]:
    """Return the document of `verify`; its lines end with the same remedies."""
    found = run("verify", store, "--json")
    document: dict[str, Any] = json.loads(found.stdout)
    if document["remedies"]:
        assert "not whole; " + "; ".join(document["remedies"]) in run("verify", store).stdout
    return document | {"exit": found.exit_code}


def kinds(document: dict[str, Any]) -> list[str]:
    return [problem["kind"] for problem in document["problems"]]


def merged(store: Path) -> SegmentName:
    return list_segments(store, SEALED, "events")[0]


def order_alone(store: Path) -> None:
    """Write an order to erase a request down that is due, and do nothing else, as a command that is killed then."""
    file = ErasedFile(store)
    file.add(Erasure(Kind.REQUEST, digest(file.salt(), "req-1"), 0, 1, "", ()))


def captured(seq: int = 0) -> Any:
    return batch("captures", [{"request": "req-1"}], seq=seq, first=seq)


# -- what a command does away with -----------------------------------------------------------------------------------


def test_what_is_not_erased_is_compacted_and_repair_is_for_the_rest(store: Path) -> None:
    seal(store, captured())
    order_alone(store)
    found = verified(store)
    assert (kinds(found), found["remedies"]) == (["not_erased"], [f"insitu store compact {store}"])
    twin_path(store, merged(store)).write_bytes(b"PAR1")
    both = [f"insitu store compact {store}", f"insitu store repair {store}"]
    assert verified(store)["remedies"] == both, "in this order: repair keeps originals of what is damaged"
    for word in ("compact", "repair"):
        assert run(word, store).exit_code == ExitCode.OK
    assert verified(store)["exit"] == ExitCode.OK


def test_what_is_no_file_is_moved_away_by_people_and_keeps_repair_from_nothing(store: Path) -> None:
    odd = [store / "v1" / state / "events" / "b-0000000000.arrow" for state in (OPEN, SEALED)]
    for path in odd:
        path.mkdir(parents=True)
    found = verified(store)
    assert (kinds(found), found["remedies"]) == (["damaged", "damaged"], ["move what is no file out of it"])
    twin_path(store, merged(store)).write_bytes(b"PAR1")
    assert verified(store)["remedies"] == ["move what is no file out of it", f"insitu store repair {store}"]
    assert run("repair", store).exit_code == ExitCode.OK
    for path in odd:
        path.rmdir()
    assert verified(store)["exit"] == ExitCode.OK


def test_a_folder_in_the_place_of_the_catalog_or_a_twin_is_moved_away(store: Path) -> None:
    odd = [catalog_path(store), twin_path(store, merged(store))]
    for path in odd:
        path.unlink()
        path.mkdir()
    found = verified(store)
    assert (kinds(found), found["remedies"]) == (["catalog", "twin"], ["move what is no file out of it"])
    for path in odd:
        path.rmdir()
    assert verified(store)["exit"] == ExitCode.OK


@pytest.mark.parametrize("table", ["events", "dreams"])
def test_an_open_file_of_a_newer_version_is_for_a_newer_insitu(store: Path, table: str) -> None:
    path = newer(store, table)
    moved = store / "v1" / OPEN / table / path.name
    moved.parent.mkdir(parents=True, exist_ok=True)
    path.rename(moved)
    for _ in range(2):
        found = verified(store)
        assert (kinds(found), found["remedies"], found["exit"]) == (["newer"], [], ExitCode.PARTIAL)
        assert found["problems"][0]["text"].endswith(": update insitu to read it")
        repaired = run("repair", store)
        assert repaired.exit_code == ExitCode.PARTIAL
        assert f"{table}/{path.name}: left as it is, of a newer format" in repaired.stdout
        assert "sealed, as far" not in repaired.stdout


# -- what somebody is at work on -------------------------------------------------------------------------------------


def test_what_is_damaged_in_a_shard_that_is_written_waits_for_its_end(
    store: Path, living: Callable[[str], ShardWriter]
) -> None:
    writer, path = living("a"), merged(store).path(store, SEALED)
    damage(path)
    catalog_path(store).unlink()
    wait = f"once nobody writes a: insitu store repair {store}"
    assert verified(store)["remedies"] == [wait]
    repaired = run("repair", store)
    assert repaired.exit_code == ExitCode.PARTIAL
    assert f"{merged(store)}: damaged, left to the writer of its shard; run this again once nobody writes a" in (
        repaired.stdout
    )
    assert json.loads(run("repair", store, "--dry-run", "--json").stdout)["left"] == [merged(store).file]
    assert verified(store)["remedies"] == [wait]
    writer.close()
    assert run("repair", store).exit_code == ExitCode.OK
    assert verified(store)["exit"] == ExitCode.OK


def test_damage_of_an_open_file_waits_for_the_end_of_its_writer(
    store: Path, living: Callable[[str], ShardWriter]
) -> None:
    writer = living("b")
    for number in range(3):
        writer.append(events(number, epoch=9))
    writer.sync()
    path = store / "v1/open/events/b-0000000000.arrow"
    content = bytearray(path.read_bytes())
    content[content.index(b"incident")] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    assert verified(store)["remedies"] == [f"once nobody writes b: insitu store repair {store}"]
    writer.close()
    run("repair", store)
    assert verified(store)["exit"] == ExitCode.OK


def test_what_is_not_erased_of_a_shard_that_is_written_waits_for_its_end(
    store: Path, living: Callable[[str], ShardWriter]
) -> None:
    writers = [living(shard) for shard in ("b", "c")]
    for number, writer in enumerate(writers):
        writer.append(captured(number))
        writer.sync()
    order_alone(store)
    assert verified(store)["remedies"] == [f"once nobody writes b, c: insitu store compact {store}"]
    for writer in writers:
        writer.close()
    assert run("compact", store).exit_code == ExitCode.OK
    assert verified(store)["exit"] == ExitCode.OK


def test_a_catalog_that_is_written_just_now_is_no_problem(store: Path) -> None:
    with closing(sqlite3.connect(catalog_path(store), isolation_level=None)) as other:
        other.execute("begin exclusive")
        found = verified(store)
    assert (found["exit"], found["catalog"]) == (ExitCode.OK, True)


def test_what_is_merged_while_verify_reads_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(tmp_path, *(events(number) for number in range(3)), source(7))
    run("ls", tmp_path)
    compacted: list[int] = []

    def look(store: Path, name: SegmentName, anchors: Anchors) -> SegmentFacts:
        if not compacted:
            compacted.append(run("compact", tmp_path).exit_code)
        return facts_of(store, name, anchors)

    monkeypatch.setattr(verifying, "facts_of", look)
    found = verified(tmp_path)
    assert (compacted, kinds(found), found["exit"]) == ([0], [], ExitCode.OK)


def test_what_has_gone_is_still_found(store: Path) -> None:
    twin = twin_path(store, merged(store))
    shutil.copy(twin, twin.with_name("b-0000000000.parquet"))
    merged(store).path(store, SEALED).unlink()
    found = verified(store)
    assert (kinds(found), found["remedies"]) == (["catalog", "twin", "twin"], [f"insitu store repair {store}"])
    assert run("repair", store).exit_code == ExitCode.OK
    assert verified(store)["exit"] == ExitCode.OK
