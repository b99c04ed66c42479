"""`insitu plugins check`: a line of each plug-in, and an exit status that says whether all keep their word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from package_kit import install

from insitu.cli import ExitCode
from insitu.plugins.check import KITS
from insitu.plugins.command import plugins
from insitu.plugins.discovery import COMMANDS, EXPORTERS, GROUPS, SITES, STATISTICS, VERDICTS

CODE = """
import click
from insitu.exporters import Ack, Level, Retry
from insitu.site_plugins import Architecture
from insitu.statistic_plugins import Statistic

class Total(Statistic):
    fields = ("total",)

    def compute(self, x):
        return x.double().sum().reshape(1)

class Single(Total):
    def compute(self, x):
        return x.float().sum().reshape(1)

class Ships:
    def __init__(self, to, source):
        self.to = to

    def export(self, batch):
        assert self.to.startswith("ships://")
        if self.to.endswith("/later"):
            raise Retry(1.0)
        return Ack(batch.stream, batch.seq, Level.DURABLE)

@click.command()
def word():
    pass

class Silent:
    def look(self, evidence):
        return ()
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        COMMANDS: {"word": "acme_all:word"},
        EXPORTERS: {"ships": "acme_all:Ships"},
        STATISTICS: {"acme.total": "acme_all:Total"},
        VERDICTS: {"silent": "acme_all:Silent"},
    }
    install(tmp_path, monkeypatch, "acme_all", entries, CODE)


def check(*args: str) -> tuple[Result, list[dict[str, Any]]]:
    ran = CliRunner().invoke(plugins, ["check", *args, "--json"], prog_name="insitu plugins")
    if not ran.stdout.startswith("{"):
        return ran, []
    found: dict[str, Any] = json.loads(ran.stdout)
    assert found["schema"] == "insitu.plugins-check/1"
    rows: list[dict[str, Any]] = found["plugins"]
    return ran, rows


def test_each_group_has_a_kit() -> None:
    assert set(KITS) == set(GROUPS)


def test_all_are_tried_and_said_in_a_line() -> None:
    ran, rows = check()
    assert ran.exit_code == ExitCode.OK, ran.output
    assert {(row["group"], row["name"], row["state"]) for row in rows} == {
        (COMMANDS, "word", "ok"),
        (EXPORTERS, "ships", "ok"),
        (STATISTICS, "acme.total", "ok"),
        (VERDICTS, "silent", "ok"),
    }
    text = CliRunner().invoke(plugins, ["check", "ships"]).output
    assert text.startswith(f"ships                {EXPORTERS}   ok: took ")
    assert text.count("\n") == 1


def test_one_that_breaks_its_word_is_exit_status_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"acme.single": "acme_all:Single", "single": "acme_all:Total", "acme.gone": "no_such_module:X"}
    install(tmp_path, monkeypatch, "acme_bad", {STATISTICS: entries, COMMANDS: {"odd": "acme_all:Total"}})
    ran, rows = check()
    assert ran.exit_code == ExitCode.PROBLEMS_FOUND
    broken = {row["name"]: row["text"] for row in rows if row["state"] == "broken"}
    assert broken.keys() == {"acme.single", "single", "acme.gone", "odd"}
    assert "is not the part of the whole: total is" in broken["acme.single"]
    assert "'single' has no namespace" in broken["single"]
    assert broken["acme.gone"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert "no click.Command" in broken["odd"]


def test_one_that_cannot_be_checked_is_exit_status_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("ships", "--to", f"ships://{tmp_path}/later")[0].exit_code == ExitCode.PARTIAL
    ran, (row,) = check("ships", "--to", "ships:///later")
    assert (ran.exit_code, row["state"]) == (ExitCode.PARTIAL, "not checked")
    assert "took none of" in row["text"]
    monkeypatch.setitem(KITS, STATISTICS, "a_package_nobody_has:check")
    ran, (row,) = check("acme.total")
    assert (ran.exit_code, row["state"]) == (ExitCode.PARTIAL, "not checked")
    assert row["text"] == "the check needs the package a_package_nobody_has, which is not installed"


def test_one_that_is_switched_off_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_PLUGINS_OFF", "ships")
    ran, (row,) = check("ships")
    assert (ran.exit_code, row["state"]) == (ExitCode.OK, "off")


def test_a_name_nobody_has_lists_those_there_are() -> None:
    ran, _ = check("shipz")
    assert ran.exit_code == ExitCode.USAGE
    assert "no plug-in is called 'shipz'; installed: word, ships, acme.total, silent" in ran.output


def test_without_any_the_groups_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insitu.plugins.discovery.entry_points", lambda group: ())
    ran = CliRunner().invoke(plugins, ["check"])
    assert ran.exit_code == ExitCode.OK
    assert all(group in ran.output for group in (*GROUPS, SITES))
