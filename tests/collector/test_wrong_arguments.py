"""Readers asked with what cannot be: one line that names the argument, never a trace of somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from query_kit import Recorder, capture, site, source

from insitu.cli import ExitCode, insitu
from insitu_collector.query.asked import BadQuestion
from insitu_collector.store import Store, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    recorder = Recorder(tmp_path_factory.mktemp("wrong") / "store")
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.attn_z")])
    recorder.write("captures", [capture(7, 1, 0, "r", 0)])
    recorder.close()
    return open_store(recorder.path)


WRONG: dict[str, Callable[[Any], object]] = {
    "site=5 is no text": lambda store: store.captures(site=5),
    "run=5 is no text": lambda store: store.captures(run=5),
    "run=None is no text": lambda store: store.rows("steps", run=None),
    "request=b'r' is no text": lambda store: store.tensors(b"r"),
    "rank='a' is no whole number": lambda store: store.intervals(rank="a"),
    "layer=1.5 is no whole number": lambda store: store.summaries(layer=1.5),
    "replica=True is no whole number": lambda store: store.captures(replica=True),
    "t0=1.5 is no time; give Unix ns": lambda store: store.captures(1.5),
    "columns='site' is no list of names; write columns=['site']": lambda store: store.captures(columns="site"),
    "columns: 5 is no name of a column": lambda store: store.captures(columns=[5]),
    "5 names no rows; give (request, site)": lambda store: store.tensor(5),
    "('r', 'L0.attn_z', 'x') names no rows": lambda store: store.tensor(("r", "L0.attn_z", "x")),
    "query: 5 is no text; write a SELECT": lambda store: store.sql(5),
    "query: it is no Unicode text (half of a surrogate pair); write a SELECT": lambda store: store.sql("\ud800"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_question_of_wrong_types_names_the_argument(said: str, store: Store) -> None:
    with pytest.raises(BadQuestion) as error:
        WRONG[said](store)
    assert str(error.value).startswith(said) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("path", [5, None, "", b"x", "file://"])
def test_what_is_no_path_is_no_store(path: Any) -> None:
    with pytest.raises(ValueError, match=r"^path: .* is no folder of a store; write its path"):
        open_store(path)


def test_a_store_opens_by_the_url_that_it_was_written_by(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.path.parent)
    for url in (f"file://{store.path}", "file://./store", "file://store"):
        assert open_store(url).captures().num_rows == 1
    with pytest.raises(ValueError, match="write the folder's path, without file://"):
        open_store(Path("file://./store"))
    found = CliRunner().invoke(insitu, ["stalls", "file://./store"])
    assert found.exit_code == ExitCode.FAILURE and "without file://" in found.output


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["collect", "--store", ""],
            ["top", ""],
            ["dashboard", ""],
            ["stalls", ""],
            ["store", "ls", ""],
            ["judge", ""],
        ),
        *(["export", "", "--to", "csv"], ["incidents", ""], ["subscribe", "", "--to", "http://127.0.0.1:1"]),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_no_folder(words: list[str]) -> None:
    found = CliRunner().invoke(insitu, words)
    assert found.exit_code == ExitCode.USAGE
    assert "an empty path is no folder; write the store's" in found.output
