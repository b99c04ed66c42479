"""A store that is followed, in its folder or through a collector's port: each row once, and nothing sent again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from proxy_kit import Proxy
from query_kit import Recorder, capture, entry, source, step
from store_kit import run

from insitu.records import TABLES
from insitu.segments.layout import SEALED, list_segments
from insitu_collector.query.remote import RemoteStore
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import Store, open_store
from insitu_collector.tail import Tail

FOLLOWED = ("sources", "steps", "verdicts")
QUIET_BYTES = 400
"""What a look at three tables may cost that have nothing new."""
SECRET = "patient-4711"


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "store")
    made.write("sources", [source(7)])
    yield made
    made.close()


@pytest.fixture
def server(recorder: Recorder) -> Iterator[CollectorServer]:
    with CollectorServer(recorder.path, port=0, compact=False) as running:
        yield running


@pytest.fixture(params=["folder", "collector"])
def store(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[Store]:
    """The store that `recorder` writes, as its folder shows it and as a collector does."""
    if request.param == "folder":
        yield open_store(recorder.path)
        return
    with closing(open_store(request.getfixturevalue("server").address)) as opened:
        yield opened


@pytest.fixture
def tail(store: Store) -> Iterator[Tail]:
    with closing(store.tail(FOLLOWED)) as found:
        yield found


def write(recorder: Recorder, first: int, num: int = 1, request: str = "r") -> None:
    recorder.write("steps", [step(7, number, [entry(request, number, 1)]) for number in range(first, first + num)])


def steps(rows: dict[str, pa.Table]) -> list[int]:
    return rows["steps"]["step_id"].to_pylist() if "steps" in rows else []


def test_the_first_poll_gives_what_there_is_and_each_later_one_what_is_new(tail: Tail, recorder: Recorder) -> None:
    write(recorder, 0, 3)
    first = tail.poll()
    assert list(first) == ["sources", "steps"] and steps(first) == [0, 1, 2]
    assert tail.poll() == {}
    write(recorder, 3)
    recorder.seal()
    write(recorder, 4)
    assert steps(tail.poll()) == [3, 4]
    assert tail.poll(final=True) == {}


def test_rows_come_as_they_are_stored(store: Store, tail: Tail, recorder: Recorder) -> None:
    write(recorder, 0, 3)
    assert tail.poll()["steps"] == open_store(recorder.path).table("steps") == store.table("steps")
    write(recorder, 3)
    assert [batch["step_id"].to_pylist() for batch in tail.batches("steps")] == [[3]]


def test_sealed_segments_from_before_a_time_are_left_out(store: Store, recorder: Recorder) -> None:
    write(recorder, 0)
    recorder.seal()
    for name in list_segments(recorder.path, SEALED):
        os.utime(name.path(recorder.path, SEALED), ns=(10**9, 10**9))
    write(recorder, 1)
    with closing(store.tail(FOLLOWED, since_unix_ns=2 * 10**9)) as tail:
        found = tail.poll()
        assert steps(found) == [1] and 7 in found["sources"]["epoch"].to_pylist(), (
            "what says who wrote is never left out"
        )
    assert store.last_written_ns() == open_store(recorder.path).last_written_ns() > 10**9


def test_erased_rows_are_left_out_and_counted(store: Store, tail: Tail, recorder: Recorder) -> None:
    write(recorder, 0, 2)
    recorder.write("requests", [{"epoch": 7, "rank": 0, "stage": 0, "request": SECRET, "event": 0, "t_ns": 1}] * 3)
    recorder.seal()
    assert run("erase", recorder.path, "--request", SECRET, "--yes").exit_code == 0
    assert store.table("requests").num_rows == 0 and store.hidden == {("requests", 7): 3}
    with closing(store.tail(["requests", "steps"])) as other:
        assert steps(other.poll()) == [0, 1] and other.hidden == {("requests", 7): 3}
        assert other.poll() == {} and other.hidden == {("requests", 7): 3}


def test_a_table_that_is_none_is_said_before_anything_is_asked(store: Store) -> None:
    with pytest.raises(KeyError, match="no table 'dreams'"):
        store.tail(["dreams"])


def test_of_a_large_segment_a_piece_is_in_memory(store: Store, recorder: Recorder) -> None:
    for number in range(32):
        recorder.write("captures", [capture(7, number, 0, "r", number, values=np.zeros(1 << 18, np.float32))])
    recorder.seal()
    before = rchar()
    with closing(store.tail(["captures"])) as tail:
        assert next(iter(tail.batches("captures")))["step_id"].to_pylist() == [0]
        assert rchar() - before < 16 << 20, "32 MiB there are"


def rchar() -> int:
    """Return what the kernel says this process, its collector included, has read of files."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


