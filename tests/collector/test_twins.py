"""Parquet twins: the rows of a segment without payloads, there whole or not at all, swept when their segment goes."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow.parquet as pq
from store_kit import batch, events, seal

from insitu.segments.erasure import Erased, Erasure, Kind, digest
from insitu.segments.layout import SEALED
from insitu_collector.keeping.twins import list_twins, missing_twins, sweep_twins, twin_path, twin_problem, write_twin

CAPTURES = [{"step_id": n, "site": 1, "request": f"req-{n % 2}", "row": 0, "data": b"secret" * 10} for n in range(6)]


def test_a_twin_has_every_row_and_no_payload(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, batch("captures", CAPTURES, seq=0, first=0))
    assert missing_twins(tmp_path) == [name]
    write_twin(tmp_path, name, Erased())
    path = twin_path(tmp_path, name)
    assert path == tmp_path / "v1/twins/captures/a-0000000000.parquet"
    found = pq.read_table(path)
    assert found["step_id"].to_pylist() == list(range(6))
    assert "data" not in found.column_names
    assert b"secret" not in path.read_bytes()
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert (missing_twins(tmp_path), list_twins(tmp_path)) == ([], [name])
    assert twin_problem(tmp_path, name, 6) == ""
    counts = f"select request, count(*) from '{tmp_path}/v1/twins/captures/*.parquet' group by 1 order by 1"
    assert duckdb.execute(counts).fetchall() == [("req-0", 3), ("req-1", 3)]


def test_what_is_erased_is_not_in_a_twin(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, batch("captures", CAPTURES, seq=0, first=0))
    write_twin(tmp_path, name, Erased(b"salt", [Erasure(Kind.REQUEST, digest(b"salt", "req-1"), 0, 0, "me")]))
    assert set(pq.read_table(twin_path(tmp_path, name))["request"].to_pylist()) == {"req-0"}
    assert twin_problem(tmp_path, name, 6) == ""


def test_the_twin_of_a_segment_that_has_gone_is_swept(tmp_path: Path) -> None:
    names = seal(tmp_path, events(0), events(1))
    for name in names:
        write_twin(tmp_path, name, Erased())
    names[0].path(tmp_path, SEALED).unlink()
    assert sweep_twins(tmp_path) == names[:1]
    assert list_twins(tmp_path) == names[1:]


def test_a_twin_that_is_not_right_is_said(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0))
    write_twin(tmp_path, name, Erased())
    assert twin_problem(tmp_path, name, 2) == "3 rows, of 2"
    twin_path(tmp_path, name).write_bytes(b"PAR1")
    assert twin_problem(tmp_path, name, 3).startswith("it cannot be read")
