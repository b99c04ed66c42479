"""A stranger's SQL runs in a process of its own: what it takes or breaks there does not reach the collector."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pyarrow as pa
import pytest
from access_kit import Rig, events, rig, texts
from query_kit import Recorder, site, source, step
from test_collect import Collector
from wait_kit import until

from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.segments.layout import SEALED, list_segments
from insitu.wire.insitu_pb2 import Part, SqlQuery
from insitu.wire.insitu_pb2_grpc import QueryStub
from insitu_collector.access.roles import Role
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import Answer
from insitu_collector.query.remote import RemoteStore
from insitu_collector.query.sql import Limits, QueryFailed, QueryTooLarge
from insitu_collector.query.sql_process import SqlProcesses
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import Store, open_store

__all__ = ["rig"]  # a fixture
ENDLESS = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"
GREEDY = "select length(repeat('x', 1000000000)) from range(2048)"
LARGE = "select repeat('x', 10000) as text from range(50000)"
"""Half a GiB."""
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Store:
    recorder = Recorder(tmp_path / "store")
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out")])
    recorder.write("steps", [step(7, number) for number in range(10)])
    recorder.close()
    return open_store(tmp_path / "store")


@pytest.fixture
def processes() -> Iterator[SqlProcesses]:
    started = SqlProcesses()
    yield started
    started.close()


def parts(processes: SqlProcesses, store: Store, query: str, limits: Limits | None = None) -> Generator[Part]:
    return processes.parts(store, "", query, limits or Limits(), lambda end: None)


def ask(processes: SqlProcesses, store: Store, query: str, limits: Limits | None = None) -> list[dict[str, Any]]:
    answer = Answer(parts(processes, store, query, limits))
    rows: list[dict[str, Any]] = pa.Table.from_batches(answer.batches(), schema=answer.schema).to_pylist()
    return rows


def reading(server: CollectorServer) -> closing[RemoteStore]:
    return closing(RemoteStore(f"grpc://127.0.0.1:{server.port}"))


def server_of(collector: int) -> psutil.Process:
    """Return the process that forks for the SQL of a collector."""

    def found() -> psutil.Process | None:
        for each in psutil.Process(collector).children():
            with suppress(psutil.Error):  # one that ends just now
                if "insitu_collector.query.fork_server" in each.cmdline():
                    return each
        return None

    return until(found, "a process that forks")


def one_query_of(collector: int) -> psutil.Process:
    """Return the process of the query that a collector answers, once it runs."""
    server = server_of(collector)
    return until(lambda: next(iter(server.children()), None), "a process of the query")


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # pytest's own parent may reap late


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process ever had."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


def test_memory_that_duckdb_does_not_account_for_ends_no_collector(rig: Rig) -> None:
    reads, ships = rig.entry("r", Role.READ), rig.entry("s")
    collector = Collector(rig.folder / "store", 0, "--tokens", str(rig.tokens))
    try:
        url = f"grpc://127.0.0.1:{collector.port}"
        remote = RemoteStore(url, rig.with_token(reads, "reads"))
        assert remote.sql("select 1 as one").to_pylist() == [{"one": 1}]
        before = peak_bytes(collector.process.pid)
        for query in (
            GREEDY,
            "select repeat('x', 100000000) from range(8)",
            "select list(range) from range(1000000000)",
        ):
            with pytest.raises(QueryTooLarge, match="needs more memory than one may have here") as error:
                remote.sql(query)
            assert "\n" not in str(error.value)
        assert peak_bytes(collector.process.pid) < before + 64 * MIB
        exporter = CollectorExporter(url, Source(epoch=7), credentials=rig.with_token(ships, "ships"))
        exporter.export(events(0, text="after it"))
        until(lambda: texts(rig.folder / "store") == ["after it"], "the row that was sent afterwards")
        exporter.close(0.0)
        assert remote.sql("select text from events where kind = 'incident'").to_pylist() == [{"text": "after it"}]
        remote.close()
    finally:
        collector.end(signal.SIGTERM)


def test_a_large_answer_is_made_as_fast_as_it_is_read_and_is_nowhere_as_a_whole(store: Store) -> None:
    with CollectorServer(store.path, port=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = QueryStub(channel).Sql(SqlQuery(query=LARGE), timeout=60)
        assert next(call).HasField("schema")
        query, this = one_query_of(os.getpid()), psutil.Process()
        until(lambda: stands_still(query), "the query to wait for its reader")
        assert not has_ended(query), "half a GiB is nowhere to be put"
        assert query.memory_info().rss < server_of(os.getpid()).memory_info().rss + 256 * MIB
        before, num_bytes, most = this.memory_info().rss, 0, 0
        for part in call:
            num_bytes += len(part.piece.body)
            most = max(most, this.memory_info().rss)
        assert part.end.num_rows == 50_000 and num_bytes > 50_000 * 10_000
        assert most < before + 64 * MIB


def stands_still(process: psutil.Process) -> bool:
    before = process.cpu_times()
    threading.Event().wait(0.3)
    return bool(process.cpu_times() == before)


def test_a_query_is_no_book(processes: SqlProcesses, store: Store) -> None:
    with pytest.raises(QueryTooLarge, match="a query has at most 4,194,304 characters"):
        ask(processes, store, "select 1 --" + "\0" * (4 << 20))
    assert ask(processes, store, "select 1 as one --" + "\x1f" * (4_194_304 - 18)) == [{"one": 1}]
    assert ask(processes, store, "select 1--" + "\U0001f600" * (4_194_304 - 10)) == [{"1": 1}]


def test_what_is_wrong_with_a_query_reaches_who_asked_however_long_a_name_in_it_is(store: Store) -> None:
    with CollectorServer(store.path, port=0) as server, reading(server) as remote:
        for letter in ("x", "\U0001f600"):
            with pytest.raises(BadQuestion, match=rf"^Catalog Error: Table with name {letter}+\.\.\.$") as error:
                remote.sql(f'select * from "{letter * 20_000}"')
            assert len(str(error.value)) < 510


def test_of_a_store_that_has_gone_nobody_is_told_that_it_holds_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    away = store.path.with_name("away")
    with CollectorServer(store.path, port=0) as server, reading(server) as remote:
        questions: list[Callable[[], object]] = [
            lambda: remote.sql("select count(*) from steps"),
            lambda: remote.table("steps"),
            remote.tables,
        ]
        for was_open in (False, True):
            store.path.rename(away)
            for question in questions:
                with pytest.raises(ConnectionError, match="the store has gone; put it back, or start again this"):
                    question()
            away.rename(store.path)
            assert remote.table("steps").num_rows == 10, was_open
    assert "Traceback" not in caplog.text


def test_a_store_that_goes_before_its_process_looks_is_said_as_well(
    processes: SqlProcesses, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.path.rename(store.path.with_name("away"))
    with pytest.raises(QueryFailed, match="the store of this collector has gone"):
        ask(processes, store, "select 1")
    assert caplog.messages == []


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGKILL, grpc.StatusCode.OUT_OF_RANGE, "was killed, as where memory is short; ask for less at a time"),
        (signal.SIGSEGV, grpc.StatusCode.INTERNAL, "ended with SIGSEGV, and only that"),
        (signal.SIGXCPU, grpc.StatusCode.OUT_OF_RANGE, "took too long"),
    ],
)
def test_a_process_that_dies_in_the_middle_of_its_answer_is_one_line_and_service_goes_on(
    store: Store, number: int, code: grpc.StatusCode, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with CollectorServer(store.path, port=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = QueryStub(channel)
        call = stub.Sql(SqlQuery(query=LARGE), timeout=60)
        assert next(call).HasField("schema")
        one_query_of(os.getpid()).send_signal(number)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() == code and says in call.details() and "\n" not in call.details()
        assert [record.getMessage() for record in caplog.records if says in record.getMessage()] != []
        assert list(stub.Sql(SqlQuery(query="select 1"), timeout=60))[-1].end.num_rows == 1


def test_who_forks_is_started_again_when_it_was_killed(processes: SqlProcesses, store: Store) -> None:
    under_way = parts(processes, store, LARGE)
    next(under_way)
    server, query = server_of(os.getpid()), one_query_of(os.getpid())
    server.kill()
    with pytest.raises(QueryFailed, match="ended with all that ran SQL here; ask again"):
        list(under_way)
    until(lambda: has_ended(query), "the query of a process that was killed")
    assert ask(processes, store, "select count(*) as n from steps") == [{"n": 10}]
    assert server_of(os.getpid()).pid != server.pid


def test_a_query_that_nobody_waits_for_is_killed(store: Store) -> None:
    with CollectorServer(store.path, port=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = QueryStub(channel)
        for query in (ENDLESS, LARGE):  # one that has answered nothing yet, and one that waits for its reader
            call = stub.Sql(SqlQuery(query=query), timeout=60)
            process = one_query_of(os.getpid())
            call.cancel()
            until(lambda: has_ended(process), "the process of a query that was given up", timeout_s=10)  # noqa: B023
        assert list(stub.Sql(SqlQuery(query="select 1"), timeout=60))[-1].end.num_rows == 1


def test_time_ends_a_query_that_hears_nothing(processes: SqlProcesses, store: Store) -> None:
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.append(one_query_of(os.getpid()))
        until(lambda: stopped[0].cpu_times().user > 0.05, "the query to have begun")
        stopped[0].send_signal(signal.SIGSTOP)

    ask(processes, store, "select 1")
    stopper = threading.Thread(target=stop)
    stopper.start()
    begun = time.monotonic()
    with pytest.raises(QueryTooLarge, match="the query took too long; ask for less"):
        ask(processes, store, ENDLESS, Limits(seconds=3.0))
    stopper.join()
    assert time.monotonic() - begun < 20
    assert has_ended(stopped[0]), "who was told finds nothing of it left"


def test_a_collector_that_ends_leaves_no_process(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        collector = Collector(tmp_path / f"store-{number}")
        with grpc.insecure_channel(f"127.0.0.1:{collector.port}") as channel:
            call = QueryStub(channel).Sql(SqlQuery(query=ENDLESS), timeout=60)
            server, query = server_of(collector.process.pid), one_query_of(collector.process.pid)
            collector.end(number)
            for process in (server, query):
                until(lambda: has_ended(process), f"the end of process {process.pid}")  # noqa: B023
            call.cancel()


def test_after_its_end_nothing_is_started(store: Store) -> None:
    processes = SqlProcesses()
    processes.close()
    with pytest.raises(QueryFailed, match="this collector stops"):
        ask(processes, store, "select 1")
    assert [each for each in psutil.Process().children() if "fork_server" in " ".join(each.cmdline())] == []


# -- what such a process is given ------------------------------------------------------------------------------------


def test_it_has_limits_that_the_kernel_keeps_and_none_of_what_a_collector_knows(
    processes: SqlProcesses, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_TOKEN", "very-secret")
    under_way = parts(processes, store, LARGE)
    next(under_way)
    server, query = server_of(os.getpid()), one_query_of(os.getpid())
    assert server.num_threads() == 1, "a lock that another thread holds would be held in every fork"
    for process in (server, query):
        proc = Path(f"/proc/{process.pid}")
        assert b"very-secret" not in (proc / "environ").read_bytes() and not {
            name for name in process.environ() if name.startswith("INSITU")
        }
        assert "repeat" not in " ".join(process.cmdline())
        assert (proc / "oom_score_adj").read_text() == "1000\n"
        assert "core file size 0 0" in limits_of(proc)
    said = limits_of(Path(f"/proc/{query.pid}"))
    assert "file size 0 0" in said
    soft, hard = map(int, re.findall(r"cpu time (\d+) (\d+)", said)[0])
    assert soft < hard <= 41, "the kernel kills at the hard one, and says why at the other"
    mapped, most = query.memory_info().vms, int(re.findall(r"address space (\d+)", said)[0])
    assert mapped <= most <= server.memory_info().vms + 768 * MIB
    files = {os.readlink(each) for each in Path(f"/proc/{query.pid}/fd").iterdir()}
    assert len([each for each in files if each.startswith("socket:")]) == 1, (
        "none of another query's, none of who forks"
    )
    under_way.close()


def limits_of(proc: Path) -> str:
    return re.sub(" +", " ", (proc / "limits").read_text()).lower().replace("max ", "")


def test_what_is_damaged_is_counted_and_each_line_logged_once(
    processes: SqlProcesses, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path = list_segments(store.path, SEALED, "steps")[0].path(store.path, SEALED)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.chmod(0o600)
    path.write_bytes(data)
    for _ in range(2):
        answer = Answer(parts(processes, store, "select count(*) from steps"))
        assert [batch.to_pylist() for batch in answer.batches()] == [[{"count_star()": 0}]]
        assert answer.end.num_damaged == 1
    assert len([record for record in caplog.records if "its rows are left out" in record.getMessage()]) == 1
    assert [damage.segment.table for damage in store.all_damage] == ["steps"]


def test_rows_that_come_meanwhile_are_in_the_next_answer(processes: SqlProcesses, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    for number in range(3):
        recorder.write("steps", [step(7, number)])
        recorder.writer.sync()
        assert ask(processes, open_store(tmp_path), "select count(*) as n from steps") == [{"n": number + 1}]
    recorder.close()
