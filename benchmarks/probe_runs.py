"""The runs of `make bench-probe`: who is asked for what, in which order."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from foreign import Foreign
from overhead_figures import Cost, Floats
from probe_results import Steps, Stored, micro_costs, noise_of, step_ratios, tap_in_place, throughput
from variant_names import BY_HAND, DETACHED, LIBRARIES, PEERS, STEP_VARIANTS, STORED
from workers import Worker, WorkerError

WIDTHS: Final = (192, 768)
"""Of the tensors whose taps are timed: those of the tiny model, and of the larger one."""
BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured of one model."""

    rounds: int
    """Of single steps."""
    blocks: int
    """Rounds of blocks."""
    steps: int
    """Steps of a block."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, on which models, and where."""

    parts: Sequence[str]
    models: Sequence[str]
    modes: Sequence[str]
    sizes: Mapping[str, Size]
    micro_rounds: int
    prompts: bool
    seed: int
    peers_python: Path
    folder: Path


def micro(plan: Plan) -> list[Cost]:
    """Measure the smallest parts."""
    with Worker(sys.executable, _job("least", BATCH, 1, "eager", plan.seed), plan.folder / "micro") as worker:
        return [
            each
            for width in WIDTHS
            for each in micro_costs(
                worker.ask("micro", rounds=plan.micro_rounds, seed=plan.seed, width=width), width, plan.seed
            )
        ]


def _job(model: str, batch: int, tokens: int, mode: str, seed: int) -> dict[str, Any]:
    return {"model": model, "batch": batch, "tokens": tokens, "compiled": mode == "compiled", "seed": seed}


def steps(plan: Plan, model: str, mode: str) -> Steps:
    """Measure single steps of one model."""
    folder, size = plan.folder / f"steps-{model}-{mode}", plan.sizes[model]
    with Worker(sys.executable, _job(model, BATCH, 1, mode, plan.seed), folder) as worker:
        num_sites = max(worker.ask("open", variant=name)["num_sites"] for name in STEP_VARIANTS)
        with Foreign() as foreign:
            found = worker.ask("steps", variants=list(STEP_VARIANTS), rounds=size.rounds, seed=plan.seed)
        after = worker.ask("check")
    ratios = step_ratios(found["wall"], plan.seed)
    return Steps(
        model,
        mode,
        BATCH,
        num_sites,
        float(np.median(found["wall"][DETACHED])) * 1e3,
        ratios,
        step_ratios(found["cpu"], plan.seed),
        [tap_in_place(found["wall"], num_sites, plan.seed)],
        after["checks"],
        after["sampled"],
        foreign.share,
        noise_of(ratios, foreign.share),
    )


@dataclass(slots=True)
class _Runner:
    """A process and those of its variants that take part; detached is one of them."""

    worker: Worker
    variants: list[str]


Spent = dict[tuple[int, str], list[dict[str, float]]]
"""What each variant of each process took, by round."""


def stored(plan: Plan, model: str, mode: str, batch: int, tokens: int) -> Stored:
    """Measure blocks of steps that end when all is on the disk."""
    size = plan.sizes[model]
    num_steps = size.steps if tokens == 1 else max(2, size.steps // 4)
    unable: dict[str, str] = {}
    folder = plan.folder / f"stored-{model}-{mode}-{tokens}"
    with ExitStack() as stack:
        job = _job(model, batch, tokens, mode, plan.seed)
        runners = list(_runners(plan, job, folder, stack, unable))
        with Foreign() as foreign:
            spent = _blocks(runners, size.blocks, num_steps, random.Random(plan.seed), unable)
        after = [runner.worker.ask("check") for runner in runners]
    checks = {name: check for each in after for name, check in each["checks"].items() if name not in unable}
    for name in [name for name in PEERS if not checks.get(name, {"holds": True})["holds"]]:
        unable[name] = f"what it left on the disk is not what was to be kept: {checks.pop(name)}"
    done = {key: turns for key, turns in spent.items() if key[1] not in unable}
    wall, cpu = (
        {key: np.array([turn[clock] for turn in turns]) for key, turns in done.items()} for clock in ("wall_s", "cpu_s")
    )
    ratios = throughput(*_by_variant(wall), plan.seed)
    return Stored(
        model,
        mode,
        batch,
        tokens,
        num_steps,
        float(np.median(wall[0, DETACHED])) * 1e3,
        ratios,
        throughput(*_by_variant(cpu), plan.seed),
        checks,
        {name: told for each in after for name, told in each["sampled"].items()},
        unable,
        foreign.share,
        noise_of(ratios, foreign.share),
    )


def _blocks(
    runners: Sequence[_Runner], rounds: int, num_steps: int, order: random.Random, unable: dict[str, str]
) -> Spent:
    """Let all variants of all processes take turns; a peer that fails is left out from then on."""
    spent: Spent = {}
    for _ in range(rounds):
        turns = [(at, name) for at, runner in enumerate(runners) for name in runner.variants]
        for at, name in order.sample(turns, len(turns)):
            try:
                took = runners[at].worker.ask("block", variant=name, steps=num_steps)
            except WorkerError as error:
                if name not in PEERS:
                    raise
                unable[name] = str(error)
                runners[at].variants.remove(name)
            else:
                spent.setdefault((at, name), []).append(took)
    return spent


def _by_variant(seconds: Mapping[tuple[int, str], Floats]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return by variant the seconds of detached in its own process, and its own."""
    base, own = {}, {}
    for (at, name), values in seconds.items():
        if name != DETACHED:
            base[name], own[name] = seconds[at, DETACHED], values
    return base, own


def _runners(
    plan: Plan, job: Mapping[str, Any], folder: Path, stack: ExitStack, unable: dict[str, str]
) -> Iterator[_Runner]:
    """Start a process for what insitu's environment can run, and one for each library; note what cannot be run."""
    groups: list[tuple[str, Path | str, tuple[str, ...]]] = [("own", sys.executable, STORED)]
    for name, (place, _) in LIBRARIES.items():
        if job["compiled"]:
            unable[name] = "it runs a model in eager alone"
        elif not plan.peers_python.exists():
            unable[name] = f"there is no {plan.peers_python}; `make bench-probe` makes it"
        else:
            groups.append((place, plan.peers_python, (DETACHED, name)))
    for place, python, names in groups:
        runner = _Runner(stack.enter_context(Worker(python, job, folder / place)), [])
        # What was compiled of a model without hooks is run of its copy with hooks too: those with hooks go first.
        for name in sorted(names, key=lambda name: name not in BY_HAND):
            try:
                runner.worker.ask("open", variant=name)
                runner.variants.append(name)
            except WorkerError as error:
                if name not in PEERS:
                    raise
                unable[name] = str(error)
        if len(runner.variants) > 1:
            yield runner
