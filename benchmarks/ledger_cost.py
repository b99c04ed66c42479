"""What the rank ledger costs: one second of new data at 2, 64 and 512 ranks, and memory over an hour of it.

`python benchmarks/ledger_cost.py` (`make bench-ledger`); `--seconds` of data fed for the memory figure, `--rounds`.
Rows are made: 100 steps a second a rank, six intervals a step, a heartbeat a second at a time of the rank's own, as
tables of `insitu.records`; making them is not measured. A second costs its CPU time (wall time stands beside it, and
on a machine in use says more of the others): `add`, and `settle`, which makes the new tiles and makes those again that
intervals across a heartbeat have changed. The sizes take turns within each round.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass
from insitu_collector.ledger.tiles import TileLedger

SECOND = 1_000_000_000
STEPS = 100
"""A second and rank."""
TARGET_MS = 50.0
"""For one second of new data from `TARGET_RANKS` ranks."""
TARGET_RANKS = 64
SETTLED_S = 40
"""Seconds fed before anything is measured: rows are held 35 s, so that from then on some are let go each second."""
_PARTS = {
    IntervalClass.RECV_WAIT: 0.35,
    IntervalClass.RECV_XFER: 0.02,
    IntervalClass.HOST: 0.05,
    IntervalClass.COMPUTE: 0.50,
    IntervalClass.SAMPLE: 0.03,
    IntervalClass.SEND_WAIT: 0.05,
}


@dataclass
class Feed:
    """Makes one second of rows after the other; ranks are spread over up to 8 stages."""

    num_ranks: int
    second: int = 0

    def __post_init__(self) -> None:
        self.rank = np.arange(self.num_ranks)
        self.per_stage = max(1, self.num_ranks // 8)
        self.phase = np.random.default_rng(self.num_ranks).integers(0, SECOND // STEPS, self.num_ranks)
        self.beat = np.random.default_rng(1).integers(0, SECOND, self.num_ranks)
        self.cuts = np.rint(np.cumsum([0.0, *_PARTS.values()]) * (SECOND // STEPS)).astype(np.int64)

    def sources(self) -> pa.Table:
        zero = np.zeros(self.num_ranks, np.int64)
        named = {name: [value] * self.num_ranks for name, value in (("role", "rank"), ("run", "r"), ("boot_id", "b"))}
        return self._table("sources", self.rank, zero, unix_anchor_ns=zero, mono_anchor_ns=zero, **named)

    def next(self) -> dict[str, pa.Table]:
        at, self.second = self.second, self.second + 1
        step = at * STEPS + np.arange(STEPS)
        begin = step[None, :, None] * (SECOND // STEPS) + self.phase[:, None, None]
        t0, t1 = (np.ravel(begin + cuts) for cuts in (self.cuts[:-1], self.cuts[1:]))
        rank = np.repeat(self.rank, STEPS * len(_PARTS))  # as frames come: one process after the other
        cls = np.tile(list(_PARTS), self.num_ranks * STEPS)
        before = np.isin(cls, (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER))
        peer = rank + np.select([before, cls == IntervalClass.SEND_WAIT], [-self.per_stage, self.per_stage])
        peer = np.where((peer < 0) | (peer >= self.num_ranks), -1, peer)
        seq = np.tile(np.arange(STEPS * len(_PARTS)), self.num_ranks) + at * STEPS * len(_PARTS)
        more = {"cls": cls, "peer": peer, "cpu_ns": (t1 - t0) * 9 // 10}
        intervals = self._table("intervals", rank, seq, t0_ns=t0, t1_ns=t1, **more)
        delay = np.full(self.num_ranks, at * SECOND // 50)
        seq = np.full(self.num_ranks, at)
        health = self._table("health", self.rank, seq, t_ns=at * SECOND + self.beat, run_delay_ns=delay)
        return {"intervals": intervals, "health": health}

    def _table(self, name: str, rank: np.ndarray, seq: np.ndarray, **columns: np.ndarray | list[str]) -> pa.Table:
        given = {"epoch": rank + 1, "rank": rank, "stage": rank // self.per_stage, "row_seq": seq, **columns}
        schema = schema_of(name)
        arrays = [
            pa.array(given[f.name]).cast(f.type) if f.name in given else pa.nulls(len(rank), f.type) for f in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def fed(ledger: TileLedger, feed: Feed) -> tuple[float, float, int]:
    """Feed one second; return CPU and wall time in ms, and how many intervals it was."""
    tables = feed.next()
    cpu, wall = time.process_time(), time.perf_counter()
    ledger.add(tables)
    ledger.settle()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return 1e3 * cpu, 1e3 * wall, tables["intervals"].num_rows


def costs(sizes: list[int], rounds: int) -> dict[int, np.ndarray]:
    """Return by number of ranks float64[rounds, 3]: CPU ms, wall ms and intervals of each second."""
    pairs = {size: (TileLedger(), Feed(size)) for size in sizes}
    for ledger, feed in pairs.values():
        ledger.add({"sources": feed.sources()})
        for _ in range(SETTLED_S):
            fed(ledger, feed)
    found: dict[int, list[tuple[float, float, int]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, (ledger, feed) in pairs.items():
            found[size].append(fed(ledger, feed))
    return {size: np.array(rows) for size, rows in found.items()}


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def memory(num_ranks: int, seconds: int) -> None:
    """Feed an hour, or what was asked for, second by second; print resident memory on the way."""
    ledger, feed = TileLedger(), Feed(num_ranks)
    ledger.add({"sources": feed.sources()})
    print(f"\n{num_ranks} ranks, {seconds} s of data: resident MiB, intervals held, tiles of 100 ms / 1 s / 10 s")
    for at in range(1, seconds + 1):
        fed(ledger, feed)
        if at == SETTLED_S or at % max(1, seconds // 6) == 0:
            gc.collect()
            tiles = " / ".join(str(len(ledger.tiles(width))) for width in (SECOND // 10, SECOND, 10 * SECOND))
            print(f"  {at:>5} s {resident_mib():>8.0f} {ledger.num_held_rows:>10} {tiles:>20}", flush=True)
    assert ledger.late.num_rows == 0, "nothing of a feed in order comes late"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64, 512])
    parser.add_argument("--seconds", type=int, default=3600, help="of data for the memory figure; 0 leaves it out")
    asked = parser.parse_args()
    names = ("intervals", 10), ("CPU ms", 8), ("p10", 7), ("p90", 7), ("wall ms", 9), ("intervals/CPU s", 16)
    print(f"{'ranks':>6}", *(f"{name:>{width}}" for name, width in names))
    met = True
    for size, rows in costs(asked.ranks, asked.rounds).items():
        low, middle, high = np.quantile(rows[:, 0], (0.1, 0.5, 0.9))
        wall, count = np.median(rows[:, 1]), rows[0, 2]
        figures = f"{count:>10.0f} {middle:>8.1f} {low:>7.1f} {high:>7.1f} {wall:>9.1f} {1e3 * count / middle:>16,.0f}"
        print(f"{size:>6} {figures}")
        if size == TARGET_RANKS:
            met = bool(middle < TARGET_MS)
            print(
                f"       target: under {TARGET_MS:.0f} ms of CPU for {TARGET_RANKS} ranks: {'met' if met else 'missed'}"
            )
    if asked.seconds:
        memory(TARGET_RANKS, asked.seconds)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
