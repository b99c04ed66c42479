"""The pages in every state, as Streamlit runs them: what the canvas is given, what stands beside it, no exception."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from reached_kit import Reached
from replica_kit import of_engines
from streamlit.testing.v1 import AppTest

from insitu.records import schema_of
from insitu_collector.clocks.timeline import timeline_of
from insitu_collector.simulate import RUN, Scenario, write_store
from insitu_collector.views.spans import CLASSES
from insitu_dashboard import pages
from insitu_dashboard.hub import Hub

PAGES = ("live", "pipeline")
HubOf = Callable[[dict[str, pa.Table]], Hub]


def opened(page: str, hub: Hub, **query: str) -> AppTest:
    """Return a page after its first run."""
    pages.use(hub)
    test = AppTest.from_string(f"from insitu_dashboard import pages\npages.{page}()", default_timeout=30)
    for name, value in query.items():
        test.query_params[name] = value
    return test.run()


def given(test: AppTest) -> Any:
    """Return what the page handed to its canvas."""
    assert not test.exception, [each.value for each in test.exception]
    (canvas,) = test.get("bidi_component")
    return json.loads(canvas.proto.json)


@pytest.fixture
def hub_of(tmp_path: Path, reached: Reached) -> Iterator[HubOf]:
    with ExitStack() as hubs:

        def made(tables: dict[str, pa.Table]) -> Hub:
            write_store(tables, str(tmp_path / "s"))
            hub = hubs.enter_context(closing(Hub(reached(tmp_path / "s"))))
            hub.poll()
            return hub

        yield made


def moved_to_now(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Return the tables of a run whose newest heartbeat is of this moment."""
    last = int(tables["health"]["t_ns"].to_numpy().max())
    shift = time.time_ns() - last - 10**8
    sources = [row | {"unix_anchor_ns": shift, "mono_anchor_ns": 0} for row in tables["sources"].to_pylist()]
    return {**tables, "sources": pa.Table.from_pylist(sources, schema=schema_of("sources"))}


@pytest.mark.parametrize("page", PAGES)
def test_a_run_is_handed_to_the_canvas_with_the_address_of_its_stream(page: str, hub: Hub) -> None:
    data = given(opened(page, hub))
    assert data["stream"].startswith("/api/live?win=60")
    assert ("spans=1" in data["stream"]) == (page == "pipeline")
    assert [cell["rank"] for cell in data["picture"]["grid"]] == [0, 1]
    assert (data["view"], data["selected"], data["paused"]) == (None, None, False)
    if page == "pipeline":
        assert len(data["spans"]["lane"]) > 100
        assert data["spans"]["classes"] == [str(cls) for cls in CLASSES]


