"""A simulated run of two stages whose second one gets slow, as tables, as a view, and as a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from access_kit import Rig
from reached_kit import Reached, collectors

from insitu_collector.access.roles import Role
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


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """What collectors and readers of this session know each other by."""
    return Rig(tmp_path_factory.mktemp("access"))


@pytest.fixture(scope="session")
def reader(rig: Rig) -> str:
    """Return the path of a file with a token that may read and nothing else."""
    return rig.token_file(rig.entry("reader", Role.READ), "reader")


@pytest.fixture(params=["folder", "collector"])
def reached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reached]:
    """Read stores in their folders, and through a collector's port with TLS and a token."""
    if request.param == "folder":
        yield str
        return
    rig: Rig = request.getfixturevalue("rig")
    monkeypatch.setenv("INSITU_TOKEN_FILE", request.getfixturevalue("reader"))
    monkeypatch.setenv("INSITU_CA_FILE", str(rig.ca_file))
    with collectors(rig) as address:
        yield address


@pytest.fixture
def hub(store: Path, reached: Reached) -> Iterator[Hub]:
    found = Hub(reached(store))
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
