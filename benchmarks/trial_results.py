"""What trials were worth: one record a trial, the file they are kept in, the table, and the bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from trial_plans import FAULTS, World

SCHEMA: Final = "insitu.trials/1"
BAR: Final = 0.95
NOISY_SHARE: Final = 0.25
"""Of all cores: a trial that misses something while others took more is asked for again."""


@dataclass(slots=True)
class Trial:
    """One run and what it was worth."""

    kind: str
    seed: int
    specs: list[str]
    right: bool = False
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    account: list[str] = field(default_factory=list)
    foreign_share: float = 0.0
    """Share of all cores that processes outside the trial used."""
    fault_to_verdict_s: list[float] = field(default_factory=list)
    start_to_ready_s: float = 0.0
    told: list[str] = field(default_factory=list)
    faults: list[Any] = field(default_factory=list)
    failure: str = ""
    """Why there was no answer at all."""
    attempts: int = 1

    @property
    def changed(self) -> bool:
        """Tell whether its fault changed midway."""
        return self.kind in FAULTS and len(self.specs) > 1

    @property
    def is_noisy(self) -> bool:
        """Tell whether a busy host may be why it is not right; a wrong answer has no excuse."""
        return not self.right and not self.wrong and self.foreign_share > NOISY_SHARE


def table(trials: Sequence[Trial]) -> str:
    """Return a line a kind, and below it the seeds that are not right, each with the reason."""
    head = f"{'kind':<12} {'right':>8} {'wrong':>6} {'changed':>8} {'fault -> verdict':>17} {'start -> ready':>15}"
    lines = [f"{head} {'foreign':>8} {'again':>6}"]
    kinds = dict.fromkeys(trial.kind for trial in trials)
    lines += [_line(kind, [trial for trial in trials if trial.kind == kind]) for kind in kinds]
    for trial in trials:
        reasons = [*trial.wrong, *trial.missed, *trial.account, *([trial.failure] if trial.failure else [])]
        lines += [f"  {trial.kind} seed {trial.seed} {trial.specs}: {reason}" for reason in reasons]
    return "\n".join(lines)


def _line(kind: str, mine: Sequence[Trial]) -> str:
    delays = [delay for trial in mine for delay in trial.fault_to_verdict_s]
    delay = f"{np.median(delays):.1f} s, {max(delays):.1f}" if delays else "-"
    foreign = max(trial.foreign_share for trial in mine)
    return (
        f"{kind:<12} {sum(t.right for t in mine):>4}/{len(mine):<3} {sum(bool(t.wrong) for t in mine):>6} "
        f"{sum(t.changed for t in mine):>8} {delay:>17} "
        f"{np.median([t.start_to_ready_s for t in mine]):>13.1f} s {100 * foreign:>6.0f} % "
        f"{sum(trial.attempts - 1 for trial in mine):>6}"
    )


def is_met(trials: Sequence[Trial]) -> bool:
    """Tell whether the bar is met: nothing wrong anywhere, and 19 of 20 right of each kind."""
    kinds = {trial.kind for trial in trials}
    return bool(trials) and all(_is_met([trial for trial in trials if trial.kind == kind]) for kind in kinds)


def is_sample_met(trials: Sequence[Trial]) -> bool:
    """Tell whether one seed of each kind was right or, where it was not, both seeds after it; and nothing crashed."""
    crashed = [trial for trial in trials if trial.failure or trial.account]
    kinds = {trial.kind: [each for each in trials if each.kind == trial.kind] for trial in trials}
    return bool(trials) and not crashed and all(_is_sampled_right(mine) for mine in kinds.values())


def _is_sampled_right(mine: Sequence[Trial]) -> bool:
    return mine[0].right or (len(mine) > 2 and all(trial.right for trial in mine[1:]))


def _is_met(trials: Sequence[Trial]) -> bool:
    return not any(trial.wrong for trial in trials) and sum(t.right for t in trials) >= BAR * len(trials)


def read_results(path: Path) -> tuple[World | None, list[Trial]]:
    """Return the world and the trials of an earlier, unfinished round."""
    if not path.exists():
        return None, []
    found = json.loads(path.read_text())
    world = found["world"] and World(**{**found["world"], "stage_ms": tuple(found["world"]["stage_ms"])})
    return world, [Trial(**trial) for trial in found["trials"]]


def write_results(path: Path, world: World | None, trials: Sequence[Trial]) -> None:
    """Write what is known so far, whole or not at all."""
    whole = {"schema": SCHEMA, "world": world and asdict(world), "trials": [asdict(trial) for trial in trials]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.replace(path)
