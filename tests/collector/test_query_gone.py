"""What a collector answers about a store that was moved away under it, and once that is back."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from query_kit import Recorder, capture, entry, source, step

from insitu.cli import ExitCode
from insitu.cli import insitu as cli
from insitu_collector.query.remote import RemoteStore
from insitu_collector.service.server import CollectorServer

GONE = r"grpc://.*: the store has gone; put it back, or start again this collector"
ASKED: list[Callable[[RemoteStore], object]] = [
    RemoteStore.check,
    RemoteStore.tables,
    RemoteStore.last_written_ns,
    RemoteStore.captures,
    RemoteStore.stalls,
    lambda store: store.table("steps"),
    lambda store: list(store.rows("steps")),
    lambda store: store.sql("select count(*) as n from steps"),
    lambda store: store.tensors("r"),
]


@pytest.mark.parametrize("is_asked_before", [False, True])
def test_a_store_that_has_gone_is_said_to_and_answers_again_once_it_is_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], is_asked_before: bool
) -> None:
    path, away = tmp_path / "store", tmp_path / "away"
    write_some(path)
    with CollectorServer(path, port=0) as server, closing(RemoteStore(server.address)) as remote:
        tail = remote.tail(["steps"])
        if is_asked_before:
            assert remote.table("steps").num_rows == 3 and tail.poll()["steps"].num_rows == 3
            remote.sql("select 1")
        path.rename(away)
        asked: list[Callable[[RemoteStore], object]] = [*ASKED, lambda _: tail.poll()]
        for ask in asked:
            with pytest.raises(ConnectionError, match=GONE) as error:
                ask(remote)
            assert "\n" not in str(error.value)
        path.mkdir()  # another one in its place is not the one that is written
        with pytest.raises(ConnectionError, match=GONE):
            remote.tables()
        path.rmdir()
        away.rename(path)
        assert "steps" in remote.tables() and remote.table("steps").num_rows == 3
        assert remote.sql("select count(*) as n from steps").to_pylist() == [{"n": 3}]
        assert ("steps" in tail.poll()) is not is_asked_before, "each row once"
        tail.close()
    assert "Traceback" not in caplog.text + capfd.readouterr().err, "nor in the process of a query"


def write_some(path: Path) -> None:
    recorder = Recorder(path)
    recorder.write("sources", [source(7)])
    for number in range(3):
        recorder.write("steps", [step(7, number, [entry("r", number, 1)])])
    recorder.close()


def test_an_answer_whose_store_goes_meanwhile_is_broken_off(tmp_path: Path) -> None:
    path = tmp_path / "store"
    recorder = Recorder(path)
    recorder.write("sources", [source(7)])
    for number in range(64):  # MiB: more than is sent before somebody takes it
        recorder.write("captures", [capture(7, number, 0, "r", number, values=np.zeros(1 << 18, np.float32))])
    recorder.close()
    with CollectorServer(path, port=0) as server, closing(RemoteStore(server.address)) as remote:
        batches = remote.rows("captures", columns=["data"])
        next(batches)
        path.rename(tmp_path / "away")
        with pytest.raises(ConnectionError, match=GONE):
            list(batches)


@pytest.mark.parametrize("command", [["stalls"], ["incidents"], ["export", "--to", "csv"], ["top", "--once"]])
def test_a_command_that_asks_for_a_store_that_has_gone_prints_one_line_and_fails(
    tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "store"
    write_some(path)
    with CollectorServer(path, port=0) as server:
        with closing(RemoteStore(server.address)) as remote:
            remote.table("steps")
        path.rename(tmp_path / "away")
        printed = CliRunner().invoke(cli, [command[0], server.address, *command[1:]])
        assert printed.exit_code == ExitCode.UNREACHABLE, printed.output
        assert re.search(GONE, printed.output) and printed.output.count("\n") == 1, printed.output
