"""What an export costs: seconds, bytes and peak memory of each format, each in a process of its own.

python benchmarks/export_cost.py             # 200,000 slices, 7 rounds, about two minutes
python benchmarks/export_cost.py --quick     # 20,000 slices, 3 rounds

Formats take turns, so that what else runs on the machine strikes all alike. Beside them stands a process that opens
the store and reads its intervals and nothing else: what any reader pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc

from insitu_collector.export.command import FILES, TRACES, export_tables, export_trace
from insitu_collector.rows.selection import select
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store

READ: Final = "read only"
KINDS: Final = (READ, *TRACES, *FILES)
SLICES_A_SECOND: Final = 2_300
"""Of the simulated pipeline of three stages, roughly."""


def make_store(path: Path, num_slices: int) -> int:
    """Write a store with about this many intervals of three ranks and a fault; return how many there are."""
    seconds = num_slices / SLICES_A_SECOND
    fault = Fault("slow", 0.8 * seconds, 1, ms=8.0)
    pipeline = Scenario(seed=1, seconds=seconds, base_ms=(2.0, 2.5, 2.0), in_flight=3, requests_per_s=12.0)
    tables = simulate(replace(pipeline, faults=(fault,)))
    tables["intervals"] = tables["intervals"].filter(pc.field("row_seq") < num_slices // 3 + 1)
    write_store(tables, str(path))
    return int(tables["intervals"].num_rows)


def once(kind: str, store: Path, out: Path) -> dict[str, Any]:
    """Export in this process, and return what it took."""
    began, cpu = time.perf_counter(), time.process_time()
    chosen = select(open_store(store))
    size = 0
    if kind in TRACES:
        size = int(export_trace(chosen, kind, out).files[0]["bytes"])
    elif kind in FILES:
        size = sum(told["bytes"] for told in export_tables(chosen, kind, out, ["intervals"]).files)
    else:
        chosen.rows("intervals")
    return {
        "s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "bytes": size,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Return this process's largest resident size. (`ru_maxrss` would be its parent's, where that was larger.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_a_process(kind: str, store: Path, out: Path) -> dict[str, Any]:
    """Return what `once` says in a fresh interpreter."""
    command = [sys.executable, __file__, "--once", kind, "--store", str(store), "--out", str(out)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def spread(values: list[float], digits: int) -> str:
    """Return the median with the smallest and largest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(taken: dict[str, list[dict[str, Any]]], num_slices: int) -> list[str]:
    """Return the table of docs/benchmarks.md."""
    lines = [
        "| format | seconds | CPU seconds | peak memory, MiB | bytes | bytes a slice |",
        "|---|---|---|---|---|---|",
    ]
    for kind, rounds in taken.items():
        size = rounds[0]["bytes"]
        columns = [spread([each[name] for each in rounds], digits) for name, digits in _COLUMNS]
        lines.append(f"| {kind} | {' | '.join(columns)} | {size:,} | {size / num_slices:.1f} |")
    return lines


_COLUMNS: Final = (("s", 2), ("cpu_s", 2), ("peak_mib", 0))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slices", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="20,000 slices, 3 rounds")
    parser.add_argument("--once", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(once(asked.once, asked.store, asked.out)))
        return 0
    slices, rounds = (20_000, 3) if asked.quick else (asked.slices, asked.rounds)
    taken: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        num_slices = make_store(store, slices)
        for number in range(rounds):
            for place in range(len(KINDS)):
                kind = KINDS[(place + number) % len(KINDS)]
                taken[kind].append(in_a_process(kind, store, Path(folder) / f"{kind}-{number}"))
    load = os.getloadavg()[0]
    print(f"{num_slices:,} slices, {rounds} rounds in turns, load of the machine at the end {load:.1f}")
    print("\n".join(report(taken, num_slices)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
