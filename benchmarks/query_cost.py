"""What questions to a store cost, in seconds and bytes: many summaries, a large store of captures, random tensors.

python benchmarks/query_cost.py             # 200,000 summaries, captures of 1 GB, half a minute
python benchmarks/query_cost.py --full      # 10 million and 100 GB

Captures are zeros that take no room: each segment is what a probe's writer makes, checksums and all, in a file with
holes where its values are. So what is measured of them is finding rows, not a disk.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of, table_spec
from insitu.segments.file import batch_metadata, file_schema
from insitu.segments.layout import SEALED, SegmentName
from insitu.segments.shard import ShardWriter
from insitu_collector.store import Store, open_store

UNIX: Final = 1_700_000_000_000_000_000
SITES: Final = 32
STEP_NS: Final = 10_000_000
"""A hundred steps a second."""
BATCH_STEPS: Final = 100
WIDTH: Final = 4096
CAPTURED_ROWS: Final = 256
"""Rows of a batch of captures: 4 MiB of float32."""
SEGMENT_BATCHES: Final = 32
BLOCK: Final = 4096
SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Size:
    """How much is made and asked."""

    rows: int
    """Summaries."""
    gigabytes: float
    """Of captures, as large as they look."""
    rounds: int
    """Of each question after its first."""
    tensor_s: float
    """How long random rows are read, each way."""


QUICK: Final = Size(200_000, 1.0, 3, 1.0)
FULL: Final = Size(10_000_000, 100.0, 9, 10.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """One question: how long it took, in rounds after the first, and what it read."""

    name: str
    rows: int
    first_s: float
    first_bytes: int
    median_s: float
    slowest_s: float
    bytes: int


def summaries_store(path: Path, num_rows: int) -> None:
    """Write a store of one rank with about so many summaries, 32 sites a step."""
    writer = ShardWriter(path, "rank")
    _append_identity(writer)
    num_steps = num_rows // SITES
    for seq, first in enumerate(range(0, num_steps, BATCH_STEPS)):
        steps = np.arange(first, min(first + BATCH_STEPS, num_steps), dtype=np.int64)
        n = len(steps) * SITES
        columns = {
            "step_id": np.repeat(steps, SITES),
            "site": np.tile(np.arange(SITES, dtype=np.uint16), len(steps)),
            "num_rows": np.full(n, 16, np.int32),
            "canary": np.sin(np.arange(n, dtype=np.float32) + first),
        }
        writer.append(_batch("summaries", seq, first * SITES, columns))
        writer.append(_steps(seq, steps))
    writer.close()


def captures_store(path: Path, num_bytes: int) -> int:
    """Write sealed segments of captures that look this large and are mostly holes; return how many rows they have."""
    writer = ShardWriter(path, "rank")
    _append_identity(writer)
    num_batches = max(1, num_bytes // (CAPTURED_ROWS * WIDTH * 4))
    data = pa.py_buffer(bytes(CAPTURED_ROWS * WIDTH * 4))
    for seq in range(0, num_batches, BATCH_STEPS):
        writer.append(_steps(seq // BATCH_STEPS, np.arange(seq, min(seq + BATCH_STEPS, num_batches), dtype=np.int64)))
    writer.close()
    for number, first in enumerate(range(0, num_batches, SEGMENT_BATCHES)):
        seqs = range(first, min(first + SEGMENT_BATCHES, num_batches))
        _seal_sparse(path, SegmentName("captures", "sparse", number), (_captured(seq, data) for seq in seqs))
    return num_batches * CAPTURED_ROWS


def _captured(seq: int, data: pa.Buffer) -> Batch:
    """Return the captures of one step: 32 requests with 8 positions each at one site."""
    n = CAPTURED_ROWS
    offsets = pa.py_buffer(np.arange(n + 1, dtype=np.int64) * (WIDTH * 4))
    columns = {
        "step_id": np.full(n, seq, np.int64),
        "site": np.full(n, seq % SITES, np.uint16),
        "request": pa.array([f"r{seq // 100}-{at % 32}" for at in range(n)]),
        "row": np.arange(n, dtype=np.int32),
        "position": np.arange(n, dtype=np.int64) // 32,
        "dtype": pa.array(["float32"] * n),
        "shape": pa.array([[WIDTH]] * n, pa.list_(pa.int32())),
        "data": pa.Array.from_buffers(pa.large_binary(), n, [None, offsets, data], null_count=0),
    }
    return _batch("captures", seq, seq * n, columns)


def _append_identity(writer: ShardWriter) -> None:
    source = {"run": "ab" * 8, "role": "rank", "host": "h", "boot_id": "b", "replica": 0, "tp_rank": 0}
    anchors = {"unix_anchor_ns": UNIX, "mono_anchor_ns": 0}
    writer.append(Batch(7, 0, _rows("sources", [source | anchors]), "sources"))
    of = {"shard": "replicated", "axis": "tokens", "io": "out", "index": 0, "dtype": "float32"}
    sites = [{"site": n, "name": f"L{n}.mlp_out", "layer": n, "fqn": f"m.{n}"} | of for n in range(SITES)]
    writer.append(Batch(7, 0, _rows("sites", sites), "sites"))


def _steps(seq: int, steps: np.ndarray[Any, Any]) -> Batch:
    n = len(steps)
    columns = {
        "step_id": steps,
        "t0_ns": steps * STEP_NS,
        "num_rows": np.full(n, 16, np.int32),
        "dropped": np.zeros(n, np.uint8),
    }
    return _batch("steps", seq, int(steps[0]), columns)


def _rows(table: str, rows: list[dict[str, Any]]) -> pa.RecordBatch:
    numbered = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": n, **row} for n, row in enumerate(rows)]
    return pa.RecordBatch.from_pylist(numbered, schema=schema_of(table))


def _batch(table: str, seq: int, first_row: int, columns: dict[str, Any]) -> Batch:
    n = len(columns["step_id"])
    who = {
        "epoch": np.full(n, 7, np.uint64),
        "rank": np.zeros(n, np.int16),
        "stage": np.zeros(n, np.int16),
        "row_seq": np.arange(first_row, first_row + n, dtype=np.int64),
    }
    given = who | columns
    schema = schema_of(table)
    arrays = [given.get(each.name, pa.nulls(n, each.type)) for each in schema]
    return Batch(7, seq, pa.RecordBatch.from_arrays([pa.array(each) for each in arrays], schema=schema), table)


class SparseFile(io.RawIOBase):
    """A file in which blocks of zeros that are written become holes."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400)
        self._at = 0
        self._zeros = bytes(BLOCK)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        first = -self._at % BLOCK
        self._keep(view[:first])
        whole = (len(view) - first) // BLOCK * BLOCK
        if whole > 0 and not np.frombuffer(view[first : first + whole], np.uint64).any():
            self._at += whole
        else:
            whole = max(whole, 0)
            self._keep(view[first : first + whole])
        self._keep(view[first + whole :])
        return len(view)

    def _keep(self, view: memoryview) -> None:
        while len(view):
            num = os.pwrite(self._fd, view, self._at)
            self._at += num
            view = view[num:]

    def close(self) -> None:
        if not self.closed:
            os.ftruncate(self._fd, self._at)
            os.close(self._fd)
        super().close()


