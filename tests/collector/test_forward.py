"""A store is sent to a real collector: each row once, whatever was sent before, lost, torn or stopped in between."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.exporters import Batch
from insitu.forwarding.cursor import Cursor, Streams, document, merged, parse
from insitu.forwarding.forwarder import Forwarder, Unreachable
from insitu.records import schema_of
from insitu.segments.layout import Key, list_segments
from insitu.segments.shard import Limits, ShardWriter
from insitu_collector.access.gate import Access
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import append_entry
from insitu_collector.access.tokens import Entry, digest_of, new_token
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store


def events(seq: int, epoch: int = 7, row_seq: int | None = None) -> Batch:
    number = seq if row_seq is None else row_seq
    rows = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": number, "t_ns": 0, "kind": "incident"}]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def write(store: Path, shard: str, *batches: Batch, segment_bytes: int = 1) -> None:
    """Write and seal a shard; by default a segment a batch."""
    writer = ShardWriter(store, shard, limits=Limits(max_bytes=segment_bytes))
    for batch in batches:
        writer.append(batch)
        writer.sync()
    writer.close()


def stored(store: Path, epoch: int = 7) -> list[int]:
    """Return the row numbers of a process's events, in order."""
    table = open_store(store).table("events")
    rows = zip(table["epoch"].to_pylist(), table["row_seq"].to_pylist(), strict=True)
    return sorted(seq for of, seq in rows if of == epoch)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CollectorServer]:
    with CollectorServer(tmp_path / "there", port=0) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def to(server: CollectorServer) -> str:
    return f"grpc://127.0.0.1:{server.port}"


def test_all_processes_of_a_store_are_sent_once_and_a_second_time_nothing_is(
    server: CollectorServer, here: Path
) -> None:
    for epoch in range(12):  # more than are sent side by side
        write(here, f"h-{epoch}", *(events(seq, epoch) for seq in range(5)))
    first = Forwarder(here, to(server)).run()
    assert (first.num_rows, first.num_batches, first.num_segments, len(first.epochs)) == (60, 60, 60, 12)
    assert [stored(server.store, epoch) for epoch in range(12)] == [[0, 1, 2, 3, 4]] * 12
    again = Forwarder(here, to(server)).run()
    assert (again.num_rows, again.num_segments) == (0, 0)
    write(here, "h-99", events(0, 99))
    assert Forwarder(here, to(server)).run().num_rows == 1
    assert len(list_segments(here, "sealed")) == 61, "a store keeps what it has"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": "insitu.cursor/1", "to": "grpc://other:1"}'])
def test_without_its_cursor_all_is_sent_again_and_stored_once(
    server: CollectorServer, here: Path, text: str | None
) -> None:
    write(here, "h-1", *map(events, range(5)))
    Forwarder(here, to(server)).run()
    (cursor,) = here.glob("v1/forward/*.json")
    cursor.unlink()
    if text is not None:
        cursor.write_text(text)
    assert Forwarder(here, to(server)).run().num_rows == 5
    assert stored(server.store) == [0, 1, 2, 3, 4]


def test_two_destinations_have_a_cursor_each(server: CollectorServer, here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(3)))
    Forwarder(here, to(server)).run()
    with CollectorServer(tmp_path / "second", port=0) as second:
        assert Forwarder(here, to(second)).run().num_rows == 3
        assert stored(second.store) == [0, 1, 2]


def test_what_a_dead_process_left_open_is_sent_and_what_a_living_one_writes_waits(
    server: CollectorServer, here: Path, tmp_path: Path
) -> None:
    scratch = ShardWriter(tmp_path / "scratch", "h-1")
    scratch.append(events(0))
    scratch.sync()
    left = here / "v1/open/events/h-1-0000000000.arrow"
    left.parent.mkdir(parents=True)
    left.write_bytes((tmp_path / "scratch/v1/open/events/h-1-0000000000.arrow").read_bytes())
    scratch.close()
    living = ShardWriter(here, "h-2")
    living.append(events(0, epoch=8))
    living.sync()
    forwarder = Forwarder(here, to(server))
    assert forwarder.run().num_rows == 1
    assert (stored(server.store), stored(server.store, 8)) == ([0], [])
    living.close()
    assert forwarder.run().num_rows == 1
    assert stored(server.store, 8) == [0]


def test_a_batch_that_lies_behind_later_ones_is_sent_too(server: CollectorServer, here: Path) -> None:
    """So a collector's own shard has them, once a failed sync was sent again."""
    for seq in (0, 1, 4, 2, 5, 3, 6):
        write(here, "collector", events(seq))
    forwarder = Forwarder(here, to(server), timeout_s=20)
    assert forwarder.run().num_rows == 7
    assert stored(server.store) == list(range(7))
    assert forwarder.run().num_rows == 0


