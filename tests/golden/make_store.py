"""Makes the golden store of a format version, once: `python tests/golden/make_store.py` at the version's release.

    python tests/golden/make_store.py                 # by the code of this tree
    python tests/golden/make_store.py --by eb1f5bd^   # by the code of a commit: how 1.0 was made, after the fact

What is written: a simulated run and what its judge said of it, sealed; and a second shard as a kill -9 leaves it, its
last batch cut short. Beside the store stand its rows as they were before they were written, in Parquet, and what the
version's own reader says of it. A golden store is never made anew: every store in the world is like it. This file
runs on the code of every version, so it uses little of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from edge_rows import EPOCH, NUM_ROWS, edge_rows

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
PACKAGES: Final = ("probe", "engine", "collector", "dashboard")
DEAD_SHARD: Final = "golden-1"
TORN: Final = "captures"
"""Its last batch is cut short in the shard that died."""
MOST_BYTES: Final = 330_000


def first_of(*modules: str) -> Any:
    """Return the first module there is: some have moved since 1.0."""
    for name in modules:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error
    raise missing


def simulated_run() -> dict[str, pa.Table]:
    """Return the tables of a run whose second stage becomes slow and then makes a NaN."""
    simulate = importlib.import_module("insitu_collector.simulate")
    faults = (simulate.Fault("slow", 1.5, 1, ms=60.0), simulate.Fault("nan", 5.0, 1, layer=2))
    scenario = simulate.Scenario(
        seed=3,
        seconds=5.5,
        base_ms=(28.0, 30.0),
        requests_per_s=2.5,
        prompt=(4, 12),
        output=(6, 16),
        warmup_steps=16,
        experts=8,
        hosts=2,
        tail=0.0,
        faults=faults,
    )
    tables: dict[str, pa.Table] = simulate.simulate(scenario)
    return tables


def verdicts_of(tables: dict[str, pa.Table]) -> pa.Table:
    """Return the rows that a judge would have written of a run."""
    simulate, records = importlib.import_module("insitu_collector.simulate"), importlib.import_module("insitu.records")
    store = importlib.import_module("insitu_collector.store")
    judged = first_of("insitu_collector.judge.runs", "insitu_collector.judge").judged
    with tempfile.TemporaryDirectory() as folder:
        simulate.write_store(tables, folder)
        found = judged(store.open_store(folder))
    who = {"epoch": 99, "rank": -1, "stage": -1}
    rows = [{**who, "row_seq": number, **verdict.row()} for number, verdict in enumerate(found)]
    return pa.Table.from_pylist(rows, schema=records.schema_of("verdicts"))


def lost_rows() -> pa.Table:
    """Return the rows of what a collector has lost: one batch of captures."""
    who = {"epoch": 99, "rank": -1, "stage": -1, "row_seq": 0}
    what = {"source_epoch": 1, "table": TORN, "seq_from": 0, "seq_to": 0, "num_rows": 5, "num_bytes": 4096}
    why = {"reason": "torn_tail", "file": f"{TORN}/collector-0000000003.arrow", "unix_ns": 1_700_001_000_000_000_000}
    schema = importlib.import_module("insitu.records").schema_of("gaps")
    return pa.Table.from_pylist([who | what | why], schema=schema)


def write_dead_shard(root: Path, schemas: dict[str, pa.Schema]) -> dict[str, pa.Table]:
    """Write two batches of edge rows of each table into a shard and leave it as a kill -9 would; return what is whole.

    The second batch of `TORN` is cut short.
    """
    base = importlib.import_module("insitu.exporters.base")
    shard = first_of("insitu.segments.shard", "insitu.segments")
    whole: dict[str, pa.Table] = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = shard.ShardWriter(folder, DEAD_SHARD)
        for name, schema in schemas.items():
            rows = [edge_rows(schema, seq * NUM_ROWS) for seq in (0, 1)]
            for seq, part in enumerate(rows):
                writer.append(base.Batch(EPOCH, seq, pa.RecordBatch.from_pylist(part, schema=schema), name))
            whole[name] = pa.Table.from_pylist(rows[0] if name == TORN else [*rows[0], *rows[1]], schema=schema)
        writer.sync()
        shutil.copytree(Path(folder) / "v1" / "open", root / "v1" / "open", dirs_exist_ok=True)
        writer.close()
    (path,) = (root / "v1" / "open" / TORN).iterdir()
    os.truncate(path, path.stat().st_size - 7)
    return whole


def make(target: Path) -> None:
    """Write the store, its rows and what is said of it. target: a folder that is not there yet."""
    records = importlib.import_module("insitu.records")
    run = simulated_run()
    run["verdicts"], run["gaps"] = verdicts_of(run), lost_rows()
    others = {name: records.schema_of(name) for name in records.TABLES if name not in run}
    store = target / "store"
    importlib.import_module("insitu_collector.simulate").write_store(run, str(store))
    edges = write_dead_shard(store, others)
    (target / "rows").mkdir()
    for name, table in (run | edges).items():
        pq.write_table(table, target / "rows" / f"{name}.parquet", compression="zstd", write_statistics=False)
    told = subprocess.run(
        [sys.executable, "-c", "from insitu.cli import main; main()", "stalls", str(store), "--json"],
        capture_output=True,
        text=True,
    )
    document: dict[str, Any] = json.loads(told.stdout)
    del document["store"]  # where it lay
    (target / "stalls.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--by", metavar="COMMIT", help="The code of this commit. [default: this tree's]")
    asked = parser.parse_args()
    if asked.by is not None:
        by_commit(asked.by)
        return
    version = importlib.import_module("insitu.records").VERSION
    target = HERE / "stores" / version
    if target.exists():
        sys.exit(f"{target} is there already; a golden store is never made anew")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / version
        make(made)
        num_bytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        assert num_bytes <= MOST_BYTES, f"{num_bytes} bytes are too many to keep for ever"
        shutil.copytree(made, target)
    print(f"{target}: {num_bytes} bytes")


def by_commit(commit: str) -> None:
    """Run this file on the packages of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit, *PACKAGES], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        path = os.pathsep.join(str(Path(folder) / name) for name in PACKAGES)
        subprocess.run([sys.executable, __file__], check=True, env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
