"""A rated load on a real collector, faults that befall it, and what must stay flat meanwhile."""

from __future__ import annotations

import itertools
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import grpc
import psutil
import torch
from disk_kit import fill
from frame_mutations import EPOCH, mutated
from live_system import Process, free_port
from torch import nn

import insitu
from insitu.segments.layout import SEALED, list_segments
from insitu.wire.insitu_pb2 import Hello, ToCollector
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu_collector.store import open_store

KEEP: Final = "1MiB"
KEEP_BYTES: Final = 1 << 20
OPEN_BYTES: Final = 32 << 20
"""More than is written in the minute between two looks at what is kept, at this load."""
WATCHED: Final = (
    ("memory of the collector", 1.25, 32 << 20),
    ("memory of the probe", 1.25, 32 << 20),
    ("descriptors of the collector", 1.0, 16),
    ("descriptors of the probe", 1.0, 16),
)
"""What must stay flat, and how many times as much, and how much more, its last third may be than its middle one."""


class Soak:
    """A session at a steady rate of steps, its collector on a small disk, and a log of what was done to them."""

    def __init__(self, disk: Path, seed: int, lives_s: Sequence[float], steps_per_s: float = 200.0) -> None:
        """lives_s: how long each collector is left alive at least, in turn. What is kept is looked at once a minute."""
        self.disk, self.store = disk, disk / "store"
        self.chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.num_expired = 0
        self.log = [f"{_machine()}; seed {seed}; {steps_per_s:.0f} steps/s"]
        self.samples: list[dict[str, int]] = []
        self._began = time.monotonic()
        self._port = free_port()
        self._lives_s = itertools.cycle(lives_s)
        self._pause = threading.Event()
        self._over = threading.Event()
        self._collect = self._start()
        self.session = insitu.attach(net := nn.Linear(16, 16), to=f"grpc://127.0.0.1:{self._port}")
        self._load = threading.Thread(target=self._step, args=(net, 1 / steps_per_s))
        self._load.start()

    def _step(self, net: nn.Module, period_s: float) -> None:
        x = torch.zeros(4, 16)
        with torch.no_grad():
            while not self._over.wait(period_s):
                net(x)

    def _start(self) -> Process:
        options = ["--store", str(self.store), "--port", str(self._port), "--keep-bytes", KEEP]
        collect = Process(["-m", "insitu", "collect", *options])
        collect.wait_for(r"collecting on (grpc://\S+)")
        self._lives_until = time.monotonic() + next(self._lives_s)
        return collect

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._load.join()
        self._collect.stop()

    def run(self, seconds: float) -> None:
        """Let faults happen for so long; then everything is sent, and both end in order."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            fault = self.chance.choice(FAULTS if time.monotonic() < self._lives_until else ENDS)
            self.faults[fault.__name__] += 1
            self._say(fault.__name__)
            fault(self)
            self.passes(2.0)
            self._sample()
        self._over.set()
        self._load.join()
        assert self.session.close(60).pending == 0
        self._collect.stop()
        self._say(f"ended: {self.session.stats().num_steps} steps, faults {dict(self.faults)}")

    def passes(self, most_s: float) -> None:
        self._pause.wait(self.chance.uniform(0.0, most_s))

    def _say(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._began:9.1f} s  {what}")

    def _sample(self) -> None:
        sample = {}
        for who, process in (("collector", psutil.Process(self._collect.process.pid)), ("probe", psutil.Process())):
            sample[f"memory of the {who}"] = process.memory_info().rss
            sample[f"descriptors of the {who}"] = process.num_fds()
        with suppress(FileNotFoundError):  # a segment that is moved just now
            sample["bytes of the store"] = sum(file.stat().st_size for file in self.store.rglob("*.arrow"))
            self.samples.append(sample)
            self._say(", ".join(f"{what} {number}" for what, number in sample.items()))

    # -- faults ----------------------------------------------------------------------------------------------------

    def killed(self) -> None:
        """The collector is killed, and is away for a while (rows 1 and 10)."""
        self._collect.process.kill()
        self._collect.stop()
        self.passes(3.0)
        self._collect = self._start()

    def restarted(self) -> None:
        """The collector is stopped in order, and started again (row 12)."""
        self._collect.stop()
        self._collect = self._start()

    def stalled(self) -> None:
        """The collector stands still (row 11)."""
        self._collect.process.send_signal(signal.SIGSTOP)
        self.passes(3.0)
        self._collect.process.send_signal(signal.SIGCONT)

    def full(self) -> None:
        """Others take all the room of the disk (row 5)."""
        ballast = fill(self.disk)
        self.passes(3.0)
        ballast.unlink()

    def mute(self) -> None:
        """A peer connects and says nothing (row 13)."""
        with socket.create_connection(("127.0.0.1", self._port)):
            self.passes(1.0)

    def hostile(self) -> None:
        """A peer sends frames that are nearly right (rows 16 and 17)."""
        first = self.chance.randrange(10**6)

        def messages() -> Iterator[ToCollector]:
            yield ToCollector(hello=Hello(protocol=1, epoch=EPOCH, source={"role": "rank"}))
            for number in range(first, first + 200):
                yield ToCollector(frame=mutated(number))

        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel, suppress(grpc.RpcError):
            for _ in CollectorStub(channel).Ship(messages(), timeout=20):
                pass

    # -- what must hold --------------------------------------------------------------------------------------------

    def unaccounted(self) -> dict[str, int]:
        """Return the tables whose rows produced are not stored + dropped + expired, and by how many."""
        stats, opened = self.session.stats(), open_store(self.store)
        epoch = self.session.source.epoch
        there = {name.file for name in list_segments(self.store, SEALED)}
        gone: dict[tuple[str, str], int] = {
            (gap["table"], gap["file"]): gap["num_rows"]
            for gap in opened.table("gaps").to_pylist()
            if (gap["source_epoch"], gap["reason"]) == (epoch, "expired") and gap["file"] not in there
        }
        wrong = {}
        for table, produced in stats.produced.items():
            stored = opened.table(table)["epoch"].to_pylist().count(epoch)
            expired = sum(rows for (of, _), rows in gone.items() if of == table)
            self.num_expired += expired
            dropped = sum(stats.dropped.get(table, {}).values())
            self._say(f"{table}: {produced} made, {stored} stored, {dropped} dropped, {expired} expired")
            if produced != stored + dropped + expired:
                wrong[table] = produced - stored - dropped - expired
        return wrong

    def grown(self) -> list[str]:
        """Return what did not stay flat: what was watched, and how it went from the middle third to the last."""
        third = len(self.samples) // 3
        assert third > 0, "too short to say"
        told = []
        for what, most_growth, slack in WATCHED:
            parts = (self.samples[third : 2 * third], self.samples[-third:])
            middle, last = (statistics.median(sample[what] for sample in part) for part in parts)
            if last > most_growth * middle + slack:
                told.append(f"{what}: from {middle:.0f} to {last:.0f}")
        most = max(sample["bytes of the store"] for sample in self.samples)
        if most > KEEP_BYTES + OPEN_BYTES:
            told.append(f"store: {most >> 20} MiB, to keep {KEEP}")
        return told


FAULTS: Final[tuple[Callable[[Soak], None], ...]] = (Soak.stalled, Soak.full, Soak.mute, Soak.hostile)
ENDS: Final[tuple[Callable[[Soak], None], ...]] = (Soak.killed, Soak.restarted)
"""What ends a collector."""


def _machine() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    memory = psutil.virtual_memory().total >> 30
    what = f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, {memory} GiB"
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {what}; commit {commit or 'unknown'}"