# -- what goes over the network ---------------------------------------------------------------------------------------


@pytest.fixture
def remote(server: CollectorServer) -> Iterator[RemoteStore]:
    with closing(RemoteStore(server.address)) as opened:
        yield opened


def cost(store: RemoteStore, tail: Tail) -> tuple[int, dict[str, pa.Table]]:
    """Return the bytes of a poll, and what it gave."""
    before = store.bytes_read
    found = tail.poll()
    return store.bytes_read - before, found


def test_a_look_costs_what_is_new_however_large_the_store(remote: RemoteStore, recorder: Recorder) -> None:
    write(recorder, 0, 20_000)
    with closing(remote.tail(FOLLOWED)) as tail:
        whole, found = cost(remote, tail)
        assert len(steps(found)) == 20_000 and whole > 1_000_000
        quiet, found = cost(remote, tail)
        assert found == {} and quiet < QUIET_BYTES
        write(recorder, 20_000, 10)
        some, found = cost(remote, tail)
        assert len(steps(found)) == 10 and some < QUIET_BYTES + 4 * found["steps"].nbytes + 1_000


def test_what_was_read_half_comes_whole_with_the_next_look(remote: RemoteStore, recorder: Recorder) -> None:
    write(recorder, 0, 5_000)
    write(recorder, 5_000, 5_000)
    with closing(remote.tail(FOLLOWED)) as tail:
        given = next(batches := tail.batches("steps"))["step_id"].to_pylist()
        batches.close()  # type: ignore[attr-defined]  # it is a generator
        assert given + steps(tail.poll()) == list(range(10_000))


def proxied(server: CollectorServer) -> tuple[Proxy, RemoteStore]:
    proxy = Proxy(server.port)
    return proxy, RemoteStore(f"grpc://127.0.0.1:{proxy.port}")


def test_after_a_cut_a_poll_goes_on_and_old_segments_are_not_sent_again(
    server: CollectorServer, recorder: Recorder
) -> None:
    write(recorder, 0, 20_000)
    recorder.seal()
    for name in list_segments(recorder.path, SEALED):
        os.utime(name.path(recorder.path, SEALED), ns=(10**9, 10**9))
    proxy, store = proxied(server)
    with proxy, closing(store), closing(store.tail(FOLLOWED)) as tail:
        whole, found = cost(store, tail)
        assert len(steps(found)) == 20_000
        write(recorder, 20_000)
        proxy.cut()
        some, found = cost(store, tail)
        assert steps(found) == [20_000] and some < whole / 20
        assert proxy.num_connections == 2


def test_a_collector_that_is_away_is_one_line_and_one_that_comes_back_is_followed_on(recorder: Recorder) -> None:
    write(recorder, 0)
    with CollectorServer(recorder.path, port=0, compact=False) as first:
        store = RemoteStore(first.address)
        tail = store.tail(FOLLOWED)
        assert steps(tail.poll()) == [0]
    with pytest.raises(ConnectionError, match="no collector answers at") as error:
        tail.poll()
    assert "\n" not in str(error.value)
    write(recorder, 1)
    with CollectorServer(recorder.path, port=first.port, compact=False):
        assert steps(tail.poll()) == [1]
        tail.close()
        store.close()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_cut_sealed_and_written_each_row_comes_once(
    server: CollectorServer, recorder: Recorder, seed: int
) -> None:
    chance, written, given = random.Random(seed), 0, []
    proxy, store = proxied(server)
    with proxy, closing(store), closing(store.tail(FOLLOWED)) as tail:

        def look() -> list[int]:
            try:
                return steps(tail.poll())
            except ConnectionError:  # cut again at once
                return []

        for _ in range(40):
            match chance.choice(("write", "write", "seal", "cut", "look")):
                case "write":
                    num = chance.choice((1, 3, 500))
                    write(recorder, written, num)
                    written += num
                case "seal":
                    recorder.seal()
                case "cut":
                    proxy.cut()
                case "look":
                    given += look()
        given += look() + look()
    assert sorted(given) == list(range(written))


def test_every_table_can_be_followed(remote: RemoteStore, recorder: Recorder) -> None:
    local: dict[str, Any] = open_store(recorder.path).tail().poll()
    with closing(remote.tail()) as tail:
        assert tail.poll() == local and set(local) <= set(TABLES)
