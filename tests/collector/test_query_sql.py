"""SQL over a store: only what a query needs is read, and a stranger's query gets nothing but its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from query_kit import RUN, STEP_NS, UNIX, Recorder, capture, site, source, step

from insitu.records import TABLES
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.parts import Answer
from insitu_collector.query.sql import Limits, QueryTooLarge
from insitu_collector.query.sql_process import SqlProcesses
from insitu_collector.store import Store, open_store

STEPS = 400


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("sql") / "store"
    recorder = Recorder(path)
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out"), site(7, 1, "L1.mlp_out")])
    for first in range(0, STEPS, 20):
        steps = range(first, first + 20)
        recorder.write("steps", [step(7, number) for number in steps])
        recorder.write(
            "captures", [capture(7, number, at, "r", number, data=bytes(4096)) for number in steps for at in (0, 1)]
        )
        if first % 100 == 80:
            recorder.seal()
    recorder.close()
    return open_store(path)


def read_by(store: Store, query: str) -> tuple[pa.Table, int]:
    begin = store.bytes_read
    found = store.sql(query)
    return found, store.bytes_read - begin


def test_only_batches_and_columns_that_a_query_needs_are_read(store: Store) -> None:
    store.sql("select count(step_id) from captures")
    every, of_all = read_by(store, "select sum(octet_length(data)) as n from captures")
    assert every.to_pylist() == [{"n": 2 * STEPS * 4096}]
    few, of_few = read_by(store, "select sum(octet_length(data)) as n from captures where step_id between 40 and 59")
    assert few.to_pylist() == [{"n": 2 * 20 * 4096}]
    assert of_few < of_all / 8
    _, without = read_by(store, "select request, count(*) from captures group by 1")
    assert without < of_all / 4


def test_tables_with_names_beside_numbers(store: Store) -> None:
    found = store.sql(
        "select site, layer, run, count(*) as n, min(unix_ns) as first from named.captures"
        " where site = 'L1.mlp_out' and step_id >= 10 group by all"
    )
    expected = {"site": "L1.mlp_out", "layer": 1, "run": RUN, "n": STEPS - 10, "first": UNIX + 10 * STEP_NS}
    assert found.to_pylist() == [expected]
    assert store.sql("select t0_unix_ns - t0_ns as d from named.steps limit 1").to_pylist() == [{"d": UNIX}]
    joined = "select count(*) as n from captures c join steps s using (epoch, step_id) where s.dropped = 0"
    assert store.sql(joined).to_pylist() == [{"n": 2 * STEPS}]


def test_every_table_is_there_as_it_is_stored_and_with_names(store: Store) -> None:
    for table in TABLES:
        assert store.sql(f"select * from {table}").num_rows == store.table(table).num_rows
        assert store.sql(f'select * from named."{table}"').num_rows == store.table(table).num_rows


@pytest.mark.parametrize(
    "filter",
    [
        *("step_id is null", "step_id is not null", "site <> 0", "step_id in (1, 399)", "epoch = 7", "epoch > 7"),
        *("position > 5 or step_id < 3", "row_seq = 17", "dtype like 'float%'", "not (step_id > 10)", "rank < 0"),
    ],
)
def test_no_batch_is_left_out_that_has_a_row(store: Store, filter: str) -> None:
    import duckdb

    with duckdb.connect() as plain:
        plain.register("captures", store.table("captures"))
        expected = plain.sql(f"select count(*) as n from captures where {filter}").fetchall()
    assert [
        tuple(row.values()) for row in store.sql(f"select count(*) as n from captures where {filter}").to_pylist()
    ] == expected


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("select nope from steps", 'Binder Error: Referenced column "nope" not found'),
        ("selct 1", 'Parser Error: syntax error at or near "selct"'),
        ("select * from dreams", "Table with name dreams does not exist"),
        ("select 1 / 'x'", "Conversion Error: Could not convert string 'x'"),
    ],
)
def test_a_bad_query_is_one_line(store: Store, query: str, says: str) -> None:
    with pytest.raises(BadQuestion, match=says) as error:
        store.sql(query)
    assert "\n" not in str(error.value)


# -- of strangers ----------------------------------------------------------------------------------------------------


def nobody(_: Callable[[], None]) -> None:
    pass


@pytest.fixture(scope="module")
def processes() -> Iterator[SqlProcesses]:
    started = SqlProcesses()
    yield started
    started.close()


Ask = Callable[..., pa.Table]


@pytest.fixture
def ask(processes: SqlProcesses, store: Store) -> Ask:
    def answered(query: str, limits: Limits | None = None, ended: Callable[..., None] = nobody) -> pa.Table:
        answer = Answer(processes.parts(store, "", query, limits or Limits(), ended))
        return pa.Table.from_batches(answer.batches(), schema=answer.schema)

    return answered


secret = "a line that is nobody's business"


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('{file}', header = false)",
        "select * from read_text('{file}')",
        "select * from '{file}'",
        "select * from glob('{folder}/*')",
        "select * from sniff_csv('{file}')",
        "copy (select 1) to '{folder}/written'",
        "attach '{folder}/written' as other",
        "create table t as select 1",
        "insert into steps select * from steps",
        "drop view captures",
        "set memory_limit = '100GB'",
        "pragma threads = 99",
        "install httpfs",
        "load httpfs",
        "select 1; select 2",
        "export database '{folder}/written'",
        "call pragma_version()",
        "select * from secret_rows",
        "select * from read_parquet('http://127.0.0.1:9/x')",
    ],
)
def test_a_stranger_reaches_no_file_no_setting_and_no_variable(ask: Ask, tmp_path: Path, query: str) -> None:
    file = tmp_path / "secret.csv"
    file.write_text(secret)
    secret_rows = pa.table({"a": [secret]})
    assert secret_rows.num_rows == 1
    with pytest.raises(BadQuestion) as error:
        ask(query.format(file=file, folder=tmp_path))
    assert secret not in str(error.value)
    assert [found.name for found in tmp_path.iterdir()] == ["secret.csv"]


def test_a_query_has_bounds_of_rows_memory_and_time(ask: Ask) -> None:
    with pytest.raises(QueryTooLarge, match="more than 100 rows"):
        ask("select * from captures", Limits(max_rows=100))
    with pytest.raises(QueryTooLarge, match="needs more memory"):
        ask("select list(a.range) from range(100000000) a", Limits(memory_bytes=32 << 20))
    with pytest.raises(QueryTooLarge, match="was given up"):
        ask("select sum(a.range * b.range) from range(10000000) a, range(10000000) b", ended=lambda end: end())
    with pytest.raises(QueryTooLarge, match="took too long"):
        ask("select sum(a.range * b.range) from range(10000000) a, range(10000000) b", Limits(seconds=0.2))


def test_a_query_that_nobody_waits_for_ends(ask: Ask) -> None:
    given_up = threading.Event()

    def give_up_soon(interrupt: Callable[[], None]) -> None:
        def after() -> None:
            given_up.wait(60)
            interrupt()

        threading.Thread(target=after, daemon=True).start()

    endless = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"
    rows: list[Any] = []
    threading.Timer(0.2, given_up.set).start()
    with pytest.raises(QueryTooLarge, match="was given up"):
        rows += ask(endless, Limits(seconds=60), give_up_soon)
    assert given_up.is_set()


def test_a_stranger_s_rows_are_those_of_the_store(ask: Ask) -> None:
    query = "select site, count(*) as n from named.captures where step_id < 30 group by all order by site"
    assert ask(query).to_pylist() == [{"site": name, "n": 30} for name in ("L0.mlp_out", "L1.mlp_out")]
    assert ask("select step_id from steps where false").schema.names == ["step_id"]
