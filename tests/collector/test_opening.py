"""Commands that read say of a collector's store what they say of its folder; the others say where they are run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from insitu.cli import ExitCode, insitu
from insitu_collector.service.server import CollectorServer
from insitu_collector.simulate import RUN, Fault, Scenario, simulate, write_store

SLOW = Scenario(seed=3, seconds=8.0, faults=(Fault("slow", 3.0, 1, ms=20.0),))
READING = (
    ["stalls", "STORE", "--json"],
    ["stalls", "STORE", "--matrix", "--if", "in-flight=3"],
    ["compare", "STORE", "STORE", "--json"],
    ["compare", "STORE", "--at", "3"],
    ["incidents", "STORE", "--json"],
    ["incidents", "STORE"],
    ["export", "STORE", "--to", "csv", "--table", "steps", "--last", "2", "--json"],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CollectorServer]:
    path = tmp_path_factory.mktemp("opening") / "store"
    write_store(simulate(SLOW), str(path))
    with CollectorServer(path, port=0, compact=False) as running:
        yield running


def run(*arguments: object) -> Result:
    return CliRunner().invoke(insitu, [str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_what_is_said_of_a_folder_is_said_through_its_collector(
    server: CollectorServer, arguments: list[str], tmp_path: Path
) -> None:
    found = []
    for store in (str(server.store), server.address):
        more = ["--out", tmp_path, "--force"] if arguments[0] == "export" else []
        ran = run(*(store if word == "STORE" else word for word in arguments), *more)
        files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        found.append((ran.exit_code, ran.stdout.replace(store, "STORE"), files))
    assert found[0] == found[1]
    assert found[0][0] == 0 and "STORE" in found[0][1]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_a_collector_that_is_not_there_is_one_line(arguments: list[str]) -> None:
    ran = run(*("grpc://127.0.0.1:9" if word == "STORE" else word for word in arguments))
    assert ran.exit_code == ExitCode.UNREACHABLE
    (line,) = ran.stderr.splitlines()
    assert "no collector answers at grpc://127.0.0.1:9; start one with insitu collect" in line


def test_a_run_that_is_not_there_is_named_with_the_store_s_address(server: CollectorServer) -> None:
    for command in ("stalls", "compare", "export"):
        option = {"compare": ["--run-a", "ffff", "--at", "3"], "export": ["--run", "ffff", "--to", "csv"]}
        ran = run(command, server.address, *option.get(command, ["--run", "ffff"]))
        assert ran.exit_code == 1 and server.address in ran.stderr and "Traceback" not in ran.output, ran.output
    assert RUN in run("export", server.address, "--run", "ffff", "--to", "csv").stderr


def test_an_address_without_a_port_is_one_line() -> None:
    ran = run("stalls", "grpc://collector")
    assert ran.exit_code == 1 and "the usual one is grpc://collector:4317" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["judge", "STORE", "--once"],
        ["store", "ls", "STORE"],
        ["store", "erase", "STORE", "--request", "x"],
        ["subscribe", "STORE", "--to", "http://127.0.0.1:9"],
    ],
    ids=" ".join,
)
def test_what_changes_a_store_is_run_beside_its_folder(
    server: CollectorServer, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*(server.address if word == "STORE" else word for word in arguments))
    assert ran.exit_code == 1
    (line,) = ran.stderr.splitlines()
    assert "needs the store's folder; run it on the collector's host" in line
    assert list(tmp_path.iterdir()) == [], "no folder is made that has the address for a name"
