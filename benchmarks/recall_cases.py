"""The cases of `verdict_recall.py`: for each kind of fault, a run with it and the same run without."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from insitu.vocabulary import VerdictKind
from insitu_collector.simulate import LAYERS, Fault, Scenario
from insitu_collector.verdicts import Verdict

Random = np.random.Generator
Expected = tuple[tuple[VerdictKind, int | None], ...]

LARGEST_BATCH_MS: Final = 2.5
"""What the largest decode batch takes beyond a stage's base."""
BASE_S: Final = 13.0
"""Of traffic a case; faults begin in its first half."""


@dataclass(frozen=True)
class Case:
    """A run, the same without its fault, and what should stand at the end of the first."""

    scenario: Scenario
    healthy: Scenario
    expected: Expected
    """(kind, rank) of every verdict that should stand; rank None: it names no rank."""
    size: float
    layer: int | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how cases are drawn, over which sizes, and from which size on it must be found."""

    verdict: VerdictKind
    unit: str
    sizes: tuple[float, float]
    """Smallest and largest, drawn evenly in their logarithm."""
    make: Callable[[Random, Scenario, float], Case]
    limit: Callable[[Case, Sequence[Verdict]], float]
    """Of a case and what was told of its healthy twin: the size that the verdict itself says it finds."""


def pipeline(random: Random, seed: int, **more: int) -> Scenario:
    """Return a healthy run: two or three stages of unequal times, random load and noise."""
    count = int(random.choice([2, 2, 3]))
    base = tuple(float(b) for b in random.uniform(4.0, 7.0) * random.uniform(0.95, 1.25, count))
    return Scenario(
        seed=seed,
        seconds=BASE_S,
        base_ms=base,
        in_flight=count,
        requests_per_s=float(random.uniform(5, 14)),
        noise=float(random.uniform(0.03, 0.12)),
        tail=float(random.uniform(0.0, 0.06)),
        param_bytes=tuple(int(1e6 * b) for b in base),
        **more,  # type: ignore[arg-type]
    )


def _with(scenario: Scenario, fault: Fault, expected: Expected, size: float, layer: int | None = None) -> Case:
    return Case(replace(scenario, faults=(fault,)), scenario, expected, size, layer)


def _slow(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("slow", float(random.uniform(3, 5)), stage, ms=ms, on_cpu=bool(random.integers(2)))
    return _with(run, fault, ((VerdictKind.STAGE_LIMITS, stage),), ms)


def _straggler(random: Random, run: Scenario, ms: float) -> Case:
    run = replace(
        run, base_ms=run.base_ms[:2], in_flight=2, tensor_parallel=int(random.choice([2, 4])), param_bytes=None
    )
    stage, tp = int(random.integers(2)), int(random.integers(run.tensor_parallel))
    fault = Fault("slow", float(random.uniform(3, 5)), stage, ms=ms, tp=tp, on_cpu=bool(random.integers(2)))
    return _with(run, fault, ((VerdictKind.STRAGGLER_RANK, run.rank(0, stage, tp)),), ms)


def _gc(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("gc", float(random.uniform(3, 5)), stage, ms=ms, every_s=float(random.uniform(1.0, 3.0)))
    return _with(run, fault, ((VerdictKind.GC_PAUSE, stage),), ms)


def _hang(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("hang", float(random.uniform(3, 5)), stage, ms=ms)
    return _with(run, fault, ((VerdictKind.STUCK, stage),), ms)


def _nan(random: Random, run: Scenario, size: float) -> Case:
    stage, layer = int(random.integers(run.stages)), int(random.integers(LAYERS))
    fault = Fault("nan", float(random.uniform(1, 9)), stage, layer=layer)
    return _with(run, fault, ((VerdictKind.FIRST_NONFINITE, stage),), size, stage * LAYERS + layer)


def _dropped(random: Random, run: Scenario, share: float) -> Case:
    fault = Fault("drop", 2.0, int(random.integers(run.stages)), share=share)
    return _with(run, fault, ((VerdictKind.RECORDS_DROPPED, None),), share)


def _silent(random: Random, run: Scenario, size: float) -> Case:
    stage = int(random.integers(run.stages))
    return _with(run, Fault("silent_site", stage=stage), ((VerdictKind.SITE_NEVER_FIRED, stage),), size)


def _memory(random: Random, run: Scenario, tokens: float) -> Case:
    run = replace(run, requests_per_s=float(random.uniform(12, 20)))
    fault = Fault("kv_small", size=int(tokens))
    return _with(run, fault, ((VerdictKind.KV_STARVED, None),), tokens)


def _prompts(random: Random, run: Scenario, tokens: float) -> Case:
    fault = Fault("long_prompts", 3.0, size=int(tokens), share=float(random.uniform(0.3, 0.7)))
    return _with(run, fault, ((VerdictKind.PREFILL_DELAYS_DECODE, None),), tokens)


def _stated(case: Case, told: Sequence[Verdict]) -> float:
    """Return the detection limit, in ms, that `healthy` stated of the stage; infinite where it was not said."""
    stage = case.expected[0][1]
    said = [v for v in told if v.kind is VerdictKind.HEALTHY]
    found = re.search(rf"stage {stage} by (\d+\.\d) ms", said[-1].text) if said else None
    return float(found[1]) if found else np.inf


def _late(case: Case, _: Sequence[Verdict]) -> float:
    """Return 1 ms or 20 % of a step (2 ms or 30 % if it computes longer), whichever is more (docs/verdicts.md)."""
    step_ms = max(case.scenario.base_ms) + LARGEST_BATCH_MS
    computing = case.scenario.faults[0].on_cpu
    return max(2.0, 0.3 * step_ms) if computing else max(1.0, 0.2 * step_ms)


def _always(_: Case, __: Sequence[Verdict]) -> float:
    return 0.0


def _of(size: float) -> Callable[[Case, Sequence[Verdict]], float]:
    return lambda _, __: size


KINDS: Final = {
    "stage_limits": Kind(VerdictKind.STAGE_LIMITS, "ms a step", (0.5, 30.0), _slow, _stated),
    "straggler_rank": Kind(VerdictKind.STRAGGLER_RANK, "ms a step", (0.5, 20.0), _straggler, _late),
    "gc_pause": Kind(VerdictKind.GC_PAUSE, "ms a pause", (30.0, 600.0), _gc, _of(100.0)),
    "stuck": Kind(VerdictKind.STUCK, "ms", (1_000.0, 7_000.0), _hang, _of(2_200.0)),
    "first_nonfinite": Kind(VerdictKind.FIRST_NONFINITE, "rows", (1.0, 1.0), _nan, _always),
    "records_dropped": Kind(VerdictKind.RECORDS_DROPPED, "share of rows", (0.002, 0.2), _dropped, _always),
    "site_never_fired": Kind(VerdictKind.SITE_NEVER_FIRED, "sites", (1.0, 1.0), _silent, _always),
    "kv_starved": Kind(VerdictKind.KV_STARVED, "tokens of memory", (100.0, 1_000.0), _memory, _of(np.inf)),
    "prefill_delays_decode": Kind(
        VerdictKind.PREFILL_DELAYS_DECODE, "tokens a prompt", (40.0, 600.0), _prompts, _of(np.inf)
    ),
}


def draw(name: str, seed: int) -> Case:
    """Return the case of a kind and seed."""
    kind = KINDS[name]
    random = np.random.default_rng([seed, *name.encode()])
    low, high = np.log(kind.sizes)
    return kind.make(random, pipeline(random, seed), float(np.exp(random.uniform(low, high))))
