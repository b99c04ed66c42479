"""What `make bench-probe` has measured, and what that says of the targets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from overhead_figures import Cost, Floats, Ratio, Target, cost, noise, paired
from variant_names import AGAIN, BOUNDARY, DETACHED, LIBRARIES, LONG, OFF, PEERS, ROWS, SHORT, STORED, T0, T1, T1_EACH

SAMPLED_IN: Final = 16
ONE_IN_16: Final = f"T0 and T1 in 1 of {SAMPLED_IN} (one such step and {SAMPLED_IN - 1} of T0)"
LOSSLESS: Final = 0.98
"""Throughput with the rows of all layers, against none."""
STEP_TARGETS: Final = {
    ("eager", T0): 1.01,
    ("compiled", T0): 1.005,
    ("eager", OFF): 1 / 0.995,
    ("eager", BOUNDARY): 1 / 0.995,
    ("compiled", OFF): 1 / 0.999,
    ("compiled", BOUNDARY): 1 / 0.999,
}
"""Step time over that without a probe, at most."""
COST_TARGETS: Final = {"a tap": 5_000.0, "around a step": 30_000.0, "an interval": 1_500.0}
"""ns, at most, by how the name of a cost begins."""

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Steps:
    """Steps of one model in memory, interleaved one by one: what the step thread pays."""

    model: str
    mode: str
    batch: int
    num_sites: int
    step_ms: float
    """Median detached step."""
    ratios: list[Ratio]
    """Wall time over detached."""
    cpu_ratios: list[Ratio]
    """The same of the thread's CPU time, which other processes disturb less."""
    costs: list[Cost]
    checks: Mapping[str, Any]
    sampled: Mapping[str, Any]
    foreign_share: float
    noise: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stored:
    """Blocks of steps until all that they left is on the disk, in turns: throughput, against that of detached."""

    model: str
    mode: str
    batch: int
    tokens: int
    steps_a_block: int
    block_ms: float
    """Median detached block."""
    ratios: list[Ratio]
    """Detached time over that of a variant, both of one process and round: rows a second, against detached."""
    cpu_ratios: list[Ratio]
    """The same of CPU-seconds of all threads of the process."""
    checks: Mapping[str, Any]
    sampled: Mapping[str, Any]
    unable: Mapping[str, str]
    """Variants that could not run here, and what they said."""
    foreign_share: float
    noise: list[str] = field(default_factory=list)


def micro_costs(found: Seconds, width: int, seed: int) -> list[Cost]:
    """Return what a tap, a step around it and an interval cost. found: of `probe_micro.measure`."""
    at = {name: np.asarray(values) for name, values in found.items()}
    short, long = (at[f"tapped {n}"] - at[f"bare {n}"] for n in (SHORT, LONG))
    tap = (long - short) / (LONG - SHORT)
    control = (at[f"bare {LONG} again"] - at[f"bare {LONG}"]) / LONG
    of = f"float32 [8, {width}]"
    return [
        cost(f"a tap, {of}", tap, seed),
        cost(f"A/A: no tap, {of}", control, seed),
        cost(f"around a step of {LONG} sites, 8 requests, {of}", at["around"], seed),
        cost(f"a whole step of {LONG} taps, {of}", long, seed),
        cost(f"an interval of work (with CPU time), {of}", at["interval host"] - at["loop"], seed),
        cost(f"an interval of waiting, {of}", at["interval wait"] - at["loop"], seed),
    ]


def step_ratios(seconds: Seconds, seed: int) -> list[Ratio]:
    """Return the time of each variant over that of detached in the same round."""
    at = {name: np.asarray(values) for name, values in seconds.items()}
    others = {name: values for name, values in at.items() if name != DETACHED}
    if T1_EACH in at:
        others[ONE_IN_16] = ((SAMPLED_IN - 1) * at[T0] + at[T1_EACH]) / SAMPLED_IN
    return [paired(name, at[DETACHED], values, seed) for name, values in others.items()]


def tap_in_place(seconds: Seconds, num_sites: int, seed: int) -> Cost:
    """Return what T0 adds to a step of a model, a site."""
    extra = np.asarray(seconds[T0]) - np.asarray(seconds[DETACHED])
    return cost("T0 in place, a site", extra / num_sites, seed)


def throughput(base: Mapping[str, Floats], of: Mapping[str, Floats], seed: int) -> list[Ratio]:
    """Return detached time over each variant's. base: variant -> that of detached in its own process."""
    return [paired(name, of[name], base[name], seed) for name in (*STORED, *LIBRARIES) if name in of]


def of_ratio(ratios: Sequence[Ratio], name: str) -> Ratio | None:
    return next((ratio for ratio in ratios if ratio.name == name), None)


def noise_of(ratios: Sequence[Ratio], foreign_share: float) -> list[str]:
    """Return why nothing may be concluded: only of what is compared with a target, and of the A/A pair."""
    judged = {AGAIN, OFF, BOUNDARY, T0}
    return noise([ratio for ratio in ratios if ratio.name in judged], foreign_share)


def step_targets(result: Steps) -> dict[str, str]:
    """Return what each target of step time came to."""
    told = {}
    for ratio in result.ratios:
        limit = STEP_TARGETS.get((result.mode, ratio.name))
        if limit is not None:
            answer = "too noisy" if result.noise else Target(limit).verdict(ratio)
            told[ratio.name] = f"target <= {limit:.3f}: {answer}"
    return told


def stored_targets(result: Stored) -> dict[str, str]:
    """Return what the targets of rows came to: lossless at so much, and half the loss of the best peer."""
    ours = of_ratio(result.ratios, ROWS)
    if ours is None:
        return {}
    answer = "too noisy" if result.noise else _lossless(ours)
    peers = [ratio for ratio in result.ratios if ratio.name in PEERS]
    return {ROWS: f"target >= {LOSSLESS}: {answer}; {_half_the_loss(ours, peers)}"}


def _lossless(ours: Ratio) -> str:
    """Judge a ratio that varies more where it is far from 1: what is below the target as a whole has missed it."""
    return "missed" if ours.high < LOSSLESS else Target(LOSSLESS, at_least=True).verdict(ours)


def _half_the_loss(ours: Ratio, peers: Sequence[Ratio]) -> str:
    """Say whether the loss is less than half the best peer's; intervals that do not tell settle nothing."""
    if not peers:
        return "no peer ran"
    best = max(peers, key=lambda ratio: ratio.median)
    half = [(1.0 - value) / 2 for value in (best.high, best.median, best.low)]
    if 1.0 - ours.low < half[0]:
        answer = "met"
    elif 1.0 - ours.high > half[2]:
        answer = "missed"
    else:
        answer = "not settled"
    return f"target < half the loss of the best peer ({best.name}, {1.0 - best.median:.3f}): {answer}"


def cost_targets(costs: Sequence[Cost]) -> dict[str, str]:
    """Return what the targets of costs came to: the upper end of the interval counts."""
    return {
        each.name: f"target <= {limit / 1e3:g} us: {'met' if each.high_ns <= limit else 'missed'}"
        for each in costs
        for name, limit in COST_TARGETS.items()
        if each.name.startswith(name)
    }


def is_right(result: Steps | Stored) -> bool:
    """Tell whether everything that was to be on the disk is, and is right."""
    return all(check["holds"] for check in result.checks.values())


def sampled_share(result: Stored) -> float | None:
    """Return in which share of the steps statistics were taken."""
    one = result.sampled.get(T1)
    return one["sampled"] / one["steps"] if one and one["steps"] else None
