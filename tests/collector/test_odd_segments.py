"""What has a segment's name and is no file: left out of the store and named, never the end of reading it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from store_kit import events, rows_in, run, seal, source

from insitu.cli import insitu
from insitu.segments.layout import OPEN, SEALED, list_segments
from insitu_collector.simulate import Scenario, simulate, write_store
from insitu_collector.store import open_store


def as_folder(path: Path) -> None:
    path.mkdir(parents=True)


def as_dangling_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("gone")


def as_endless_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.name)


ODD = pytest.mark.parametrize("odd", [as_folder, as_dangling_link, as_endless_link])


@ODD
@pytest.mark.parametrize("state", [OPEN, SEALED])
def test_it_is_named_and_the_rest_is_read(
    odd: Callable[[Path], None], state: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seal(tmp_path, source(7), events(0))
    path = tmp_path / "v1" / state / "events" / "b-0000000000.arrow"
    odd(path)
    with caplog.at_level(logging.WARNING, "insitu"):
        store = open_store(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"insitu: {path} is no file and is left out; move it out of the store"
    ]
    assert store.num_damaged == 1
    assert rows_in(tmp_path, "events") == [(7, 0), (7, 1), (7, 2)]
    assert store.sql("select count(*) n from events")["n"].to_pylist() == [3]


@ODD
def test_verify_names_it_and_ls_lists_the_others(odd: Callable[[Path], None], tmp_path: Path) -> None:
    seal(tmp_path, source(7), events(0))
    odd(tmp_path / "v1" / SEALED / "events" / "b-0000000000.arrow")
    found = run("verify", tmp_path)
    assert found.exit_code != 0
    assert "events/b-0000000000.arrow: it is no file; move it out of the store" in found.output
    assert run("ls", tmp_path).exit_code == 0


@ODD
def test_a_segment_replaced_by_it_spoils_no_command(odd: Callable[[Path], None], tmp_path: Path) -> None:
    write_store(simulate(Scenario(seed=3, seconds=1.0)), str(tmp_path / "s"))
    name = list_segments(tmp_path / "s", SEALED, "health")[0]
    name.path(tmp_path / "s", SEALED).unlink()
    odd(name.path(tmp_path / "s", SEALED))
    for words in (
        "stalls",
        "store ls",
        "store verify",
        "store compact",
        "export --to parquet --out " + str(tmp_path / "o"),
    ):
        found = CliRunner().invoke(insitu, [*words.split(), str(tmp_path / "s")])
        assert "Is a directory" not in found.output, words
        assert found.exception is None or isinstance(found.exception, SystemExit), found.output
