"""What is asked of a way to run a model with insitu attached and without, in turns, and what came of it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from interleaving import Times, interleaved
from llamas import build
from overhead_figures import paired
from overhead_rig import cpu_of

import insitu

DETACHED, AGAIN, ATTACHED = "detached", "detached again", "attached"
STORED_S: Final = 60.0
WARM_UP: Final = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of every case."""

    model: str
    batch: int
    """Sequences of a step."""
    steps: int
    """Steps of a turn."""
    rounds: int
    folder: Path
    """Where stores are made."""
    seed: int = 0

    @property
    def store(self) -> str:
        return f"file://{self.folder}/store"


@dataclass(frozen=True)
class Measured:
    """What one case took."""

    name: str
    unit: str
    num_units: int
    """Of a turn."""
    wall: Times
    """Seconds of turns."""
    cpu: Times
    """CPU-seconds of the process that runs the model, all of its threads, in turns."""
    flush_s: float | None = None
    """Until a store had what a turn of `attached` left, after it; None where nobody can ask for it."""

    def line(self) -> str:
        """Return it for people: time of a unit, median ratios with their 95 % intervals, what attaching adds."""
        alone = self.wall[DETACHED] / self.num_units * 1e3
        more = np.median(self.wall[ATTACHED] - self.wall[DETACHED]) / self.num_units * 1e3
        told = f"wall: {_over_detached(self.wall)}; CPU: {_over_detached(self.cpu)}"
        flushed = "" if self.flush_s is None else f"; then a flush of {self.flush_s * 1e3:.0f} ms a turn"
        return f"{self.name}: {np.median(alone):.2f} ms a {self.unit}, {more:+.2f} attached; {told}{flushed}"


def _over_detached(times: Times) -> str:
    ratios = [paired(name, times[DETACHED], taken) for name, taken in times.items() if name != DETACHED]
    return ", ".join(f"{each.name} {each.median:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in ratios)


def model_of(job: Job) -> Any:
    """Return the model, which ends no sequence by itself."""
    model = build(job.model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def in_turns(
    job: Job,
    ways: Mapping[str, Callable[[], None]],
    pids: Mapping[str, int],
    after: Callable[[str], None] = lambda way: None,
) -> tuple[Times, Times]:
    """Return wall seconds of turns, and CPU-seconds of the processes (pids) that run each way's model.

    after: what to do with a way's name after its turn, outside of the clocks.
    """
    cpu: dict[str, list[float]] = {name: [] for name in ways}

    def counted(name: str) -> Callable[[], None]:
        def turn() -> None:
            began = cpu_of(pids[name])
            ways[name]()
            cpu[name].append(cpu_of(pids[name]) - began)

        return turn

    turns = {name: counted(name) for name in ways}
    wall, _ = interleaved(turns, job.rounds, random.Random(job.seed), warm_up=WARM_UP, after=after)
    return wall, {name: np.asarray(each[WARM_UP:]) for name, each in cpu.items()}


def flushed_turns(
    job: Job,
    ways: Mapping[str, Callable[[], None]],
    sessions: Mapping[str, insitu.Session],
    meet: Callable[[], None] = lambda: None,
) -> tuple[Times, Times, float]:
    """Return what `in_turns` does of ways of this process, and the median of seconds that flushes of `attached` took.

    sessions: of ways that have one; each is flushed after its turn, so that no other way pays for what it left. meet:
    what ranks wait for after each turn.
    """
    flushes: list[float] = []

    def after(name: str) -> None:
        began = time.perf_counter()
        if name in sessions:
            sessions[name].flush(STORED_S)
        if name == ATTACHED:
            flushes.append(time.perf_counter() - began)
        meet()

    wall, cpu = in_turns(job, ways, dict.fromkeys(ways, os.getpid()), after)
    for name, session in sessions.items():
        num_steps = session.stats().produced["steps"]
        assert num_steps >= job.rounds * job.steps, f"{name}: {num_steps} steps were observed"
    return wall, cpu, float(np.median(flushes[WARM_UP:]))
