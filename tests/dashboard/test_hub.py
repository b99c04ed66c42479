"""One reader for all viewers: what it gives, what it says when it cannot read, and that nothing is read twice."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from access_kit import Rig
from click.testing import CliRunner
from proxy_kit import Proxy
from reached_kit import Reached, collectors
from replica_kit import of_engines

from insitu_collector.judge.command import judge
from insitu_collector.query import remote_tail
from insitu_collector.rows.slices import seconds
from insitu_collector.service.server import CollectorServer
from insitu_collector.simulate import RUN, Fault, Scenario, write_store
from insitu_dashboard.hub import MOST_RUNS, Hub


def state(hub: Hub, run: str | None = None) -> Any:
    return json.loads(hub.picture(run, 60))


def test_the_latest_run_is_shown_unless_another_is_asked_for(hub: Hub) -> None:
    assert hub.runs() == [RUN]
    assert state(hub)["run"] == RUN == state(hub, RUN[:6])["run"]
    assert state(hub, "ffff")["header"]["state"] == "error"


def test_a_run_that_lives_is_shown_before_one_that_began_later_and_ended(
    tables: dict[str, pa.Table], tmp_path: Path, reached: Reached
) -> None:
    lives, ended = "11" * 8, "22" * 8
    write_store(renamed(tables, lives, 0), str(tmp_path))
    short = {name: rows.slice(0, rows.num_rows // 4) for name, rows in renamed(tables, ended, 5000).items()}
    write_store(short | {"sources": renamed(tables, ended, 5000)["sources"]}, str(tmp_path))
    hub = Hub(reached(tmp_path))
    hub.poll()
    assert hub.runs() == [lives, ended]
    assert state(hub)["run"] == lives
    assert state(hub, ended)["run"] == ended
    hub.close()


def test_each_replica_is_shown_by_name_and_a_run_by_its_first_whichever_wrote_last(
    tmp_path: Path, reached: Reached
) -> None:
    """Two engines write in turns; what is judged of one is not said of the other."""
    slow = Fault("slow", 2.0, 1, replica=1, ms=20.0)
    tables = of_engines(Scenario(seed=3, seconds=6.0, replicas=2, faults=(slow,)))
    parts, seqs = list(seconds(tables)), dict[tuple[int, str], int]()
    hub = Hub(reached(tmp_path))
    for place, part in enumerate(parts):
        held_back = 2 if place % 2 else 0  # ranks of one engine are behind by a heartbeat
        late = {"health": part["health"].filter(pc.greater_equal(part["health"]["rank"], held_back))}
        write_store(part | late, str(tmp_path), seqs=seqs)
        hub.poll()
        assert (state(hub)["replica"], hub.runs()) == (0, [RUN, f"{RUN}.1"])
    assert CliRunner().invoke(judge, [str(tmp_path), "--once"]).exit_code == 0
    hub.poll()
    for name, replica, ranks, kind in (
        (None, 0, [0, 1], "healthy"),
        (RUN, 0, [0, 1], "healthy"),
        (f"{RUN[:5]}.1", 1, [2, 3], "stage_limits"),
        (".1", 1, [2, 3], "stage_limits"),
    ):
        found = state(hub, name)
        assert (found["run"], found["replica"], found["header"]["replica"]) == (RUN, replica, f"replica {replica} of 2")
        assert [cell["rank"] for cell in found["grid"]] == ranks
        assert {each["id"].split("-")[1] for each in (*found["verdicts"], *found["alarms"])} <= {kind, "healthy"}
        assert bool(found["alarms"]) == (kind == "stage_limits")
    assert f"Replica 2 of run {RUN} is not" in state(hub, f"{RUN}.2")["notice"]["text"]
    hub.close()


def test_all_replicas_of_the_newest_run_are_kept(tmp_path: Path) -> None:
    num_replicas = MOST_RUNS + 2
    write_store(of_engines(Scenario(seed=3, seconds=0.5, base_ms=(5.0,), replicas=num_replicas)), str(tmp_path))
    hub = Hub(tmp_path)
    hub.poll()
    assert hub.runs() == [RUN, *(f"{RUN}.{number}" for number in range(1, num_replicas))]
    hub.close()


def test_a_run_that_is_kept_in_part_says_how_many_replicas_it_has(tmp_path: Path) -> None:
    scenario = Scenario(seed=3, seconds=0.5, base_ms=(5.0,), replicas=6)
    newest = "ab" * 8
    write_store(of_engines(scenario), str(tmp_path))
    write_store(renamed(of_engines(scenario), newest, 5000), str(tmp_path))
    hub = Hub(tmp_path)
    hub.poll()
    older = RUN if hub.runs()[0] == newest else newest
    assert len([name for name in hub.runs() if name.startswith(older)]) == MOST_RUNS - 6
    assert state(hub, older)["header"]["replica"] == "replica 0 of 6"
    hub.close()


def renamed(tables: dict[str, pa.Table], run: str, epochs_from: int) -> dict[str, pa.Table]:
    """Return the tables as another run's: its own epochs, and sources that were started later the more those differ."""
    found = {}
    for name in ("sources", "intervals", "health"):
        column = pc.add(tables[name]["epoch"], pa.scalar(epochs_from, pa.uint64()))
        found[name] = tables[name].set_column(0, tables[name].schema.field("epoch"), column)
    shift = {"run": run, "unix_anchor_ns": 1_700_000_000_000_000_000 + epochs_from, "mono_anchor_ns": epochs_from}
    rows = [row | shift for row in found["sources"].to_pylist()]
    return found | {"sources": pa.Table.from_pylist(rows, schema=tables["sources"].schema)}