def test_a_late_batch_is_sent_though_the_cursor_is_past_it(server: CollectorServer, here: Path) -> None:
    for seq in (0, 1, 4):
        write(here, "collector", events(seq))
    forwarder = Forwarder(here, to(server), timeout_s=20)
    forwarder.run()
    write(here, "collector", events(2), events(3), events(5))
    assert forwarder.run().num_rows == 3
    assert stored(server.store) == list(range(6))
    assert forwarder.run().num_rows == 0


def test_what_cannot_be_read_is_told_where_it_is_missed(server: CollectorServer, here: Path) -> None:
    write(here, "h-1", *map(events, range(3)), segment_bytes=1 << 20)
    (name,) = list_segments(here, "sealed")
    path = name.path(here, "sealed")
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    at = data.find(b"incident", data.find(b"incident") + 8)  # the second batch
    data[at] ^= 1
    path.write_bytes(data)
    result = Forwarder(here, to(server)).run()
    assert (result.num_rows, result.num_unreadable) == (2, 1)
    assert stored(server.store) == [0, 2]
    gaps = [row for row in open_store(server.store).table("gaps").to_pylist() if row["source_epoch"] == 7]
    assert [(row["seq_from"], row["num_rows"], row["reason"]) for row in gaps] == [(1, 1, "corrupt")]
    assert Forwarder(here, to(server)).run().num_unreadable == 0, "told once"


def test_what_the_collector_refuses_is_counted_and_told(server: CollectorServer, here: Path) -> None:
    write(here, "h-1", events(0), events(1, row_seq=-1), events(2))
    result = Forwarder(here, to(server)).run()
    assert result.refused == {"refused_invalid": 1}
    assert stored(server.store) == [0, 2]
    gaps = open_store(server.store).table("gaps").to_pylist()
    assert [(row["seq_from"], row["reason"]) for row in gaps] == [(1, "refused_invalid")]
    assert Forwarder(here, to(server)).run().num_batches == 0


def test_remove_unlinks_what_is_there_and_nothing_a_living_writer_needs(server: CollectorServer, here: Path) -> None:
    write(here, "h-1", *map(events, range(3)))
    living = ShardWriter(here, "h-2", limits=Limits(max_bytes=1))
    for seq in range(3):
        living.append(events(seq, epoch=8))
        living.sync()
    result = Forwarder(here, to(server), remove=True).run()
    assert result.num_removed == 5
    assert [(name.shard, name.number) for name in list_segments(here, "sealed")] == [("h-2", 2)]
    living.append(events(3, epoch=8))
    living.close()
    Forwarder(here, to(server), remove=True).run()
    assert stored(server.store, 8) == [0, 1, 2, 3]
    assert list_segments(here, "sealed") == []


def test_a_collector_that_is_not_there_is_waited_for_so_long_and_nothing_is_forgotten(here: Path) -> None:
    write(here, "h-1", events(0))
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(Unreachable):
        Forwarder(here, f"grpc://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.3).run()
    assert list(here.glob("v1/forward/*.json")) == []
    assert len(list_segments(here, "sealed")) == 1


def test_another_store_at_the_same_address_gets_all_before_anything_is_removed(here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(5)))
    with CollectorServer(tmp_path / "first", port=0) as first:
        Forwarder(here, to(first)).run()
    with CollectorServer(tmp_path / "second", port=first.port) as second:
        sent = Forwarder(here, to(second), remove=True).run()
        assert (sent.num_rows, sent.num_removed) == (5, 5)
        assert stored(second.store) == [0, 1, 2, 3, 4]


def test_a_store_is_the_same_one_after_a_restart(here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(5)))
    with CollectorServer(tmp_path / "there", port=0) as first:
        Forwarder(here, to(first)).run()
    with CollectorServer(tmp_path / "there", port=first.port) as again:
        assert Forwarder(here, to(again)).run().num_rows == 0


def test_a_collector_that_tells_no_identity_is_sent_to_once_and_trusted_for_no_other(
    here: Path, tmp_path: Path
) -> None:
    write(here, "h-1", *map(events, range(5)))
    (tmp_path / "there/v1/id").mkdir(parents=True)
    with CollectorServer(tmp_path / "there", port=0) as server:
        assert [Forwarder(here, to(server)).run().num_rows for _ in range(2)] == [5, 0]
    with CollectorServer(tmp_path / "other", port=server.port) as other:
        assert Forwarder(here, to(other)).run().num_rows == 5


