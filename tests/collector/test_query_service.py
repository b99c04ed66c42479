"""A collector's store read through its port: the same answers, checked; bounded, and only for who may."""

from __future__ import annotations

import gc
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from access_kit import Rig, rig
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from query_kit import RUN, STEP_NS, UNIX, Recorder, capture, entry, site, source, step, value, verdict

from insitu.cli import ExitCode
from insitu.credentials import Credentials
from insitu.records import TABLES
from insitu.wire.insitu_pb2 import Part, RowsQuery, SqlQuery
from insitu.wire.insitu_pb2_grpc import QueryStub
from insitu_collector.access.gate import Caller, Role
from insitu_collector.query.asked import Asked, BadQuestion
from insitu_collector.query.parts import PIECE_BYTES, Answer, BadAnswer, end_of, parts_of
from insitu_collector.query.remote import RemoteStore
from insitu_collector.query.sql import Limits, QueryTooLarge
from insitu_collector.query.wire_form import from_message, to_message
from insitu_collector.rows.selection import NothingFound
from insitu_collector.service.query_service import MOST_AT_ONCE, QueryService
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import Store, open_store
from insitu_collector.views.stalls import stalls

__all__ = ["rig"]  # a fixture
ENDLESS = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("service") / "store"
    recorder = Recorder(made)
    for rank in (0, 1):
        recorder.write("sources", [source(7 + rank, rank=rank, tp_rank=rank)])
        recorder.write("sites", [site(7 + rank, 0, "L0.attn_z", shard="column"), site(7 + rank, 1, "L1.mlp_out")])
        for number in range(40):
            rows = [capture(7 + rank, number, at, "r", number, rank=rank, tp_rank=rank) for at in (0, 1)]
            recorder.write("captures", rows)
            recorder.write("steps", [step(7 + rank, number, [entry("r", number, 1)] if rank == 0 else None, rank=rank)])
    rows = [capture(7, 100 + n, 0, "large", n, values=np.full(700_000, n, np.float32)) for n in range(3)]
    recorder.write("captures", rows)
    recorder.close()
    return made


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[CollectorServer]:
    with CollectorServer(path, port=0) as running:
        yield running


@pytest.fixture
def remote(server: CollectorServer) -> Iterator[RemoteStore]:
    opened = open_store(server.address)
    assert isinstance(opened, RemoteStore)
    yield opened
    opened.close()


def ask_all(store: Store) -> list[Any]:
    """Return what a store answers to each kind of question."""
    return [
        store.tables(),
        store.captures(),
        store.captures(UNIX + 3 * STEP_NS, UNIX + 9 * STEP_NS, rank=1, site="L0.*", columns=["data", "site", "run"]),
        store.captures(request="r", steps=range(3, 7), layer=1, replica=0, stage=0),
        store.summaries(),
        store.intervals(),
        pa.Table.from_batches(store.rows("steps")),
        *(store.table(table) for table in TABLES),
        store.sql("select site, count(*) as n from named.captures group by all order by 1"),
        store.sql("select * from steps where false"),
    ]


def test_a_collector_answers_what_its_folder_answers(remote: RemoteStore, path: Path) -> None:
    for found, expected in zip(ask_all(remote), ask_all(open_store(path)), strict=True):
        assert found == expected


def test_tensors_are_those_of_the_folder(remote: RemoteStore, path: Path) -> None:
    row = remote.captures(steps=5, site="L1.*", rank=1).to_pylist()[0]
    assert np.array_equal(remote.tensor(row), value(1, 5, 5, 1))
    found, expected = remote.tensors("r", "L0.*")["L0.attn_z"], open_store(path).tensors("r", "L0.*")["L0.attn_z"]
    assert np.array_equal(found.values, expected.values) and found.values.shape == (40, 16)
    assert found.positions.tolist() == expected.positions.tolist() and not found.is_view
    large = remote.tensors("large")["L0.attn_z"]
    assert large.missing == {"part_missing": (0, 1, 2)}, "the other rank has none"
    whole = remote.tensor(("large", "L0.attn_z"), rank=0)
    assert whole.shape == (3, 700_000) and [row[-1] for row in whole] == [0.0, 1.0, 2.0]


def test_what_stands_in_a_store_can_be_asked_from_afar(remote: RemoteStore, path: Path) -> None:
    assert remote.stalls().run == RUN and remote.verdicts() == open_store(path).verdicts() != []
    printed = CliRunner().invoke(stalls, [remote.url])
    assert printed.exit_code == 0 and printed.stdout.startswith(f"{remote.url}, run {RUN}")
    away = CliRunner().invoke(stalls, ["grpc://127.0.0.1:9"])
    assert away.exit_code == ExitCode.UNREACHABLE and "no collector answers at grpc://127.0.0.1:9" in away.output


