"""A reader of one tenant sees what came by OTLP with its tenant's tokens, all of it, and nothing of another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from access_kit import Rig, rig
from otlp_in_kit import normal, spans
from query_kit import RUN, Recorder, capture, entry, site, source, step

from insitu_collector.access.roles import Role
from insitu_collector.otlp.signals import LOGS, METRICS, TRACES, Signal
from insitu_collector.query.remote import RemoteStore
from insitu_collector.rows.selection import NothingFound
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

__all__ = ["rig"]  # a fixture
TENANTS = ("acme", "rival")
TABLES = ("spans", "metrics", "logs")


def requests_of(word: str, seed: int) -> list[tuple[Signal, Any]]:
    """Return a request of each signal that has a word in its resource and in its only record."""
    traces, metrics, logs = spans(3, seed=seed, service=f"{word}-shop"), METRICS.request(), LOGS.request()
    scope = metrics.resource_metrics.add().scope_metrics.add()
    point = scope.metrics.add(name=f"{word}-sold").gauge.data_points.add(as_int=1)
    point.time_unix_nano = 1_800_000_000_000_000_000
    record = logs.resource_logs.add().scope_logs.add().log_records.add(time_unix_nano=1_800_000_000_000_000_000)
    record.body.string_value = f"{word} sold"
    return [(TRACES, traces), (METRICS, metrics), (LOGS, logs)]


def send(server: CollectorServer, token: str | None, word: str, seed: int) -> list[Any]:
    """Send a request of each signal over OTLP/gRPC; return them."""
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    sent = requests_of(word, seed)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for signal, request in sent:
            call = channel.unary_unary(f"/{signal.service}/Export", None, None)
            call(request.SerializeToString(), metadata=metadata, timeout=30)
    return [request for _, request in sent]


@contextmanager
def reading(server: CollectorServer, rig: Rig, token: str) -> Iterator[RemoteStore]:
    store = RemoteStore(server.address, rig.with_token(token))
    try:
        yield store
    finally:
        store.close()


def record_processes(path: Path) -> None:
    """Write a process of each tenant with a captured row, as a collector with tokens stores them."""
    recorder = Recorder(path)
    for epoch, tenant, run in ((7, "acme", RUN), (8, "rival", "cd" * 8)):
        recorder.write("sources", [source(epoch, tenant=tenant, run=run)])
        recorder.write("sites", [site(epoch, 0, "L0.attn_z")])
        recorder.write("captures", [capture(epoch, 1, 0, f"{tenant}-request", 0)])
        recorder.write("steps", [step(epoch, 1, [entry(f"{tenant}-request", 0, 1)])])
        span = {"rank": 0, "stage": 0, "name": f"{tenant}-own", "tenant": tenant, "otlp": b""}
        recorder.write("spans", [{"epoch": epoch, **span}])
    recorder.close()


@pytest.mark.parametrize("is_sealed", [False, True])
def test_each_tenant_s_reader_sees_all_that_came_with_its_tokens_and_nothing_else(rig: Rig, is_sealed: bool) -> None:
    tokens = {tenant: rig.entry(f"ship-{tenant}", tenant=tenant) for tenant in TENANTS} | {"": rig.entry("ship")}
    readers = {tenant: rig.entry(f"read-{tenant}", Role.READ, tenant=tenant) for tenant in (*TENANTS, "new")}
    sent: dict[str, list[Any]] = {}
    with rig.serving(tls=False) as server:
        for seed, (tenant, token) in enumerate(tokens.items()):
            sent[tenant] = send(server, token, tenant or "owner", seed)
        if not is_sealed:
            check_readers(server, rig, readers, sent)
    if is_sealed:
        with rig.serving(tls=False) as server:
            check_readers(server, rig, readers, sent)


def check_readers(server: CollectorServer, rig: Rig, readers: dict[str, str], sent: dict[str, list[Any]]) -> None:
    for tenant in TENANTS:
        with reading(server, rig, readers[tenant]) as store:
            for table, request in zip(TABLES, sent[tenant], strict=True):
                rows = store.table(table)
                assert set(rows["tenant"].to_pylist()) == {tenant}
                assert [normal(each) for each in store.otlp(table)] == [normal(request)], "with its resource"
                for query in (f"select count(*) as n from {table}", f"select count(*) as n from named.{table}"):
                    assert store.sql(query).to_pylist() == [{"n": rows.num_rows}]
                (batch,) = store.rows(table, run="*")
                assert batch.num_rows == rows.num_rows and batch["run"].null_count == batch.num_rows
                assert [b.num_rows for b in store.rows(table, run="*", rank=-1)] == [rows.num_rows]
                assert list(store.rows(table, run="*", rank=0)) == []
            of_one_ns = store.rows("spans", 1_800_000_000_000_000_001, 1_800_000_000_000_000_002, run="*")
            assert [b["name"].to_pylist() for b in of_one_ns] == [["span 1"]]
            everything = [store.table(name).to_pylist() for name in store.tables()]
            others = ({*TENANTS} - {tenant}).pop()
            assert others not in repr(everything) and "owner" not in repr(everything)
    with reading(server, rig, readers["new"]) as store:
        assert [store.table(table).num_rows for table in TABLES] == [0, 0, 0]


def test_the_owner_s_reader_sees_what_came_of_everybody(rig: Rig) -> None:
    acme, owner, reads = rig.entry("a", tenant="acme"), rig.entry("o"), rig.entry("r", Role.READ)
    with rig.serving(tls=False) as server:
        send(server, acme, "acme", 1)
        send(server, owner, "owner", 2)
        with reading(server, rig, reads) as store:
            for table in TABLES:
                assert set(store.table(table)["tenant"].to_pylist()) == {"acme", None}
                assert store.sql(f"select distinct tenant from {table} order by all").num_rows == 2


def test_what_came_while_there_were_no_tenants_is_the_owner_s_alone(rig: Rig) -> None:
    path = rig.folder / "store"
    with CollectorServer(path, port=0) as server:
        send(server, None, "early", 1)
    assert open_store(path).table("spans")["tenant"].null_count == 3
    acme, reads = rig.entry("a", tenant="acme"), rig.entry("r", Role.READ, tenant="acme")
    with rig.serving(tls=False) as server, reading(server, rig, reads) as store:
        assert [store.table(table).num_rows for table in TABLES] == [0, 0, 0]
        assert store.sql("select * from named.spans").num_rows == 0
        (_, metrics, _) = send(server, acme, "acme", 2)
        assert [store.table(table).num_rows for table in TABLES] == [3, 1, 1]
        assert [normal(each) for each in store.otlp("metrics")] == [normal(metrics)]


def test_its_own_processes_rows_and_tensors_are_seen_beside_what_came_by_otlp(rig: Rig) -> None:
    record_processes(rig.folder / "store")
    ships = rig.entry("ship", tenant="acme")
    reads = {tenant: rig.entry(f"read-{tenant}", Role.READ, tenant=tenant) for tenant in TENANTS}
    with rig.serving(tls=False) as server:
        send(server, ships, "acme", 1)
        with reading(server, rig, reads["acme"]) as store:
            assert sorted(store.table("spans")["name"].to_pylist()) == ["acme-own", "span 0", "span 1", "span 2"]
            (batch,) = store.rows("spans")
            assert batch["name"].to_pylist() == ["acme-own"], "what came by OTLP is of no run"
            assert (batch["run"].to_pylist(), batch["replica"].to_pylist()) == ([RUN], [0])
            (own,) = store.sql("select name, run from named.spans where run is not null").to_pylist()
            assert own == {"name": "acme-own", "run": RUN}
            assert store.tensor(("acme-request", "L0.attn_z")).shape == (1, 8)
            for hidden in (("rival-request", "L0.attn_z"), {"epoch": 8, "row_seq": 0}):
                with pytest.raises(LookupError):
                    store.tensor(hidden)
            assert list(store.rows("spans", run="*", epoch=8)) == []
        with reading(server, rig, reads["rival"]) as store:
            assert store.table("spans")["name"].to_pylist() == ["rival-own"]
            assert store.table("metrics").num_rows == 0
            assert store.tensor(("rival-request", "L0.attn_z")).shape == (1, 8)
            with pytest.raises(NothingFound):
                list(store.rows("spans", run=RUN))
