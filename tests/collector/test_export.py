"""`insitu export`: what it writes, what it says, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto

from insitu.cli import insitu
from insitu.records import schema_of
from insitu_collector.rows.selection import as_time
from insitu_collector.simulate import RUN, UNIX_MINUS_MONO_NS, Fault, Scenario, simulate, write_store

BEGIN = 1_000_000_000_000 + UNIX_MINUS_MONO_NS
"""When the simulated run begins, Unix ns."""


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return simulate(Scenario(seed=5, seconds=4.0, faults=(Fault("slow", 1.0, 1, ms=15.0),)))


@pytest.fixture(scope="module")
def store(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "store"
    write_store(tables, str(path))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(insitu, ["export", *map(str, arguments)])


def test_a_trace_is_written_and_told(store: Path, tables: dict[str, pa.Table], tmp_path: Path) -> None:
    out = tmp_path / "trace.pftrace"
    found = run(store, "--to", "perfetto", "--out", out)
    assert (found.exit_code, found.stdout) == (0, f"{out}\n")
    assert f"{tables['intervals'].num_rows:,} slices" in found.stderr
    assert "never judged" in found.stderr
    assert len(proto.Trace.FromString(out.read_bytes()).packet) > 2 * tables["intervals"].num_rows


@pytest.mark.parametrize("to", ["perfetto", "chrome", "csv", "arrow", "parquet"])
def test_json_is_one_document_whose_files_are_there(store: Path, tmp_path: Path, to: str) -> None:
    found = run(store, "--to", to, "--out", tmp_path / "out", "--json")
    assert found.exit_code == 0
    answer: dict[str, Any] = json.loads(found.stdout)
    assert (answer["schema"], answer["run"], answer["to"], answer["missing"]) == ("insitu.export/1", RUN, to, {})
    for told in answer["files"]:
        assert Path(told["path"]).stat().st_size == told["bytes"] > 0
    assert [name.name for name in tmp_path.iterdir()] == ["out"]


def test_the_default_name_tells_run_and_format(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(store, "--to", "csv", "--table", "steps").stdout == f"insitu-{RUN[:8]}-csv/steps.csv\n"
    assert run(store, "--to", "chrome").stdout == f"insitu-{RUN[:8]}.json\n"


def test_a_window_is_the_same_by_last_by_iso_and_by_nanoseconds(store: Path, tmp_path: Path) -> None:
    whole = json.loads(run(store, "--to", "arrow", "--table", "intervals", "--out", tmp_path / "a", "--json").stdout)
    last = run(store, "--to", "arrow", "--table", "intervals", "--out", tmp_path / "b", "--last", 1, "--json")
    begin = json.loads(last.stdout)["window_unix_ns"][0]
    named = run(store, "--to", "arrow", "--table", "intervals", "--out", tmp_path / "c", "--from", begin, "--json")
    counts = [json.loads(each.stdout)["files"][0]["rows"] for each in (last, named)]
    assert counts[0] == counts[1] < whole["files"][0]["rows"] / 3
    rows = pa.ipc.open_file(tmp_path / "b" / "intervals.arrow").read_all()
    assert pc.min(rows["t1_unix_ns"]).as_py() >= begin
    until = as_time(BEGIN + 1_000_000_000)
    first = run(store, "--to", "arrow", "--table", "steps", "--out", tmp_path / "d", "--until", until, "--json")
    rows = pa.ipc.open_file(tmp_path / "d" / "steps.arrow").read_all()
    assert json.loads(first.stdout)["window_unix_ns"] == [None, BEGIN + 1_000_000_000]
    assert pc.max(rows["t0_unix_ns"]).as_py() < BEGIN + 1_000_000_000


def test_verdicts_are_in_the_trace_with_their_text(store: Path, tmp_path: Path) -> None:
    judged = tmp_path / "store"
    write_store(simulate(Scenario(seed=5, seconds=8.0, faults=(Fault("slow", 2.0, 1, ms=15.0),))), str(judged))
    assert CliRunner().invoke(insitu, ["judge", str(judged), "--once"]).exit_code == 0
    for to in ("perfetto", "chrome"):
        found = run(judged, "--to", to, "--out", tmp_path / to)
        assert found.exit_code == 0
        assert "never judged" not in found.stderr
        data = (tmp_path / to).read_bytes()
        assert b"stage 1 limits the pipeline" in data
        assert b"remedy" in data


def test_a_partial_record_is_exported_said_and_exits_5(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    beats = tables["health"].to_pylist()
    beats[-1]["dropped"] = [{"table": "intervals", "reason": "ring_full", "rows": 12}]
    write_store({**tables, "health": pa.Table.from_pylist(beats, schema=schema_of("health"))}, str(tmp_path / "store"))
    found = run(tmp_path / "store", "--to", "chrome", "--out", tmp_path / "t.json")
    assert found.exit_code == 5
    assert "rows missing: 12 (ring_full)" in found.stderr
    lost = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e.get("cat") == "lost"]
    assert [event["name"] for event in lost] == ["rows lost: 12 of intervals (ring_full)"]
    assert lost[0]["dur"] == pytest.approx(1e6)


def refused(found: Result, folder: Path, code: int = 1) -> str:
    """Return the one line of an export that wrote nothing into a folder."""
    assert found.exit_code == code, found.output
    assert found.stdout == ""
    assert list(folder.iterdir()) == []
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    return line


def test_bad_input_is_one_line_and_leaves_nothing_behind(store: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    empty = tmp_path / "empty"
    write_store({}, str(empty))
    to = ("--to", "perfetto", "--out", there / "t")
    assert "no store at" in refused(run(tmp_path / "nothing", *to), there)
    assert "holds no record of any rank" in refused(run(empty, *to), there)
    assert f"has no run 'abc'...; it has {RUN}" in refused(run(store, *to, "--run", "abc"), there)
    assert "it goes from 2023-11-14T22:30:00.000Z to" in refused(run(store, *to, "--from", "2024-01-01"), there)
    assert "it goes from" in refused(run(store, *to, "--from", BEGIN + 10**9, "--until", BEGIN), there)
    assert "no folder" in refused(run(store, "--to", "csv", "--out", there / "no" / "t"), there)
    tables = ("--to", "csv", "--out", there / "t", "--table")
    assert "no rows" in refused(run(store, *tables, "captures"), there)
    assert "no table 'stepz'; the tables are sources," in refused(run(store, *tables, "stepz"), there, 2)
    assert "a trace is made of several" in refused(run(store, *to, "--table", "steps"), there, 2)
    assert "give one" in refused(run(store, *to, "--last", "1", "--from", "5"), there, 2)
    assert "is no time" in refused(run(store, *to, "--from", "yesterday"), there, 2)
    assert "--last" in refused(run(store, *to, "--last", "0"), there, 2)


def test_what_exists_is_replaced_only_by_force(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    out.write_text("mine")
    found = run(store, "--to", "chrome", "--out", out)
    assert (found.exit_code, out.read_text()) == (1, "mine")
    assert "exists; --force replaces it" in found.stderr
    assert run(store, "--to", "chrome", "--out", out, "--force").exit_code == 0
    assert json.loads(out.read_text())["otherData"]["run"] == RUN


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(store: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(run(store, "--to", "chrome", "--out", tmp_path / "t"), tmp_path)


@pytest.mark.parametrize("to", ["perfetto", "chrome", "csv", "arrow", "parquet"])
def test_a_disk_that_takes_no_more_leaves_nothing_behind(store: Path, tmp_path: Path, to: str) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, usual[1]))
    try:
        found = run(store, "--to", to, "--out", tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    line = refused(found, tmp_path)
    assert line.startswith("Error: cannot export: ") and "File too large" in line
    assert line.endswith(f" (--out names another place): {tmp_path / 't'}")


@pytest.mark.parametrize("to", ["perfetto", "csv"])
@pytest.mark.parametrize("out", ["/proc/x", "/proc/self/x", "x" * 300, "x" * 250])
def test_what_cannot_be_made_there_is_one_line_with_a_remedy(store: Path, to: str, out: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refused(run(store, "--to", to, "--out", empty / out), empty)
    assert line.startswith("Error: cannot export: ")
    assert line.endswith(f" (--out names another place): {empty / out}")


def test_without_the_package_the_line_names_the_extra(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "perfetto", None)
    monkeypatch.delitem(sys.modules, "insitu_collector.export.perfetto", raising=False)
    for name in [name for name in sys.modules if name.startswith("perfetto.")]:
        monkeypatch.delitem(sys.modules, name)
    line = refused(run(store, "--to", "perfetto", "--out", tmp_path / "t"), tmp_path)
    assert line.endswith("pip install 'insitu[perfetto]'")
