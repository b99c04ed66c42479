"""A simulated run of two stages whose second one gets slow, as tables, as a view, and as a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from insitu_collector.judge.runs import judged
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.verdicts.finding import Verdict
from insitu_dashboard.hub import Hub
from insitu_dashboard.run_view import RunView

SLOW = Scenario(seed=3, seconds=12.0, faults=(Fault("slow", 4.0, 1, ms=20.0),))


@pytest.fixture(scope="session")
def tables() -> dict[str, pa.Table]:
    return simulate(SLOW)


@pytest.fixture(scope="session")
def store(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "store"
    write_store(tables, str(path))
    return path


@pytest.fixture(scope="session")
def verdicts(store: Path) -> list[Verdict]:
    return judged(open_store(store))


@pytest.fixture
def hub(store: Path) -> Iterator[Hub]:
    found = Hub(store)
    found.poll()
    yield found
    found.close()


@pytest.fixture
def view(tables: dict[str, pa.Table], verdicts: list[Verdict]) -> RunView:
    found = RunView()
    found.add(tables)
    found.take_verdicts(verdict_rows(verdicts))
    found.settle()
    return found


def verdict_rows(verdicts: list[Verdict]) -> pa.Table:
    from insitu.records import schema_of

    rows = [
        {"epoch": 77, "rank": -1, "stage": -1, "row_seq": place, **verdict.row()}
        for place, verdict in enumerate(verdicts)
    ]
    return pa.Table.from_pylist(rows, schema=schema_of("verdicts"))
