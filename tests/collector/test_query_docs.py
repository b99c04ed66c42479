"""What docs/query.md says to paste works when it is pasted."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from query_kit import Recorder, capture, site, source, step
from store_kit import batch, seal

from insitu.records import NEEDED, schema_of
from insitu_collector.query.segment import PAYLOAD
from insitu_collector.store import open_store

PAGE = (Path(__file__).parents[2] / "docs/query.md").read_text()


def pasted(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recorder = Recorder(tmp_path / "insitu-store")
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 3, "L3.mlp_out"), site(7, 1, "L1.resid_post")])
    recorder.write("steps", [step(7, number) for number in range(100, 110)])
    recorder.write("captures", [capture(7, 100 + n, at, "req-1", n) for n in range(10) for at in (1, 3)])
    of = {"epoch": 7, "rank": 0, "stage": 0, "site": 3, "num_rows": 1, "canary": 0.5, "absmax": 2.0}
    recorder.write("summaries", [{**of, "step_id": 1000 + n} for n in range(5)])
    recorder.close()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_lines_of_python_work(folder: Path) -> None:
    first, *_ = pasted("python")
    exec(first, {})


def test_what_is_left_out_is_counted_as_the_page_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_of("verdicts")
    whole = {name: 1 if pa.types.is_integer(schema.field(name).type) else "x" for name in NEEDED["verdicts"]}
    seal(folder / "insitu-store", batch("verdicts", [whole, {**whole, "kind": None}], seq=0, first=0))
    (folder / "insitu-store/v1/sealed/verdicts/odd-0000000000.arrow").mkdir()
    _, left_out, *_ = pasted("python")
    exec(left_out, {"store": open_store("insitu-store")})
    said = re.search(r"# (.*): ", left_out)
    assert said is not None and capsys.readouterr().out == f"{said[1]}\n"


def test_exports_of_tensors_hold_what_was_captured(folder: Path) -> None:
    import safetensors.torch

    _, _, exports, _ = pasted("python")
    store = open_store("insitu-store")
    exec(exports, {"store": store, "numpy": np, "safetensors": safetensors})
    expected = store.tensors("req-1")
    kept, tensors = np.load("rows.npz"), safetensors.torch.load_file("rows.safetensors")
    assert set(kept) == set(tensors) == set(expected)
    for name, found in expected.items():
        assert np.array_equal(kept[name], found.values) and np.array_equal(tensors[name].numpy(), found.values)


def test_sql_runs_over_the_store_and_over_twins(folder: Path) -> None:
    of_store, of_twins = pasted("sql")
    found = open_store("insitu-store").sql(of_store).to_pylist()
    assert [(row["site"], row["max(absmax)"]) for row in found] == [("L3.mlp_out", 2.0)]
    twins = folder / "insitu-store/v1/twins/captures"
    twins.mkdir(parents=True)
    index = open_store("insitu-store").table("captures").drop_columns([PAYLOAD["captures"]])
    for name in ("a", "b"):  # the same rows twice, as where a probe sent them again
        pyarrow.parquet.write_table(index, twins / f"{name}-0000000000.parquet", compression="zstd")
    with duckdb.connect() as plain:
        assert sorted(plain.sql(of_twins).fetchall()) == [(1, 10), (3, 10)]


def test_ray_reads_segments_with_their_values(folder: Path) -> None:
    pytest.importorskip("ray")
    *_, with_ray = pasted("python")
    exec(with_ray, {})
    assert pyarrow.parquet.read_table("norms").num_rows == 20
