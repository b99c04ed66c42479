"""The runs of the price: steps interleaved one by one, and blocks of steps between attach and detach.

A step can toggle between a model without a probe, a session that does nothing, and an attached copy, with or without
rows. What works beside the steps (drain, collector, judge) cannot toggle by the step: it is measured in blocks.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from interleaving import interleaved
from llamas import twin
from overhead_figures import Account, Block, Cpu, Floats
from overhead_rig import Foreign, Helpers, cpu_of
from probed_variants import FLUSH_S, wait_until_durable

import insitu
from insitu.session.live import Session
from insitu_collector.judge.runs import LOOK_EVERY_S
from insitu_collector.store import open_store

DETACHED, AGAIN, OFF, T0, ROWS = "detached", "detached again", "off", "T0", "T0+rows"
STEP_VARIANTS: Final = (DETACHED, AGAIN, OFF, T0, ROWS)
BLOCK_VARIANTS: Final = (DETACHED, AGAIN, T0, ROWS)
WARM_UP: Final = 20
"""Rounds (and in a block half as many steps) outside the clock: learning, first imports, first connection."""
SETTLE_S: Final = 1.25 * LOOK_EVERY_S
"""After a block, until the judge has looked at its rows, at its own expense."""
RULE: Final = insitu.Rule(sites="L*.resid_post", requests="opt-in")
NUM_OPTED_IN: Final = 2
MAX_ROWS: Final = 64


@dataclass
class Asked:
    """Rows that sessions were asked for, by epoch and table, counted here and not by the probe."""

    rows: dict[int, Counter[str]] = field(default_factory=dict)
    produced: Counter[str] = field(default_factory=Counter)
    dropped: int = 0

    def step(self, session: Session, *, capture: bool) -> None:
        """Count what one step of a session is to leave in the store."""
        sites = session.sites()
        rows = self.rows.setdefault(session.source.epoch, Counter())
        rows["steps"] += 1
        rows["summaries"] += sum(site.boundary for site in sites)
        if capture:
            rows["captures"] += NUM_OPTED_IN * sum(site.name.endswith(".resid_post") for site in sites)

    def closed(self, session: Session) -> None:
        """Take in the account of a session that is closed."""
        stats = session.stats()
        self.produced.update(stats.produced)
        self.dropped += sum(sum(reasons.values()) for reasons in stats.dropped.values())

    def account(self, store: Path) -> Account:
        """Read the store again and compare: our own count where we have one, else what the probe says it made."""
        opened, stored = open_store(store), {}
        epochs = pa.array(list(self.rows), pa.uint64())
        for name in self.produced:
            table = opened.table(name)
            stored[name] = int(pc.sum(pc.is_in(table["epoch"], epochs)).as_py() or 0)
        asked: Counter[str] = sum(self.rows.values(), Counter())
        return Account({**self.produced, **asked}, stored, self.dropped)


@dataclass
class Bench:
    """One model with everything that runs beside it."""

    model: Any
    helpers: Helpers
    batch: int
    seed: int
    asked: Asked = field(default_factory=Asked)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.foreign = Foreign(self.helpers)
        self.order = random.Random(self.seed)
        self._ids = torch.randint(0, self.model.config.vocab_size, (self.batch, 1))
        self._position = 0

    @contextmanager
    def attached(self, model: Any) -> Iterator[Session]:
        """Attach to a model over gRPC; on leaving, the account is taken."""
        session = insitu.attach(model, to=self.helpers.address, rules=[RULE], max_rows=MAX_ROWS)
        try:
            yield session
        finally:
            session.close(FLUSH_S)
            self.asked.closed(session)

    def step(self, model: Any, session: Session | None, capture: bool = False) -> None:
        """Run one decode-like step; with a session, its row map is stated as an engine would."""
        if session is None:
            model(input_ids=self._ids, use_cache=False)
            return
        self._position += 1
        at = self._position
        rows = [insitu.Rows(f"r{i}", i, 1, at, capture=capture and i < NUM_OPTED_IN) for i in range(self.batch)]
        with session.step(rows=rows, phase="decode"):
            model(input_ids=self._ids, use_cache=False)

    def observed_step(self, model: Any, session: Session, capture: bool = False) -> None:
        """Run a step of an attached model and count what it is to leave behind."""
        self.step(model, session, capture)
        self.asked.step(session, capture=capture)


def step_rounds(bench: Bench, rounds: int) -> tuple[dict[str, Floats], dict[str, Floats], int]:
    """Return wall seconds and CPU-seconds of the step thread, by variant and round, and the number of sites."""
    plain, again, probed, off = bench.model, twin(bench.model), twin(bench.model), insitu.off()
    with bench.attached(probed) as session:
        ways: dict[str, Callable[[], None]] = {
            DETACHED: lambda: bench.step(plain, None),
            AGAIN: lambda: bench.step(again, None),
            OFF: lambda: bench.step(plain, off),
            T0: lambda: bench.step(probed, session),
            ROWS: lambda: bench.step(probed, session, capture=True),
        }
        bench.observed_step(probed, session)  # the first step learns widths, and takes no rows

        def count(name: str) -> None:
            if name in (T0, ROWS):
                bench.asked.step(session, capture=name == ROWS)

        with bench.foreign.watch():
            wall, cpu = interleaved(ways, rounds, bench.order, warm_up=WARM_UP, after=count)
        num_sites = len(session.sites())
    return wall, cpu, num_sites


def block_rounds(bench: Bench, rounds: int, seconds: float, step_s: float) -> list[Block]:
    """Run every variant once a round, in random order, for about `seconds` each."""
    num_steps = max(4, math.ceil(seconds / step_s))
    blocks = []
    for round_ in range(rounds):
        for variant in bench.order.sample(BLOCK_VARIANTS, len(BLOCK_VARIANTS)):
            gc.collect()
            run = _observed_block if variant in (T0, ROWS) else _bare_block
            blocks.append(run(bench, variant, round_, num_steps))
    return blocks


def long_blocks(bench: Bench, seconds: float, step_s: float) -> list[Block]:
    """Run each observed variant once for about `seconds`: so long that its one flush hardly counts."""
    num_steps = max(4, math.ceil(seconds / step_s))
    return [_observed_block(bench, variant, 0, num_steps) for variant in (T0, ROWS)]


def _bare_block(bench: Bench, variant: str, round_: int, num_steps: int) -> Block:
    for _ in range(WARM_UP // 2):
        bench.step(bench.model, None)
    before = _Clocks.read(bench, 0.0)
    with bench.foreign.watch():
        times = _steps(num_steps, lambda: bench.step(bench.model, None))
    spent = _Clocks.read(bench, 0.0).since(before)
    # Nothing is shipped: what collector and judge use while idle is not this variant's.
    cpu = Cpu(step_s=spent.step_s, shipping_s=spent.shipping_s)
    return Block(variant, round_, num_steps * bench.batch, float(times[0].sum()), 0.0, cpu, *times)


def _observed_block(bench: Bench, variant: str, round_: int, num_steps: int) -> Block:
    with bench.attached(bench.model) as session:
        capture = variant == ROWS
        for number in range(WARM_UP // 2):
            bench.observed_step(bench.model, session, capture and number > 0)
        wait_until_durable(session)
        before = _Clocks.read(bench, session.stats().drain_cpu_s)
        with bench.foreign.watch():
            times = _steps(num_steps, lambda: bench.step(bench.model, session, capture))
            began = time.perf_counter()
            wait_until_durable(session)
            flush_s = time.perf_counter() - began
        ours = _Clocks.read(bench, session.stats().drain_cpu_s).since(before)
        Event().wait(SETTLE_S)
        theirs = _Clocks.read(bench, 0.0).since(before)
        cpu = Cpu(ours.step_s, ours.drain_s, ours.shipping_s, theirs.collector_s, theirs.judge_s)
        for _ in range(num_steps):
            bench.asked.step(session, capture=capture)
    return Block(variant, round_, num_steps * bench.batch, float(times[0].sum()), flush_s, cpu, *times)


def _steps(num_steps: int, step: Callable[[], None]) -> tuple[Floats, Floats]:
    """Return, for each step, its wall seconds and the CPU-seconds of this process's other threads meanwhile."""
    wall, beside = np.zeros(num_steps), np.zeros(num_steps)
    for number in range(num_steps):
        process, thread, began = time.process_time(), time.thread_time(), time.perf_counter()
        step()
        wall[number] = time.perf_counter() - began
        beside[number] = (time.process_time() - process) - (time.thread_time() - thread)
    return wall, beside


@dataclass(frozen=True, slots=True)
class _Clocks:
    """CPU clocks of everything, read at one moment by the step thread."""

    step_s: float
    process_s: float
    drain_s: float
    collector_s: float
    judge_s: float

    @classmethod
    def read(cls, bench: Bench, drain_s: float) -> _Clocks:
        helpers = bench.helpers
        theirs = cpu_of(helpers.collector), cpu_of(helpers.judge)
        return cls(time.thread_time(), time.process_time(), drain_s, *theirs)

    def since(self, before: _Clocks) -> Cpu:
        step_s, drain_s = self.step_s - before.step_s, self.drain_s - before.drain_s
        rest_s = self.process_s - before.process_s - step_s - drain_s
        return Cpu(
            step_s, drain_s, max(0.0, rest_s), self.collector_s - before.collector_s, self.judge_s - before.judge_s
        )


def per_row(blocks: Sequence[Block], value: Callable[[Block], float]) -> Floats:
    """Return a value of each block over its rows."""
    return np.asarray([value(block) / block.num_rows for block in blocks])