def test_viewers_of_one_moment_share_one_picture(hub: Hub) -> None:
    first = hub.picture(None, 60)
    assert hub.picture(None, 60) is first
    assert hub.picture(None, 300) is not first


def test_a_store_that_is_gone_is_said_and_one_that_comes_back_is_read(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    hub = Hub(path)
    hub.poll()
    assert "no store at" in (hub.error or "")
    assert state(hub)["notice"]["level"] == "error"
    shutil.copytree(store, path)
    hub.poll()
    assert hub.error is None
    assert state(hub)["grid"]
    hub.close()


def test_reading_never_writes(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(store, path)
    before = {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*")}
    hub = Hub(path)
    hub.poll()
    hub.live_spans(None)
    hub.close()
    assert {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*")} == before


def test_deltas_are_the_spans_that_came_since(tables: dict[str, pa.Table], tmp_path: Path, reached: Reached) -> None:
    parts = list(seconds(tables))
    seqs: dict[tuple[int, str], int] = {}
    hub = Hub(reached(tmp_path))
    hub.num_streams = 1
    for part in parts[:5]:
        write_store(part, str(tmp_path), seqs=seqs)
    hub.poll()
    opened = hub.live_spans(None)
    assert opened is not None
    number, text = opened
    assert json.loads(text)["reset"] is True
    assert hub.new_spans(None, number) == []
    for part in parts[5:8]:
        write_store(part, str(tmp_path), seqs=seqs)
        hub.poll()
    deltas = hub.new_spans(None, number)
    assert deltas is not None
    assert [json.loads(delta)["reset"] for delta in deltas] == [False] * 3
    expected = sum(part["intervals"].num_rows for part in parts[5:8])
    assert sum(len(json.loads(delta)["lane"]) for delta in deltas) == expected
    assert json.loads(deltas[0])["base"] == json.loads(text)["base"]
    hub.close()


def test_deltas_of_when_nobody_looked_are_not_made_up(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    parts = list(seconds(tables))
    seqs: dict[tuple[int, str], int] = {}
    hub = Hub(tmp_path)
    for part in parts[:3]:
        write_store(part, str(tmp_path), seqs=seqs)
        hub.poll()
    assert hub.new_spans(None, 1) is None
    hub.close()


def test_a_window_is_answered_at_the_detail_asked_for(hub: Hub, tables: dict[str, pa.Table]) -> None:
    opened = hub.live_spans(None)
    assert opened is not None
    base = int(json.loads(opened[1])["base"])
    coarse, fine = (json.loads(hub.spans(None, base, base + 8 * 10**9, pixels) or "") for pixels in (50, 4000))
    assert len(coarse["lane"]) < len(fine["lane"])
    assert sum(coarse["merged"]) == sum(fine["merged"])
    assert hub.spans("ffff", base, base + 1, 10) is None


def test_the_thread_follows_and_ends(store: Path, reached: Reached) -> None:
    hub = Hub(reached(store)).start()
    assert hub.wait_loaded(20)
    assert hub.runs() == [RUN]
    hub.close()
    assert hub.is_closing


# -- through a collector's port ---------------------------------------------------------------------------------------


@pytest.fixture
def remote(rig: Rig, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_TOKEN_FILE", reader)
    monkeypatch.setenv("INSITU_CA_FILE", str(rig.ca_file))


@pytest.mark.usefixtures("remote")
def test_a_picture_is_the_same_from_afar(store: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_000_000)
    found = []
    with collectors(rig) as address:
        for path in (str(store), address(store)):
            hub = Hub(path)
            hub.poll()
            found.append((state(hub), hub.runs(), hub.live_spans(None)))
            hub.close()
    assert found[0] == found[1]


@pytest.mark.usefixtures("remote")
def test_a_collector_that_is_away_is_said_and_one_that_comes_back_is_read_on(
    tables: dict[str, pa.Table], tmp_path: Path, rig: Rig
) -> None:
    parts = list(seconds(tables))
    seqs: dict[tuple[int, str], int] = {}
    write_store(parts[0] | parts[1], str(tmp_path), seqs=seqs)
    with rig.serving(tmp_path) as server:
        hub = Hub(server.address)
        hub.poll()
        assert state(hub)["grid"]
    hub.poll()
    said = state(hub)["notice"]
    assert "no collector answers at grpcs://" in said["text"] and "goes on by itself" in said["remedy"]
    assert hub.runs() == [RUN], "what was read stays"
    write_store(parts[2], str(tmp_path), seqs=seqs)
    with CollectorServer(tmp_path, port=server.port, access=rig.access()):
        hub.poll()
        assert hub.error is None and state(hub)["grid"]
        hub.close()


@pytest.mark.usefixtures("remote")
def test_a_refresh_costs_what_is_new_not_the_store(tables: dict[str, pa.Table], tmp_path: Path, rig: Rig) -> None:
    parts = list(seconds(tables))
    seqs: dict[tuple[int, str], int] = {}
    for part in parts[:-1]:
        write_store(part, str(tmp_path), seqs=seqs)
    with rig.serving(tmp_path) as server:
        hub = Hub(server.address)
        costs = [cost(hub), cost(hub)]
        write_store(parts[-1], str(tmp_path), seqs=seqs)
        costs.append(cost(hub))
        hub.close()
    whole, quiet, second = costs
    assert quiet < 1_000, "eight tables without a new row"
    assert second < whole / 5, "one second of twelve"


def test_closing_does_not_wait_for_a_collector_that_is_silent(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu_collector.query.remote._OPTIONS", ())  # nobody looks whether it is still there
    with CollectorServer(store, port=0, compact=False) as server, Proxy(server.port) as proxy:
        hub = Hub(f"grpc://127.0.0.1:{proxy.port}")
        hub.poll()
        proxy.silence()
        asked, ask = threading.Event(), remote_tail._Call.ask

        def asking(call: remote_tail._Call, tables: Iterable[str], final: bool) -> None:
            ask(call, tables, final)
            asked.set()

        monkeypatch.setattr(remote_tail._Call, "ask", asking)
        hub.start()
        assert asked.wait(30), "its look gets no answer"
        hub.close()
    assert caplog.messages == []


def cost(hub: Hub) -> int:
    """Return the bytes of a poll."""
    before = 0 if hub.store is None else hub.store.bytes_read
    hub.poll()
    assert hub.error is None and hub.store is not None
    return hub.store.bytes_read - before