def test_a_store_that_takes_the_place_of_another_while_it_is_sent_is_noticed(here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(5)))
    with ExitStack() as stack:
        first = CollectorServer(tmp_path / "first", port=0)
        address, asked = to(first), 0

        def clock() -> float:
            nonlocal asked
            asked += 1
            if asked == 3:  # the first two are of the question which store it is
                first.stop()
                stack.enter_context(CollectorServer(tmp_path / "second", port=first.port))
            return time.monotonic()

        with pytest.raises(Unreachable, match="another store"):
            Forwarder(here, address, remove=True, clock=clock).run()
        assert len(list_segments(here, "sealed")) == 5
        assert Forwarder(here, address, remove=True).run().num_removed == 5
        assert stored(tmp_path / "second") == [0, 1, 2, 3, 4]


def test_with_nobody_there_nothing_is_removed_and_it_is_said_at_once(here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(5)))
    with CollectorServer(tmp_path / "first", port=0) as first:
        Forwarder(here, to(first)).run()
    said = CliRunner().invoke(command, ["forward", str(here), "--to", to(first), "--remove", "--timeout", "1h"])
    assert said.exit_code == ExitCode.UNREACHABLE
    assert said.stdout == ""
    (line,) = said.stderr.splitlines()
    assert f"no collector answers at {to(first)}" in line
    assert len(list_segments(here, "sealed")) == 5


def test_a_caller_that_may_not_ship_is_told_so_and_removes_nothing(here: Path, tmp_path: Path) -> None:
    write(here, "h-1", *map(events, range(5)))
    with CollectorServer(tmp_path / "there", port=0) as first:
        Forwarder(here, to(first)).run()
    token_file = tmp_path / "tokens"
    append_entry(token_file, Entry("a", frozenset({Role.SHIP}), sha256=digest_of(new_token())))
    with (
        CollectorServer(tmp_path / "there", port=first.port, access=Access(tokens=token_file)) as second,
        pytest.raises(Unreachable, match="refuses this caller"),
    ):
        Forwarder(here, to(second), remove=True).run()
    assert len(list_segments(here, "sealed")) == 5


def test_the_command_says_what_became_of_it(server: CollectorServer, here: Path) -> None:
    write(here, "h-1", *map(events, range(3)))
    arguments = ["forward", str(here), "--to", to(server)]
    said = CliRunner().invoke(command, [*arguments, "--json"])
    assert said.exit_code == ExitCode.OK, said.output
    found = json.loads(said.stdout)
    assert (found["schema"], found["rows"], found["processes"]) == ("insitu.forward/1", 3, 1)
    again = CliRunner().invoke(command, [*arguments, "--remove"])
    assert (again.exit_code, again.stdout) == (ExitCode.OK, f"{to(server)} has all of it already\n")
    assert list_segments(here, "sealed") == [], "sent before, and removed now"
    write(here, "h-2", events(0, epoch=8, row_seq=-1))
    assert CliRunner().invoke(command, arguments).exit_code == ExitCode.PARTIAL
    for bad in (["--to", "http://x"], ["--to", "grpc://x"], ["--to", "grpc://x:1", "--timeout", "soon"]):
        assert CliRunner().invoke(command, ["forward", str(here), *bad]).exit_code == ExitCode.USAGE
    write(here, "h-3", events(0, epoch=9))
    away = CliRunner().invoke(command, ["forward", str(here), "--to", "grpc://127.0.0.1:1", "--timeout", "1s"])
    assert away.exit_code == ExitCode.UNREACHABLE
    assert len(away.stderr.splitlines()) >= 1


keys = st.builds(Key, st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(0, 30))


@given(st.lists(keys, max_size=20))
def test_a_cursor_holds_what_was_noted_and_nothing_else(notes: list[Key]) -> None:
    streams: Streams = {}
    for key in notes:
        streams[key.epoch, key.stream] = merged(streams.get((key.epoch, key.stream), ()), [key.seq])
    written = json.loads(json.dumps(document(streams, "grpc://h:1")))
    read = parse(written, "grpc://h:1")
    held = {Key(*stream, seq) for stream, ranges in read.items() for each in ranges for seq in range(*each)}
    assert held == set(notes)
    assert all(a[1] < b[0] for ranges in read.values() for a, b in pairwise(ranges)), "disjoint, in order"
    with pytest.raises(ValueError, match="no cursor"):
        parse(written, "grpc://h:2")


def test_a_saved_cursor_is_the_next_ones(tmp_path: Path) -> None:
    cursor = Cursor(tmp_path, "grpc://h:1")
    cursor.note([Key(7, 3, 5), Key(7, 3, 4), Key(8, 3, 1)])
    cursor.keep_only({7})
    cursor.save()
    again = Cursor(tmp_path, "grpc://h:1")
    assert [key in again for key in (Key(7, 3, 4), Key(7, 3, 5), Key(7, 3, 6), Key(8, 3, 1), Key(7, 4, 4))] == [
        True,
        True,
        False,
        False,
        False,
    ]
