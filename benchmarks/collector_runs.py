"""The runs of `make bench-collector` that ship frames: how fast they become durable, and what a kill costs."""

from __future__ import annotations

import random
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from collector_results import MIB, FramesResult, RecoveryResult, percentiles
from collector_rig import Collector, Memory, RawDisk, collecting
from foreign import Foreign
from frame_load import ROWS
from interleaving import interleaved
from overhead_figures import paired
from workers import Worker

from insitu.segments.layout import OPEN, SEALED, list_segments
from insitu_collector.store import open_store

FRAMES, RAW, AGAIN = "frames", "raw write + fdatasync", "A/A (raw again)"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int
    round_mib: int
    kills: int
    """Rounds of the recovery part."""
    left_mib: int = 112
    """Sent when the collector is killed. A file is sealed at 128 MiB, so all of it lies in an open one."""


FULL: Final = Size(rounds=20, round_mib=256, kills=10)
QUICK: Final = Size(rounds=5, round_mib=64, kills=3)


def frames(size: Size, seed: int, folder: Path) -> FramesResult:
    """Ship frames to a collector in turns with bare writes, and read them again."""
    store, order = folder / "store", random.Random(seed)
    load_s: list[float] = []
    memory: list[Memory] = []
    with collecting(store) as collector, _load(collector, seed, folder / "load") as load, Foreign() as foreign:
        raw = RawDisk(folder, order.randbytes(MIB))

        def ship() -> None:
            load_s.append(load.ask("send", frames=size.round_mib)["cpu_s"])

        def after(way: str) -> None:
            raw.forget()
            if way == FRAMES:
                memory.append(collector.memory())

        num_bytes = size.round_mib * MIB
        ways = {FRAMES: ship, RAW: lambda: raw.write(num_bytes), AGAIN: lambda: raw.write(num_bytes)}
        began_s = collector.cpu_s()
        wall, _ = interleaved(ways, size.rounds, order, warm_up=1, after=after)
        collector_s, told = collector.cpu_s() - began_s, load.ask("told")
    sent = len(load_s) * size.round_mib
    return FramesResult(
        num_bytes=size.rounds * size.round_mib * told["frame_bytes"],
        frame_bytes=told["frame_bytes"],
        mib_per_s={way: size.round_mib / float(np.median(seconds)) for way, seconds in wall.items()},
        ratios=[paired(way, wall[way], wall[RAW], seed) for way in (AGAIN, FRAMES)],
        received=percentiles(told["latencies"]["received"]),
        durable=percentiles(told["latencies"]["durable"]),
        cpu_ms_per_mib={"collector": collector_s / sent * 1e3, "load generator": sum(load_s) / sent * 1e3},
        half_mib=memory[len(memory) // 2].now_mib,
        end_mib=memory[-1].now_mib,
        peak_mib=memory[-1].peak_mib,
        num_rows=sent * ROWS,
        num_found=len(_row_numbers(store)),
        foreign_share=foreign.share,
    )


def _load(collector: Collector, seed: int, folder: Path) -> Worker:
    return Worker(sys.executable, {"address": collector.address, "seed": seed}, folder, script="frame_load.py")


def _row_numbers(store: Path) -> set[int]:
    """Return which rows of captures a reader finds, a segment at a time."""
    batches = open_store(store).scan("captures")
    return {number for batch in batches for number in batch.column("row_seq").to_pylist()}


def recovery(size: Size, seed: int, folder: Path) -> RecoveryResult:
    """Kill collectors amid frames, start others on what they left, and look for what was acknowledged."""
    order = random.Random(seed)
    kills: list[Kill] = []
    with Foreign() as foreign:
        for number in range(size.kills):
            kills.append(_kill(size.left_mib, order, seed, folder / f"kill-{number}"))
            shutil.rmtree(folder / f"kill-{number}")
    # What recovery adds to a start cannot be less than reading the files; where it seems so, starts differed by more.
    added = [max(kill.ready_s - kill.start_s, kill.read_s) for kill in kills]
    return RecoveryResult(
        num_bytes=[kill.num_bytes for kill in kills],
        read_s=[kill.read_s for kill in kills],
        start_s=[kill.start_s for kill in kills],
        ready_s=[kill.ready_s for kill in kills],
        num_acknowledged=sum(kill.num_acknowledged for kill in kills),
        num_lost=sum(kill.num_lost for kill in kills),
        num_twice=sum(kill.num_twice for kill in kills),
        ratio=paired("recovery", added, [kill.read_s for kill in kills], seed),
        foreign_share=foreign.share,
    )


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill left, and what came of it."""

    num_bytes: int
    read_s: float
    start_s: float
    ready_s: float
    num_acknowledged: int
    num_lost: int
    num_twice: int


def _kill(left_mib: int, order: random.Random, seed: int, folder: Path) -> Kill:
    store = folder / "store"
    with collecting(store) as collector, _load(collector, seed, folder / "load") as load:
        load.ask("start", frames=100 * left_mib)
        load.ask("wait_sent", frames=left_mib - order.randrange(left_mib // 14))
        collector.kill()
        acknowledged = (load.ask("told_at_end")["durable_seq"] + 1) * ROWS
    left = [name.path(store, OPEN) for name in list_segments(store, OPEN)]
    num_bytes = sum(path.stat().st_size for path in left)
    took = {}
    for way in order.sample(["read", "start"], 2):  # before the killed one's store is changed
        took[way] = _read_s(left) if way == "read" else _start_s(folder / "empty")
    ready_s = _start_s(store)
    numbers = _row_numbers(store)
    return Kill(
        num_bytes=num_bytes,
        read_s=took["read"],
        start_s=took["start"],
        ready_s=ready_s,
        num_acknowledged=acknowledged,
        num_lost=len(set(range(acknowledged)) - numbers),
        num_twice=_rows_in_files(store) - len(numbers),
    )


def _read_s(paths: Sequence[Path]) -> float:
    """Return the seconds of reading files and computing a checksum of all that is in them."""
    began = time.perf_counter()
    for path in paths:
        zlib.crc32(path.read_bytes())
    return time.perf_counter() - began


def _start_s(store: Path) -> float:
    """Return the seconds until a collector on a store is ready: its interpreter and imports are among them."""
    began = time.perf_counter()
    with collecting(store):
        return time.perf_counter() - began


def _rows_in_files(store: Path) -> int:
    """Return the rows of captures in a store, each time they are there, as any reader of Arrow files counts them."""
    num_rows = 0
    for name in list_segments(store, SEALED, "captures"):
        with pa.ipc.open_file(name.path(store, SEALED)) as file:
            num_rows += file.read_all().num_rows
    return num_rows
