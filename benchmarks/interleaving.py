"""Several ways to do one thing, in turns: each once a round, in random order, so that what drifts meets all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
from overhead_figures import Floats

Times = dict[str, Floats]
"""Seconds by way and round."""


def interleaved(
    ways: Mapping[str, Callable[[], None]],
    rounds: int,
    order: random.Random,
    *,
    warm_up: int = 0,
    after: Callable[[str], None] = lambda way: None,
) -> tuple[Times, Times]:
    """Return wall seconds and CPU-seconds of this thread. after: what to do with a way's name, outside the clock."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(warm_up + rounds):
        for name in order.sample(list(ways), len(ways)):
            cpu_began, began = time.thread_time(), time.perf_counter()
            ways[name]()
            ended, cpu_ended = time.perf_counter(), time.thread_time()
            after(name)
            if round_ >= warm_up:
                wall[name].append(ended - began)
                cpu[name].append(cpu_ended - cpu_began)
    return _arrays(wall), _arrays(cpu)


def _arrays(lists: Mapping[str, list[float]]) -> Times:
    return {name: np.asarray(values) for name, values in lists.items()}
