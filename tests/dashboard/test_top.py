"""`insitu top` as it is used: in a terminal, in a pipe, and with a store that is not there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from textual.widgets import Static

from insitu.cli import insitu
from insitu_collector.simulate import RUN, write_store
from insitu_dashboard.hub import Hub
from insitu_dashboard.top_screen import Top


@pytest.fixture
def judged_store(store: Path) -> Path:
    """A store with its verdicts in it, as the judge leaves one."""
    ran = CliRunner().invoke(insitu, ["judge", str(store), "--once"])
    assert ran.exit_code == 0, ran.output
    return store


def test_in_a_pipe_it_prints_once(judged_store: Path) -> None:
    ran = CliRunner().invoke(insitu, ["top", str(judged_store)])
    assert ran.exit_code == 0
    assert RUN in ran.stdout and "stage 1" in ran.stdout


def test_json_is_the_picture_of_the_pages(judged_store: Path) -> None:
    ran = CliRunner().invoke(insitu, ["top", str(judged_store), "--json"])
    assert json.loads(ran.stdout)["schema"] == "insitu.picture/1"


def test_no_store_is_one_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(insitu, ["top", str(tmp_path / "none")])
    assert ran.exit_code == 1
    assert len(ran.stderr.strip().splitlines()) == 1 and "insitu demo" in ran.stderr


def text_of(app: Top, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).content)


def test_the_screen_shows_verdict_and_ranks_and_can_be_held(judged_store: Path) -> None:
    async def watch() -> None:
        hub = Hub(judged_store)
        hub.poll()
        app = Top(hub)
        async with app.run_test(size=(120, 40)) as pilot:
            assert "stage 1 limits the pipeline" in text_of(app, "alarms")
            assert "rank 0" in text_of(app, "ranks")
            await pilot.press("p")
            assert "PAUSED" in text_of(app, "strip")
            await pilot.press("p")
            assert "PAUSED" not in text_of(app, "strip")
            await pilot.press("r")
            assert RUN in text_of(app, "strip")
            await pilot.resize_terminal(60, 20)
            assert "rank 1" in text_of(app, "ranks")
            await pilot.press("q")
        hub.close()

    asyncio.run(watch())


def test_markup_in_a_name_is_shown_and_not_obeyed(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    name = "[bold]x[/] <b>"
    models = pa.array([name] * tables["sources"].num_rows)
    place = tables["sources"].schema.get_field_index("model")
    write_store(tables | {"sources": tables["sources"].set_column(place, "model", models)}, str(tmp_path))

    async def watch() -> None:
        hub = Hub(tmp_path)
        hub.poll()
        app = Top(hub)
        async with app.run_test(size=(160, 40)):
            assert name in text_of(app, "strip")
        hub.close()

    asyncio.run(watch())


def test_before_anything_was_recorded_it_says_what_to_do(tmp_path: Path) -> None:
    async def watch() -> None:
        hub = Hub(tmp_path)
        app = Top(hub)
        async with app.run_test(size=(80, 24)):
            assert "Reading the store" in text_of(app, "notice")
            hub.poll()
            app.look()
            assert "cannot be read" in text_of(app, "notice")
        hub.close()

    asyncio.run(watch())