@pytest.mark.parametrize("page", PAGES)
def test_loading(page: str, store: Path, reached: Reached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LOAD_S", 0.0)
    data = given(opened(page, Hub(reached(store))))
    assert data["picture"]["header"]["state"] == "loading"
    assert "Reading" in data["picture"]["notice"]["text"]


@pytest.mark.parametrize("page", PAGES)
def test_empty(page: str, hub_of: HubOf) -> None:
    hub = hub_of({})
    data = given(opened(page, hub))
    assert data["picture"]["header"]["state"] == "empty"
    assert "insitu demo" in data["picture"]["notice"]["remedy"]


@pytest.mark.parametrize("page", PAGES)
def test_error(page: str, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "nowhere")
    hub.poll()
    notice = given(opened(page, hub))["picture"]["notice"]
    assert notice["level"] == "error"
    assert str(tmp_path / "nowhere") in notice["text"]


@pytest.mark.parametrize("page", PAGES)
def test_stale(page: str, hub: Hub) -> None:
    picture = given(opened(page, hub))["picture"]
    assert picture["header"]["state"] == "stale"
    assert picture["notice"]["level"] == "warning"
    assert picture["grid"], "what was recorded stays"


@pytest.mark.parametrize("page", PAGES)
def test_live_and_nothing_was_judged(page: str, tables: dict[str, pa.Table], hub_of: HubOf) -> None:
    picture = given(opened(page, hub_of(moved_to_now(tables))))["picture"]
    assert picture["header"]["state"] == "live"
    assert "judge" in picture["notice"]["remedy"]


@pytest.mark.parametrize("page", PAGES)
def test_partial(page: str, tables: dict[str, pa.Table], hub_of: HubOf) -> None:
    rows = tables["health"].to_pylist()
    lost = [{"table": "intervals", "reason": "queue_full", "rows": 12}]
    health = [row | ({"dropped": lost} if row["rank"] == 1 else {}) for row in rows]
    changed = moved_to_now(tables) | {"health": pa.Table.from_pylist(health, schema=schema_of("health"))}
    data = given(opened(page, hub_of(changed)))
    assert data["picture"]["header"]["drops"] == 12
    assert data["picture"]["notice"]["text"].startswith("Partial")


@pytest.mark.parametrize("page", PAGES)
def test_ended(page: str, tables: dict[str, pa.Table], hub_of: HubOf) -> None:
    last = int(tables["health"]["t_ns"].to_numpy().max())
    ends = [
        {"epoch": 1 + rank, "rank": rank, "stage": rank, "row_seq": 10**6, "t_ns": last + 1, "closing": True}
        for rank in (0, 1)
    ]
    health = pa.concat_tables([tables["health"], pa.Table.from_pylist(ends, schema=schema_of("health"))])
    picture = given(opened(page, hub_of(tables | {"health": health})))["picture"]
    assert picture["header"]["state"] == "ended"
    assert picture["notice"] is None


@pytest.mark.parametrize("page", PAGES)
def test_each_replica_of_a_run_can_be_chosen_and_has_its_address(page: str, hub_of: HubOf) -> None:
    hub = hub_of(of_engines(Scenario(seed=3, seconds=3.0, replicas=2)))
    for name, replica, ranks in ((None, 0, [0, 1]), (f"{RUN}.1", 1, [2, 3])):
        test = opened(page, hub, **({"run": name} if name else {}))
        data = given(test)
        assert [cell["rank"] for cell in data["picture"]["grid"]] == ranks
        assert data["picture"]["header"]["replica"] == f"replica {replica} of 2"
        assert (f"run={RUN}.1" in data["stream"]) == bool(replica)
        (choice,) = (box for box in test.selectbox if box.label == "Run")
        assert choice.options == [f"run {RUN} (latest)", f"run {RUN}, replica 1"]
    choice.select(RUN).run()
    assert [cell["rank"] for cell in given(test)["picture"]["grid"]] == [0, 1]


def test_an_unknown_run_says_which_are_here(hub: Hub) -> None:
    picture = given(opened("live", hub, run="feedfeedfeedfeed"))["picture"]
    assert "feedfeedfeedfeed" in picture["notice"]["text"]
    assert hub.runs()[0] in picture["notice"]["remedy"]


@pytest.mark.parametrize("run", ["<b>hi</b>", "..", "x" * 200])
def test_a_run_that_is_none_is_said_to_be_none(hub: Hub, run: str) -> None:
    picture = given(opened("live", hub, run=run))["picture"]
    assert picture["notice"]["level"] == "error"
    assert run[:40] in picture["notice"]["text"]


def test_an_address_restores_window_view_selection_and_filter(hub: Hub, tables: dict[str, pa.Table]) -> None:
    end = timeline_of(tables["sources"]).unix_ns(1010 * 10**9)
    query = {"t0": str(end - 10**9), "t1": str(end), "win": "300", "cls": "gc", "stage": "1"}
    data = given(opened("pipeline", hub, sel=f"1.12.{end - 10**8}.compute", **query))
    assert data["view"] == {"t0": str(end - 10**9), "t1": str(end)}
    assert data["selected"] == {"rank": 1, "step": 12, "t0": str(end - 10**8), "cls": "compute"}
    assert data["filter"] == {"stages": [1], "ranks": None, "classes": ["gc"]}
    assert "win=300" in data["stream"]


@pytest.mark.parametrize("page", PAGES)
def test_a_paused_page_has_no_stream_and_shows_that_time(page: str, hub: Hub, tables: dict[str, pa.Table]) -> None:
    at_ns = timeline_of(tables["sources"]).unix_ns(1006 * 10**9)
    data = given(opened(page, hub, live="0", t1=str(at_ns)))
    assert (data["stream"], data["paused"]) == (None, True)
    assert data["picture"]["heat"]["unix_s"][-1] <= at_ns / 1e9
    if page == "pipeline":
        newest = int(data["spans"]["base"]) + 1e3 * max(data["spans"]["t0_us"])
        assert newest <= at_ns


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_have_what_the_charts_show(page: str, hub: Hub) -> None:
    test = opened(page, hub)
    assert not test.dataframe
    test.toggle[0].set_value(True).run()
    assert not test.exception
    assert test.query_params["table"] == "1"
    shown = [table.value for table in test.dataframe]
    assert all(len(table) for table in shown)
    if page == "live":
        assert list(shown[0]["rank"]) == [0, 1]
    else:
        assert list(shown[-1]["stage"]) == [0, 1]


def test_choosing_a_window_writes_it_into_the_address(hub: Hub) -> None:
    test = opened("live", hub)
    test.button_group[0].set_value(300).run()
    assert not test.exception
    assert test.query_params["win"] == "300"
    assert "win=300" in given(test)["stream"]


def test_a_browser_that_cannot_stream_is_given_a_picture_each_second(hub: Hub) -> None:
    test = opened("live", hub)
    test.session_state["fallback"] = True
    data = given(test.run())
    assert data["stream"] is None
    assert data["picture"]["grid"]


def test_the_whole_script_opens_on_the_live_page(hub: Hub) -> None:
    pages.use(hub)
    script = Path(pages.__file__).with_name("script.py")
    test = AppTest.from_file(str(script), default_timeout=30).run()
    assert given(test)["stream"].startswith("/api/live")