def _seal_sparse(store: Path, name: SegmentName, batches: Iterator[Batch]) -> None:
    path = name.path(store, SEALED)
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = SparseFile(path)
    with pa.ipc.new_file(sink, file_schema(name, table_spec(name.table))) as writer:
        for batch in batches:
            writer.write_batch(batch.data, custom_metadata=batch_metadata(batch))
    sink.close()


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(name: str, path: Path, ask: Callable[[Store], pa.Table], rounds: int) -> Measured:
    """Return what a question costs a reader that knows nothing yet, and then again."""
    store = open_store(path)
    taken: list[float] = []
    read: list[int] = []
    num_rows = 0
    for _ in range(rounds + 1):
        begin, before = time.perf_counter(), store.bytes_read
        num_rows = ask(store).num_rows
        taken.append(time.perf_counter() - begin)
        read.append(store.bytes_read - before)
    rest = taken[1:]
    return Measured(name, num_rows, taken[0], read[0], statistics.median(rest), max(rest), read[-1])


def questions(path: Path, num_rows: int, rounds: int) -> list[Measured]:
    """Return what questions about a store of summaries cost."""
    middle = UNIX + num_rows // SITES // 2 * STEP_NS
    steps = range(num_rows // SITES // 2, num_rows // SITES // 2 + 10)
    by_site = "select site, count(*) as n, avg(canary) as mean from summaries group by site"
    asked: dict[str, Callable[[Store], pa.Table]] = {
        "summaries of one second": lambda store: store.summaries(middle, middle + SECOND_NS),
        "summaries of ten steps": lambda store: store.summaries(steps=steps),
        "one site, all of the time": lambda store: store.summaries(site="L3.mlp_out", columns=["step_id", "canary"]),
        "SQL: ten steps": lambda store: store.sql(
            f"select * from named.summaries where step_id between {steps[0]} and {steps[-1]}"
        ),
        "SQL: a mean of each site, all rows": lambda store: store.sql(by_site),
    }
    return [measure(name, path, ask, rounds) for name, ask in asked.items()]


def captured(path: Path, num_rows: int, rounds: int) -> list[Measured]:
    """Return what questions about a store of captures cost; values are not asked for."""
    middle = num_rows // CAPTURED_ROWS // 2
    begin = UNIX + middle * STEP_NS
    request = f"r{middle // 100}-3"
    asked: dict[str, Callable[[Store], pa.Table]] = {
        "captures of one second, without values": lambda store: store.captures(begin, begin + SECOND_NS),
        "captures of a request, without values": lambda store: store.captures(request=request),
    }
    return [measure(name, path, ask, rounds) for name, ask in asked.items()]


def tensors_per_second(path: Path, num_rows: int, seconds: float) -> dict[str, float]:
    """Return how many rows a second are read at random: of any batch, and of 64 batches that were read before."""
    chosen = random.Random(5)
    near = [chosen.randrange(num_rows // CAPTURED_ROWS) for _ in range(64)]
    found: dict[str, float] = {}
    places: dict[str, Callable[[], int]] = {
        "anywhere": lambda: chosen.randrange(num_rows),
        "in 64 batches": lambda: chosen.choice(near) * CAPTURED_ROWS + chosen.randrange(CAPTURED_ROWS),
    }
    for name, rows in places.items():
        store, number = open_store(path), 0
        store.tensor({"epoch": 7, "row_seq": 0})
        for batch in near:
            store.tensor({"epoch": 7, "row_seq": batch * CAPTURED_ROWS})
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            row = store.tensor({"epoch": 7, "row_seq": rows()})
            assert row.shape == (WIDTH,)
            number += 1
        found[name] = number / (time.perf_counter() - begin)
    return found


def report(found: dict[str, Any]) -> list[str]:
    """Return the tables of docs/benchmarks.md."""
    lines = [
        f"{found['rows']:,} summaries; {found['captures']:,} captures that look like {found['looks_bytes'] / 1e9:.1f} "
        f"GB and take {found['takes_bytes'] / 1e6:.0f} MB; load of the machine at the end {found['load']:.1f}",
        "",
        "| question | rows | at first, s | MB read | then, s (slowest) | MB read |",
        "|---|---|---|---|---|---|",
    ]
    for each in found["questions"]:
        first, then = each["first_bytes"] / 1e6, each["bytes"] / 1e6
        lines.append(
            f"| {each['name']} | {each['rows']:,} | {each['first_s']:.3f} | {first:.1f} "
            f"| {each['median_s']:.4f} ({each['slowest_s']:.4f}) | {then:.2f} |"
        )
    rates = (f"{rate:,.0f} {name}" for name, rate in found["tensors_per_second"].items())
    return [*lines, "", f"Rows of 16 KiB read at random, a second: {', '.join(rates)}."]


def costs(size: Size, folder: Path) -> dict[str, Any]:
    """Make both stores in an empty folder, ask each question, and return what it cost."""
    few, large = folder / "summaries", folder / "captures"
    began = time.perf_counter()
    summaries_store(few, size.rows)
    num_captures = captures_store(large, round(size.gigabytes * 1e9))
    made_s = time.perf_counter() - began
    stats = [file.stat() for file in large.rglob("*.arrow")]
    asked = [*questions(few, size.rows, size.rounds), *captured(large, num_captures, size.rounds)]
    return {
        "rows": size.rows,
        "captures": num_captures,
        "looks_bytes": sum(stat.st_size for stat in stats),
        "takes_bytes": sum(stat.st_blocks * 512 for stat in stats),
        "made_s": made_s,
        "load": os.getloadavg()[0],
        "questions": [asdict(each) for each in asked],
        "tensors_per_second": tensors_per_second(large, num_captures, size.tensor_s),
    }


@click.command()
@click.option("--rows", type=int, help=f"Summaries.  [default: {QUICK.rows}]")
@click.option("--gigabytes", type=float, help=f"Of captures, as large as they look.  [default: {QUICK.gigabytes:g}]")
@click.option("--rounds", type=int, help=f"Of each question after its first.  [default: {QUICK.rounds}]")
@click.option("--full", is_flag=True, help=f"{FULL.rows:,} rows, {FULL.gigabytes:g} GB, {FULL.rounds} rounds.")
@click.option("--at", type=click.Path(path_type=Path), help="Folder to make the stores in.  [default: a temporary one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(full: bool, at: Path | None, as_json: bool, **said: Any) -> None:
    """Measure what questions to a store cost."""
    size = replace(FULL if full else QUICK, **{name: value for name, value in said.items() if value is not None})
    with tempfile.TemporaryDirectory(dir=at) as folder:
        found = costs(size, Path(folder))
    click.echo(json.dumps(found) if as_json else "\n".join(report(found)))


if __name__ == "__main__":
    main()
