"""What a notebook asks of a store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from replica_kit import of_engines

from insitu.records import schema_of
from insitu.vocabulary import RequestEvent
from insitu_collector.rows.selection import NothingFound, as_time
from insitu_collector.simulate import RUN, UNIX_MINUS_MONO_NS, Fault, Scenario, simulate, write_store
from insitu_collector.store import Store, open_store
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.charts import MOST_MARKS

STEP = 300


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    found = simulate(Scenario(seed=5, seconds=8.0, faults=(Fault("slow", 2.0, 1, ms=15.0),)))
    whole = pc.is_in(found["requests"]["event"], pa.array([RequestEvent.ARRIVED, RequestEvent.FINISHED], pa.uint8()))
    found["requests"] = found["requests"].filter(whole)
    tokens = [
        {"epoch": 900, "rank": -1, "stage": -1, "row_seq": 10_000 + n, "request": f"req-{n}", "event": int(event)}
        | {"t_ns": int(found["requests"]["t_ns"][n].as_py()) + later}
        for n in range(20)
        for event, later in (
            (RequestEvent.ARRIVED, 0),
            (RequestEvent.FIRST_TOKEN, 10**8),
            (RequestEvent.TOKEN, 2 * 10**8),
        )
    ]
    for place, row in enumerate(tokens):
        row["row_seq"] = 10_000 + place
    more = pa.Table.from_pylist(tokens, schema=schema_of("requests"))
    return found | {"requests": pa.concat_tables([found["requests"], more])}


@pytest.fixture(scope="module")
def store(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("notebook") / "store"
    write_store(tables, str(path))
    first = open_store(path).verdicts()
    rows = [{"epoch": 7, "rank": -1, "stage": -1, "row_seq": n, **verdict.row()} for n, verdict in enumerate(first)]
    write_store({"verdicts": pa.Table.from_pylist(rows, schema=schema_of("verdicts"))}, str(path))
    return open_store(path)


def layers_of(chart: Any) -> list[list[dict[str, Any]]]:
    """Return the rows of each layer, of all panels."""
    spec = chart.to_dict()
    panels = spec.get("vconcat", [spec])
    layers = [layer.get("data", panel.get("data")) for panel in panels for layer in panel["layer"]]
    return [spec["datasets"][data["name"]] if "name" in data else data["values"] for data in layers]


def bars_of(chart: Any) -> list[dict[str, Any]]:
    return layers_of(chart)[0]


def test_verdicts_and_stalls_say_the_same(store: Store) -> None:
    (verdict,) = store.verdicts()
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.on_rank) == ("stage_limits", 1)
    assert store.stalls().verdicts == [verdict]
    assert verdict.text in store.stalls(RUN[:5])._repr_html_()


def test_intervals_of_a_window_carry_unix_times_and_ledger_classes(store: Store, tables: dict[str, pa.Table]) -> None:
    whole = store.intervals()
    assert whole.num_rows == tables["intervals"].num_rows
    assert set(whole["ledger_class"].to_pylist()) >= {"compute", "host", "transfer", "wait_downstream"}
    begin = 1_003 * 10**9 + UNIX_MINUS_MONO_NS
    part = store.intervals(begin, as_time(begin + 10**9))
    assert 0 < part.num_rows < whole.num_rows / 2
    assert pc.min(part["t1_unix_ns"]).as_py() >= begin
    assert pc.max(part["t0_unix_ns"]).as_py() < begin + 10**9


def test_a_timeline_of_a_step_shows_all_of_it_and_fades_the_rest(store: Store, tables: dict[str, pa.Table]) -> None:
    bars = bars_of(store.timeline(step=STEP))
    mine = [bar for bar in bars if bar["step"] == STEP]
    rows = tables["intervals"].filter(pc.field("step_id") == STEP)
    assert len(mine) == rows.num_rows
    assert {bar["rank"] for bar in mine} == {"stage 0, rank 0", "stage 1, rank 1"}
    assert all((bar["opacity"] == 1) == (bar["step"] == STEP) for bar in bars)


def test_a_timeline_without_a_place_shows_the_busiest_half_second_of_the_verdict(store: Store) -> None:
    chart = store.timeline()
    (verdict,) = store.verdicts()
    assert chart.to_dict()["title"]["text"] == "stage 1 limits the pipeline"
    x = chart.to_dict()["layer"][0]["encoding"]["x"]
    assert x["scale"]["domain"] == [0, pytest.approx(500)]
    begin = x["title"].removeprefix("milliseconds since ")
    assert as_time(verdict.window_start_unix_ns) <= begin <= as_time(verdict.window_end_unix_ns)
    assert 20 < len(bars_of(chart)) <= MOST_MARKS


def test_a_timeline_of_a_window_is_cut_to_it(store: Store) -> None:
    begin = 1_003 * 10**9 + UNIX_MINUS_MONO_NS
    bars = bars_of(store.timeline(window=(begin, begin + 10**8)))
    assert min(bar["t0"] for bar in bars) == 0
    assert max(bar["t1"] for bar in bars) == pytest.approx(100)


def test_ledger_and_latency_charts_carry_the_verdict(store: Store) -> None:
    for chart in (store.ledger_chart(), store.latency_chart()):
        assert chart.to_dict()["title"]["text"] == "stage 1 limits the pipeline"
    panels = layers_of(store.latency_chart())
    for bands, _, lines in (panels[:3], panels[3:]):
        values = [row["value"] for row in lines if row["value"] is not None]
        assert values and values == pytest.approx([100] * len(values))
        assert [band["kind"] for band in bands] in ([], ["stage_limits"])


def test_a_trace_is_written_where_it_is_asked_for(store: Store, tmp_path: Path) -> None:
    begin = 1_003 * 10**9 + UNIX_MINUS_MONO_NS
    whole, part = store.perfetto(tmp_path / "a"), store.perfetto(tmp_path / "b", (begin, begin + 10**8))
    assert whole.stat().st_size > 5 * part.stat().st_size > 0
    with pytest.raises(FileExistsError):
        store.perfetto(whole)
    assert store.perfetto(whole, force=True) == whole


def test_what_is_not_there_is_one_line(store: Store, tables: dict[str, pa.Table], tmp_path: Path) -> None:
    with pytest.raises(NothingFound, match="no intervals of step 99999999"):
        store.timeline(step=99_999_999)
    with pytest.raises(NothingFound, match="it goes from"):
        store.timeline(window=("2020-01-01", "2020-01-02"))
    with pytest.raises(NothingFound, match="has no run 'ff'"):
        store.stalls("ff")
    with pytest.raises(ValueError, match="of a step or of a window"):
        store.timeline(step=1, window=(1, 2))
    bare = {name: tables[name] for name in ("sources", "health")}
    write_store(bare, str(tmp_path / "store"))
    other = open_store(tmp_path / "store")
    for ask in (other.timeline, other.ledger_chart, other.latency_chart):
        with pytest.raises(NothingFound, match=f"run {RUN} has no"):
            ask()
    write_store({}, str(tmp_path / "empty"))
    with pytest.raises(NothingFound, match="holds no record of any rank"):
        open_store(tmp_path / "empty").stalls()


def test_without_altair_the_line_names_the_extra(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.delitem(sys.modules, "insitu_collector.views.charts")
    monkeypatch.delattr("insitu_collector.views.charts")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'insitu\[notebook\]'"):
        store.ledger_chart()


def test_charts_are_of_the_replica_that_is_asked_for(tmp_path: Path) -> None:
    slow = Fault("slow", 2.0, 1, replica=1, ms=15.0)
    write_store(of_engines(Scenario(seed=5, seconds=8.0, replicas=2, faults=(slow,))), str(tmp_path))
    both = open_store(tmp_path)
    for replica, ranks in ((None, (0, 1)), (0, (0, 1)), (1, (2, 3))):
        named = {f"stage {stage}, rank {rank}" for stage, rank in enumerate(ranks)}
        assert {bar["rank"] for bar in bars_of(both.timeline(replica=replica))} == named
        assert {bar["rank"] for bar in bars_of(both.timeline(step=200, replica=replica))} == named
        assert {bar["rank"] for bar in bars_of(both.ledger_chart(replica=replica))} == named
        assert both.stalls(replica=replica).replica == (replica or 0)
    assert both.ledger_chart(replica=1).to_dict()["title"]["text"] == "stage 1 limits the pipeline"
    for chart in (both.timeline, both.ledger_chart, both.stalls):
        with pytest.raises(NothingFound, match="has no replica 2; it has 0, 1"):
            chart(replica=2)
