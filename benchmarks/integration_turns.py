"""What is asked of a way to run a model with insitu attached and without, in turns, and what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from interleaving import Times, interleaved
from llamas import build
from overhead_figures import Ratio, paired

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
    flush_s: float | None = None
    """Until a store had what a turn of `attached` left, after it; None where nobody can ask for it."""

    def ratios(self) -> list[Ratio]:
        """Return each way's turns over `detached`."""
        return [paired(name, self.wall[DETACHED], wall) for name, wall in self.wall.items() if name != DETACHED]

    def line(self) -> str:
        """Return it for people: time of a unit, median ratios with their 95 % intervals, what attaching adds."""
        alone = self.wall[DETACHED] / self.num_units * 1e3
        more = np.median(self.wall[ATTACHED] - self.wall[DETACHED]) / self.num_units * 1e3
        told = (f"{each.name} {each.median:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in self.ratios())
        flushed = "" if self.flush_s is None else f"; then a flush of {self.flush_s * 1e3:.0f} ms a turn"
        return f"{self.name}: {np.median(alone):.2f} ms a {self.unit}; {'; '.join(told)}; {more:+.2f} ms{flushed}"


def model_of(job: Job) -> Any:
    """Return the model, which ends no sequence by itself."""
    model = build(job.model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def in_turns(
    job: Job,
    ways: Mapping[str, Callable[[], None]],
    sessions: Mapping[str, insitu.Session],
    meet: Callable[[], None] = lambda: None,
) -> tuple[Times, float]:
    """Return wall seconds of turns, and the median of flushes of `attached`, which are outside of the clock.

    sessions: of ways that have one; each is flushed after its turn, so that no other way pays for what it left. meet:
    what ranks wait for after each turn.
    """
    flushed: dict[str, list[float]] = {name: [] for name in sessions}

    def after(name: str) -> None:
        if name in sessions:
            began = time.perf_counter()
            sessions[name].flush(STORED_S)
            flushed[name].append(time.perf_counter() - began)
        meet()

    wall, _ = interleaved(ways, job.rounds, random.Random(job.seed), warm_up=WARM_UP, after=after)
    return wall, float(np.median(flushed[ATTACHED][WARM_UP:]))
