"""`insitu top` as it is used: in a terminal, in a pipe, and with a store that is not there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest
from access_kit import Rig
from click.testing import CliRunner
from reached_kit import Reached, collectors
from replica_kit import of_engines
from textual.widgets import Static

from insitu.cli import insitu
from insitu_collector.access.roles import Role
from insitu_collector.simulate import RUN, Fault, Scenario, write_store
from insitu_dashboard.hub import Hub
from insitu_dashboard.top_screen import Top


@pytest.fixture
def judged_store(store: Path) -> Path:
    """A store with its verdicts in it, as the judge leaves one."""
    ran = CliRunner().invoke(insitu, ["judge", str(store), "--once"])
    assert ran.exit_code == 0, ran.output
    return store


def test_in_a_pipe_it_prints_once(judged_store: Path, reached: Reached) -> None:
    ran = CliRunner().invoke(insitu, ["top", reached(judged_store)])
    assert ran.exit_code == 0
    assert RUN in ran.stdout and "stage 1" in ran.stdout


def test_json_is_the_picture_of_the_pages(judged_store: Path, reached: Reached) -> None:
    ran = CliRunner().invoke(insitu, ["top", reached(judged_store), "--json"])
    assert json.loads(ran.stdout)["schema"] == "insitu.picture/1"


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """Two engines side by side; stage 1 of the second becomes slow."""
    slow = Fault("slow", 2.0, 1, replica=1, ms=20.0)
    write_store(of_engines(Scenario(seed=3, seconds=6.0, replicas=2, faults=(slow,))), str(tmp_path))
    assert CliRunner().invoke(insitu, ["judge", str(tmp_path), "--once"]).exit_code == 0
    return tmp_path


def test_a_replica_is_shown_that_is_asked_for(engines: Path) -> None:
    def said(*more: str) -> str:
        return CliRunner().invoke(insitu, ["top", str(engines), *more]).stdout

    asked: dict[int, list[str]] = {
        0: ["", "--replica 0", f"--run {RUN[:4]}"],
        1: ["--replica 1", f"--run {RUN[:4]} --replica 1", f"--run {RUN}.1"],
    }
    for replica, words in asked.items():
        for text in (said(*more.split()) for more in words):
            assert f"run {RUN} replica {replica} of 2" in text
            assert [f"rank {rank}" in text for rank in (1, 3)] == [replica == 0, replica == 1]
            assert ("stage 1 limits the pipeline" in text) == (replica == 1)


def test_what_is_not_there_is_one_line_and_fails(engines: Path) -> None:
    for words, says in (
        (["--replica", "2"], "Replica 2 of a run is not among the recent ones"),
        (["--run", "zz"], "Run zz is not among the recent ones"),
        (["--run", RUN, "--replica", "9"], f"Replica 9 of run {RUN} is not among the recent ones"),
    ):
        ran = CliRunner().invoke(insitu, ["top", str(engines), "--once", *words])
        assert (ran.exit_code, ran.stdout, len(ran.stderr.splitlines())) == (1, "", 1)
        assert says in ran.stderr and f"Here are: {RUN}, {RUN}.1." in ran.stderr
        as_json = CliRunner().invoke(insitu, ["top", str(engines), "--json", *words])
        assert (as_json.exit_code, says in json.loads(as_json.stdout)["notice"]["text"]) == (1, True)


def test_r_goes_from_replica_to_replica(engines: Path) -> None:
    async def watch() -> None:
        hub = Hub(engines)
        hub.poll()
        app = Top(hub)
        async with app.run_test(size=(160, 40)) as pilot:
            for replica in (0, 1, 0):
                assert f"replica {replica} of 2" in text_of(app, "strip")
                await pilot.press("r")
        hub.close()

    asyncio.run(watch())


def test_no_store_is_one_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(insitu, ["top", str(tmp_path / "none")])
    assert ran.exit_code == 1
    assert len(ran.stderr.strip().splitlines()) == 1 and "insitu demo" in ran.stderr


@pytest.mark.parametrize("command", ["top", "dashboard"])
def test_a_collector_that_cannot_be_read_is_one_line_with_the_remedy(
    command: str, tmp_path: Path, rig: Rig, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipper = rig.token_file(rig.entry(f"shipper-{command}", Role.SHIP), "shipper")
    with collectors(rig) as address:
        reached = address(tmp_path)
        plain = reached.replace("grpcs://", "grpc://")
        for url, token, ca_file, says, code in (
            ("grpc://127.0.0.1:9", reader, rig.ca_file, "no collector answers at grpc://127.0.0.1:9", 4),
            ("grpc://127.0.0.1", reader, rig.ca_file, "the usual one is grpc://127.0.0.1:4317", 1),
            (reached, "", rig.ca_file, "no token came with the call; set INSITU_TOKEN_FILE", 1),
            (reached, shipper, rig.ca_file, "has not the role read; add it to `roles`", 1),
            (reached, reader, "", "of no authority that is known here; name that one's certificate", 4),
            (reached, reader, tmp_path / "none.pem", "none.pem", 2),
            (plain, reader, rig.ca_file, f"if it has TLS, write {reached}", 4),
        ):
            for name, value in (("INSITU_TOKEN_FILE", token), ("INSITU_CA_FILE", str(ca_file))):
                monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
            ran = CliRunner().invoke(insitu, [command, url])
            assert (ran.exit_code, len(ran.stderr.strip().splitlines())) == (code, 1), ran.output
            assert says in ran.stderr


def text_of(app: Top, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).content)


def test_the_screen_shows_verdict_and_ranks_and_can_be_held(judged_store: Path, reached: Reached) -> None:
    address = reached(judged_store)

    async def watch() -> None:
        hub = Hub(address)
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
