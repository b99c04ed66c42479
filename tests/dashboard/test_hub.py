"""One reader for all viewers: what it gives, what it says when it cannot read, and that nothing is read twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import RUN, write_store
from insitu_dashboard.hub import Hub


def state(hub: Hub, run: str | None = None) -> Any:
    return json.loads(hub.picture(run, 60))


def test_the_latest_run_is_shown_unless_another_is_asked_for(hub: Hub) -> None:
    assert hub.runs() == [RUN]
    assert state(hub)["run"] == RUN == state(hub, RUN[:6])["run"]
    assert state(hub, "ffff")["header"]["state"] == "error"


def test_a_run_that_lives_is_shown_before_one_that_began_later_and_ended(
    tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    lives, ended = "11" * 8, "22" * 8
    write_store(renamed(tables, lives, 0), str(tmp_path))
    short = {name: rows.slice(0, rows.num_rows // 4) for name, rows in renamed(tables, ended, 5000).items()}
    write_store(short | {"sources": renamed(tables, ended, 5000)["sources"]}, str(tmp_path))
    hub = Hub(tmp_path)
    hub.poll()
    assert hub.runs() == [lives, ended]
    assert state(hub)["run"] == lives
    assert state(hub, ended)["run"] == ended
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
    assert "there is no store" in (hub.error or "")
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


def test_deltas_are_the_spans_that_came_since(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    parts = list(seconds(tables))
    seqs: dict[tuple[int, str], int] = {}
    hub = Hub(tmp_path)
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


def test_the_thread_follows_and_ends(store: Path) -> None:
    hub = Hub(store).start()
    assert hub.wait_loaded(20)
    assert hub.runs() == [RUN]
    hub.close()
    assert hub.is_closing
