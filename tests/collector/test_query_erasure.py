"""What is erased is not shown to whoever asks a store, whichever way, from the moment the order is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from query_kit import Recorder, capture, entry, site, source, step, value, verdict
from store_kit import run

from insitu.segments.erased_file import ErasedUnreadable
from insitu_collector.query.payloads import RowGone
from insitu_collector.rows.selection import NothingFound
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import Store, open_store

SECRET = "patient-4711"
ROWS = 6
"""Captured of each request."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two tenants; one has two requests, one of which is to be erased."""
    made = tmp_path / "store"
    recorder = Recorder(made)
    for epoch, tenant, requests in ((7, "acme", (SECRET, "other")), (8, "rival", ("third",))):
        recorder.write("sources", [source(epoch, tenant=tenant, rank=epoch - 7)])
        recorder.write("sites", [site(epoch, 0, "L0.mlp_out")])
        for n in range(ROWS):
            entries = [entry(request, n, 1, row) for row, request in enumerate(requests)]
            recorder.write("steps", [step(epoch, n, entries, rank=epoch - 7)])
            rows = [capture(epoch, n, 0, request, n, rank=epoch - 7) for request in requests]
            recorder.write("captures", rows)
    recorder.write("spans", [traced("spans", SECRET), traced("spans", "other")])
    recorder.write("requests", [traced("requests", SECRET), traced("requests", "other")])
    recorder.write("verdicts", [verdict(7, "abababab-1", f"{SECRET} waits", requests=[SECRET])])
    recorder.close()
    return made


def traced(table: str, request: str) -> dict[str, Any]:
    trace = {"epoch": 7, "rank": 0, "stage": 0, "trace_id": ("a" if request == SECRET else "b") * 32}
    return trace | ({"name": f"of {request}"} if table == "spans" else {"request": request, "event": 0, "t_ns": 1})


@pytest.fixture(params=["folder", "collector"])
def store(path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    """The store as its folder shows it, and as a collector does."""
    if request.param == "folder":
        yield open_store(path)
        return
    with CollectorServer(path, port=0) as server:
        yield open_store(server.address)


def names(store: Store) -> dict[str, Any]:
    """Return whom the store names, each way that it can be asked."""

    def sql(query: str) -> list[Any]:
        return list(store.sql(query).column(0).to_pylist())

    captures = store.captures()
    return {
        "captures": sorted(set(captures["request"].to_pylist())),
        "with values": sorted(set(store.captures(columns=["request", "data"])["request"].to_pylist())),
        "of it": sorted({request for name in (SECRET, "third") for request in found(store, name)}),
        "rows": sorted({name for batch in store.rows("captures") for name in batch["request"].to_pylist()}),
        "tail": sorted(set(store.table("captures")["request"].to_pylist())),
        "SQL": sorted(sql("select distinct request from captures")),
        "named SQL": sorted(sql("select distinct request from named.captures")),
        "count": sql("select count(*) from captures"),
        "count of it": sql(f"select count(*) from captures where request in ('{SECRET}', 'third')"),
        "row maps": sorted(set(sql("select distinct unnest(rows).request from steps"))),
        "requests": sorted({name for batch in store.rows("requests") for name in batch["request"].to_pylist()}),
        "spans": sorted(sql("select name from spans")),
        "verdicts": sql("select text from verdicts"),
        "processes": sorted(sql("select epoch from sources")),
    }


def found(store: Store, request: str) -> list[str]:
    return list(store.captures(request=request)["request"].to_pylist())


def test_a_request_is_hidden_whichever_way_a_store_is_asked(store: Store, path: Path) -> None:
    before = names(store)
    assert before["captures"] == ["other", SECRET, "third"] and before["count"] == [3 * ROWS]
    row, kept = (store.captures(request=name).to_pylist()[0] for name in (SECRET, "other"))
    for each in (row, kept):
        assert np.array_equal(store.tensor(each), value(0, 0, 0))
    assert store.tensors(SECRET)["L0.mlp_out"].values.shape[0] == ROWS
    assert run("erase", path, "--request", SECRET, "--yes").exit_code == 0
    after = names(store)
    for way in ("captures", "with values", "rows", "tail", "SQL", "named SQL"):
        assert after[way] == ["other", "third"], way
    assert (after["of it"], after["row maps"], after["requests"]) == (["third"], ["other", "third"], ["other"])
    assert (after["count"], after["count of it"]) == ([2 * ROWS], [ROWS])
    assert (after["spans"], after["verdicts"]) == (["of other"], ["(erased) waits"])
    with pytest.raises(RowGone, match="no captured row"):
        store.tensor(row)
    for ask in (lambda: store.tensor((SECRET, "L0.mlp_out")), lambda: store.tensors(SECRET)):
        with pytest.raises(NothingFound):
            ask()
    assert np.array_equal(store.tensor(kept), value(0, 0, 0)), "of the same batch"


def test_a_tenant_is_hidden_with_all_that_its_processes_wrote(store: Store, path: Path) -> None:
    row = store.captures(request="third").to_pylist()[0]
    assert np.array_equal(store.tensor(row), value(0, 0, 0))
    assert run("erase", path, "--tenant", "rival", "--yes").exit_code == 0
    after = names(store)
    assert after["captures"] == after["SQL"] == after["named SQL"] == after["row maps"] == ["other", SECRET]
    assert after["of it"] == [SECRET] and 7 in after["processes"] and 8 not in after["processes"]
    with pytest.raises(RowGone):
        store.tensor(row)


def test_who_reads_when_the_order_is_given_is_shown_no_more_of_it(path: Path) -> None:
    batches = open_store(path).rows("captures")
    shown = next(batches)["request"].to_pylist()
    assert SECRET in shown
    assert run("erase", path, "--request", SECRET, "--yes").exit_code == 0
    assert {name for batch in batches for name in batch["request"].to_pylist()} == {"other", "third"}


def test_while_nobody_can_tell_what_is_erased_nothing_is_shown(store: Store, path: Path) -> None:
    row = store.captures(request="other").to_pylist()[0]
    store.tensor(row)
    assert run("erase", path, "--request", SECRET, "--yes").exit_code == 0
    (path / "v1" / "erased.json").write_text("{")
    kind = ErasedUnreadable if type(store) is Store else ConnectionError
    asks: list[Callable[[], Any]] = [
        store.captures,
        lambda: store.sql("select 1 from captures"),
        lambda: store.tensor(row),
    ]
    for ask in asks:
        with pytest.raises(kind, match=r"erased\.json cannot be read"):
            ask()
