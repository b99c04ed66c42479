"""What the smallest parts cost: a tap, an interval, the time around a step. On modules that do nothing else.

A comb is a model of many modules that hand on what they are given. Its step with a probe less its step without one is
what the taps and the step around them cost; two lengths of comb tell these apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import torch
from interleaving import interleaved
from torch import nn
from variant_names import LONG, SHORT

import insitu
from insitu.testing import Recording

BATCH: Final = 8
FORWARDS: Final = 10
"""In a round, of each comb: a clock tells some ten nanoseconds, a forward takes at least a thousand."""
INTERVALS: Final = 100
"""In a round."""
ROUNDS_A_FLUSH: Final = 4
"""Rings are emptied long before they fill: what is dropped costs less, and no drain runs beside what is timed."""


class Tooth(nn.Module):
    """Hands on what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Comb(nn.Module):
    """A row of teeth."""

    def __init__(self, num_teeth: int) -> None:
        super().__init__()
        self.teeth = nn.ModuleList(Tooth() for _ in range(num_teeth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for tooth in self.teeth:
            x = tooth(x)
        return x


class Dropped(Exception):
    """A ring was full: what was measured is the cost of dropping."""


@contextmanager
def probed(comb: Comb) -> Iterator[Any]:
    session = insitu.attach(comb, to=Recording(), max_rows=64)
    try:
        yield session
    finally:
        session.close()
        if dropped := session.stats().dropped:
            raise Dropped(f"rows found no place: {dropped}")


def rows_of(batch: int) -> list[insitu.Rows]:
    """Return a row map, as an engine states it."""
    return [insitu.Rows(f"r{i}", i, 1, i) for i in range(batch)]


def forwards(comb: Comb, x: torch.Tensor, session: Any) -> Callable[[], None]:
    """Return what runs a comb a few times; a session is told of each."""
    if session is None:

        def run() -> None:
            for _ in range(FORWARDS):
                comb(x)

        return run
    rows = rows_of(BATCH)

    def run_steps() -> None:
        for _ in range(FORWARDS):
            with session.step(rows=rows, phase="decode"):
                comb(x)

    return run_steps


def measure(rounds: int, seed: int, width: int) -> dict[str, list[float]]:
    """Return seconds by what was done and round: a step of each comb, an interval, the time around a step."""
    order, x = random.Random(seed), torch.randn(BATCH, width)
    bare = {length: Comb(length) for length in (SHORT, LONG)}
    seen = {length: Comb(length) for length in (SHORT, LONG)}
    around: list[float] = []
    with probed(seen[SHORT]) as short, probed(seen[LONG]) as long:
        sessions = {SHORT: short, LONG: long}
        ways: dict[str, Callable[[], None]] = {}
        for length in (SHORT, LONG):
            ways[f"bare {length}"] = forwards(bare[length], x, None)
            ways[f"bare {length} again"] = forwards(bare[length], x, None)
            ways[f"tapped {length}"] = forwards(seen[length], x, sessions[length])
        others = _interval_ways(short)
        found: dict[str, list[float]] = {name: [] for name in (*ways, *others)}
        for each in ways.values():
            each()
        for _ in range(0, rounds, ROUNDS_A_FLUSH):
            for group, times in ((ways, FORWARDS), (others, INTERVALS)):
                for session in sessions.values():
                    session.flush()
                wall, _ = interleaved(group, ROUNDS_A_FLUSH, order)
                for name, values in wall.items():
                    found[name] += (values / times).tolist()
            around += [_around(long, seen[LONG], x) for _ in range(ROUNDS_A_FLUSH)]
    return {**{name: values[:rounds] for name, values in found.items()}, "around": around[:rounds]}


def _interval_ways(session: Any) -> Mapping[str, Callable[[], None]]:
    def record(cls: str) -> None:
        for _ in range(INTERVALS):
            with session.interval(cls):
                pass

    def loop() -> None:
        for _ in range(INTERVALS):
            pass

    # What counts as work has its CPU time read as well, what waits has not.
    return {"interval host": lambda: record("host"), "interval wait": lambda: record("recv_wait"), "loop": loop}


def _around(session: Any, comb: Comb, x: torch.Tensor) -> float:
    """Return the seconds of a step outside of the model's call, its row map included: the median of a few."""
    spent = []
    for _ in range(FORWARDS):
        began = time.perf_counter()
        with session.step(rows=rows_of(BATCH), phase="decode"):
            entered = time.perf_counter()
            comb(x)
            left = time.perf_counter()
        ended = time.perf_counter()
        spent.append((entered - began) + (ended - left))
    return median(spent)