@pytest.mark.parametrize(
    ("ask", "kind", "says"),
    [
        (lambda store: store.sql("selct 1"), BadQuestion, "Parser Error"),
        (lambda store: store.sql("copy (select 1) to '/tmp/x'"), BadQuestion, "one SELECT at a time"),
        (lambda store: store.captures(columns=["colour"]), BadQuestion, "no column 'colour'"),
        (lambda store: store.captures(run="ee"), NothingFound, "has no run 'ee'"),
        (lambda store: store.intervals(run="ee"), NothingFound, r"the store grpc://127\.0\.0\.1:\d+ has no run 'ee'"),
        (lambda store: store.table("dreams"), KeyError, "no table 'dreams'"),
        (lambda store: store.tensor({"epoch": 7, "row_seq": 9999}), LookupError, "no captured row 9999"),
        (lambda store: store.tensors("nobody"), NothingFound, "no captured row of request 'nobody'"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    remote: RemoteStore, ask: Callable[[Store], object], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as error:
        ask(remote)
    assert "\n" not in str(error.value)


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(ConnectionError, match=r"no collector answers at grpc://127\.0\.0\.1:9; start one with"):
        open_store("grpc://127.0.0.1:9").captures()


def stub_of(server: CollectorServer) -> tuple[grpc.Channel, Any]:
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
    return channel, QueryStub(channel)


def test_a_large_answer_comes_in_messages_that_grpc_takes_and_no_faster_than_it_is_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "store")
    recorder.write("sources", [source(7)])
    for number in range(64):
        recorder.write("captures", [capture(7, number, 0, "r", number, values=np.zeros(1 << 18, np.float32))])
    recorder.close()
    with CollectorServer(tmp_path / "store", port=0) as server:
        channel, stub = stub_of(server)
        store = open_store(tmp_path / "store")
        assert store.captures(columns=["data"]).num_rows == 64
        before = rchar()
        call = stub.Rows(RowsQuery(table="captures", columns=["data"]), timeout=60)
        first = next(call)
        assert first.HasField("schema")
        settled = _settled(rchar)
        assert settled - before < 24 << 20, "64 MiB there are, and somebody has to take them before more are read"
        sizes = [len(part.piece.body) for part in call if part.HasField("piece")]
        assert max(sizes) <= PIECE_BYTES and sum(sizes) > 64 << 20
        channel.close()


def rchar() -> int:
    """Return what the kernel says this process, server included, has read of files."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def _settled(count: Callable[[], int], deadline_s: float = 20.0) -> int:
    """Return a count once it has stood still for a while (reading the count adds a few hundred bytes)."""
    end, last, since = time.monotonic() + deadline_s, count(), time.monotonic()
    while time.monotonic() < end:
        now = count()
        if now - last > 65_536:
            last, since = now, time.monotonic()
        if time.monotonic() - since > 0.5:
            return now
        threading.Event().wait(0.02)
    raise AssertionError("it never stood still")


def test_a_question_that_is_given_up_makes_room_and_too_many_are_told_to_wait(server: CollectorServer) -> None:
    channel, stub = stub_of(server)
    ended: queue.Queue[Any] = queue.Queue()
    calls = [stub.Sql(SqlQuery(query=ENDLESS), timeout=60) for _ in range(MOST_AT_ONCE + 1)]
    for call in calls:
        call.add_done_callback(ended.put)
    refused = ended.get(timeout=30)
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and ended.empty()
    assert f"{MOST_AT_ONCE} questions are being answered here" in refused.details()
    for call in calls:
        call.cancel()
    _until(lambda: _code_of(stub), grpc.StatusCode.OK)
    late = stub.Sql(SqlQuery(query=ENDLESS), timeout=0.3)
    with pytest.raises(grpc.RpcError) as error:
        list(late)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    _until(lambda: _code_of(stub), grpc.StatusCode.OK)
    channel.close()


def _code_of(stub: Any) -> tuple[grpc.StatusCode, str]:
    call = stub.Sql(SqlQuery(query="select 1"), timeout=60)
    with suppress(grpc.RpcError):
        list(call)
    return call.code(), call.details() or ""


def _until(look: Callable[[], tuple[grpc.StatusCode, str]], wanted: grpc.StatusCode, deadline_s: float = 30.0) -> str:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        code, details = look()
        if code == wanted:
            return details
    raise AssertionError(f"not {wanted} in {deadline_s} s")


class Gated:
    """A gate that says what it was told of everybody."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def require(self, context: Any, role: Role, remedy: str) -> Caller:
        if role not in self._caller.roles:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, remedy)
        return self._caller


@contextmanager
def served(path: Path, caller: Caller, limits: Limits | None = None) -> Iterator[RemoteStore]:
    """Serve a store's queries to one caller; give the store as that one has it."""
    from concurrent.futures import ThreadPoolExecutor

    from insitu.wire.insitu_pb2_grpc import add_QueryServicer_to_server

    server = grpc.server(ThreadPoolExecutor(4))
    service = QueryService(path, Gated(caller), limits)  # type: ignore[arg-type]
    add_QueryServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    remote = RemoteStore(f"grpc://127.0.0.1:{port}")
    try:
        yield remote
    finally:
        remote.close()
        server.stop(0)
        service.close()


def test_who_may_not_read_is_told_what_it_takes(path: Path) -> None:
    with served(path, Caller("x", "", frozenset({Role.SHIP}))) as remote:
        for ask in (remote.tables, remote.captures, lambda: remote.sql("select 1"), lambda: remote.table("steps")):
            with pytest.raises(PermissionError, match="who reads the store needs the role `read`"):
                ask()


def test_a_tenant_sees_nothing_while_no_record_is_anybody_s(path: Path) -> None:
    with served(path, Caller("x", "acme", frozenset({Role.READ}))) as remote:
        with pytest.raises(NothingFound):
            remote.captures()
        for table in TABLES:
            assert remote.table(table).num_rows == 0
            assert remote.sql(f"select * from {table}").num_rows == 0
            assert remote.sql(f'select * from named."{table}"').num_rows == 0
            assert list(remote.rows(table, run="*")) == []


def test_a_tenant_sees_its_own_processes_and_what_is_said_of_them(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for epoch, tenant, run in ((7, "acme", RUN), (8, "rival", "cd" * 8)):
        recorder.write("sources", [source(epoch, tenant=tenant, run=run)])
        recorder.write("sites", [site(epoch, 0, f"{tenant}-site")])
        recorder.write("captures", [capture(epoch, 1, 0, f"{tenant}-request", 0)])
        recorder.write("steps", [step(epoch, 1, [entry(f"{tenant}-request", 0, 1)])])
    of, lost = {"epoch": 99, "rank": -1, "stage": -1}, {"table": "events", "reason": "corrupt"}
    recorder.write("verdicts", [verdict(of["epoch"], f"{run[:8]}-x-1", run) for run in (RUN, "cd" * 8)])
    recorder.write("gaps", [{**of, **lost, "source_epoch": epoch, "file": str(epoch)} for epoch in (7, 8)])
    recorder.write("events", [{**of, "kind": "rules_set", "text": "rival"}])
    recorder.close()
    with served(tmp_path, Caller("x", "acme", frozenset({Role.READ}))) as remote:
        assert remote.captures(run="*")["request"].to_pylist() == ["acme-request"]
        assert remote.tensor({"epoch": 7, "row_seq": 0}).shape == (8,)
        for hidden in ({"epoch": 8, "row_seq": 0}, ("rival-request", "*")):
            with pytest.raises(LookupError):
                remote.tensor(hidden, run="*")
        with pytest.raises(NothingFound):
            remote.captures(run="cd")
        for table, column, expected in (
            ("sources", "epoch", [7]),
            ("verdicts", "text", [RUN]),
            ("gaps", "source_epoch", [7]),
            ("events", "text", []),
            ("sites", "name", ["acme-site"]),
        ):
            assert remote.table(table)[column].to_pylist() == expected
            assert remote.sql(f"select {column} as found from {table}")["found"].to_pylist() == expected
        whole = (
            [remote.table(table).to_pylist() for table in TABLES],
            remote.sql("select * from named.captures").to_pylist(),
        )
        assert "rival" not in repr(whole)


def test_over_tls_who_has_a_token_with_the_role_reads_and_nobody_else(rig: Rig) -> None:
    reader, shipper = rig.entry("r", Role.READ), rig.entry("s", Role.SHIP)
    with rig.serving(rig.folder / "store") as server:
        assert server.address.startswith("grpcs://")
        allowed = RemoteStore(server.address, rig.with_token(reader))
        assert allowed.tables() == ["sources"] and allowed.sql("select 1 as one").to_pylist() == [{"one": 1}]
        assert allowed.table("captures").num_rows == 0
        allowed.close()
        for credentials, says in (
            (rig.with_token(shipper), "s has not the role read"),
            (Credentials(None, str(rig.ca_file)), "refuses this caller"),
        ):
            other = RemoteStore(server.address, credentials)
            for ask in (
                other.tables,
                lambda store=other: store.sql("select 1"),
                lambda store=other: store.table("steps"),
            ):
                with pytest.raises(PermissionError, match=says):
                    ask()
            other.close()
        unknown = RemoteStore(server.address)
        with pytest.raises(ConnectionError, match="is of no authority that is known here"):
            unknown.tables()
        unknown.close()


def test_a_stranger_s_query_has_bounds(path: Path) -> None:
    with served(path, Caller("x", "", frozenset(Role)), Limits(max_rows=10, seconds=0.3)) as remote:
        with pytest.raises(QueryTooLarge, match="more than 10 rows"):
            remote.sql("select * from steps")
        with pytest.raises(QueryTooLarge, match="took too long"):
            remote.sql(ENDLESS)
        assert remote.sql("select 1 as one").to_pylist() == [{"one": 1}]


# -- bytes of strangers ----------------------------------------------------------------------------------------------

BATCH = pa.RecordBatch.from_pydict(
    {"name": ["a", "bc", None], "data": pa.array([b"xyz", None, b""], pa.large_binary())}
)


def answer_of(parts: list[Part]) -> pa.Table:
    answer = Answer(iter(parts))
    return pa.Table.from_batches(answer.batches(), schema=answer.schema)


def test_an_answer_without_its_end_is_none() -> None:
    parts = list(parts_of(BATCH.schema, [BATCH, BATCH]))
    assert answer_of([*parts, end_of(6, 0)]).num_rows == 6
    for cut in range(len(parts)):
        with pytest.raises(BadAnswer, match="ask again"):
            answer_of(parts[:cut])
    with pytest.raises(BadAnswer, match="has 6 rows and says 7"):
        answer_of([*parts, end_of(7, 0)])


@given(st.data())
def test_bytes_that_changed_are_never_taken_for_rows(data: st.DataObject) -> None:
    schema, piece = parts_of(BATCH.schema, [BATCH])
    body = bytearray(piece.piece.body)
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadAnswer):
        answer_of(
            [schema, Part(piece={"body": bytes(body), "is_last": True, "crc32": piece.piece.crc32}), end_of(3, 0)]
        )


@given(st.data())
def test_a_liar_s_checksum_ends_no_process(data: st.DataObject) -> None:
    import zlib

    schema, piece = parts_of(BATCH.schema, [BATCH])
    body = bytearray(piece.piece.body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    lie = Part(piece={"body": bytes(body), "is_last": True, "crc32": zlib.crc32(bytes(body))})
    try:
        found = answer_of([schema, lie, end_of(3, 0)])
    except BadAnswer:
        return
    found.validate(full=True)
    gc.collect()


@given(
    steps=st.none() | st.integers(0, 99) | st.builds(range, st.integers(0, 9), st.integers(10, 99)),
    rank=st.none() | st.integers(-1, 9),
    site=st.none() | st.text(max_size=5),
    times=st.tuples(st.none() | st.integers(-9, 9), st.none() | st.integers(0, 2**62)),
    columns=st.none() | st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple),
    run=st.sampled_from(["", "*", "ab"]),
)
def test_a_question_means_the_same_on_the_other_side(
    steps: Any, rank: Any, site: Any, times: Any, columns: Any, run: str
) -> None:
    asked = Asked(steps=steps, rank=rank, site=site, t0=times[0], t1=times[1], columns=columns, run=run)
    back = from_message(RowsQuery.FromString(to_message("captures", asked).SerializeToString()))
    assert (back.step_range, back.rank, back.site, back.window) == (asked.step_range, rank, site, asked.window)
    assert (back.columns, back.run) == (columns, run)


def test_a_row_that_is_too_large_is_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    schema, batch = pa.schema([("text", pa.utf8())]), pa.RecordBatch.from_pydict({"text": ["x" * (3 << 20)]})
    sent = [*parts_of(schema, [batch]), end_of(1, 0)]
    monkeypatch.setattr("insitu_collector.query.parts.MOST_BYTES", 2 << 20)
    said = "is more than the 2 MiB that an answer may have in one; ask for less of it"
    with pytest.raises(BadQuestion, match=f"^a row of 3 MiB {said}$"):
        list(parts_of(schema, [batch]))
    with pytest.raises(BadAnswer, match=f"^a row {said}$"):  # of a collector that does not refuse it
        list(Answer(iter(sent)).batches())


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_a_collector_that_hangs_is_said_not_to_answer(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes connections, and nobody reads
        found = RemoteStore(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            ConnectionError, match="takes connections and does not answer in 5 s: see whether its process"
        ):
            found.check()
        found.close()
