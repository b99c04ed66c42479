"""How often the judge is right on simulated pipelines with known faults.

`python benchmarks/verdict_recall.py --seeds 200`; exits 1 when any answer was wrong.

Each case is a run of `insitu_collector.simulate` with random times, arrivals, noise, contention and a fault drawn by
its seed, fed to the judgement a second at a time. Right: the verdict expected, on the rank expected, and nothing else.
Wrong: any verdict that names another kind, rank or layer, or one that was withdrawn. Missed: nothing was said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from insitu.vocabulary import VerdictKind
from insitu_collector.judgement import Judgement
from insitu_collector.simulate import LAYERS, Fault, Scenario, simulate
from insitu_collector.slices import seconds
from insitu_collector.verdicts import Verdict, standing

KINDS = ("none", "none-contended", "slow-0.5x", "slow-1x", "slow-3x", "gc", "hang", "nan", "two-faults", "no-warmup")
QUIET = {VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE, VerdictKind.HOST_CONTENDED}


@dataclass(frozen=True)
class Case:
    scenario: Scenario
    expected: tuple[tuple[VerdictKind, int], ...]
    """(kind, rank) of every verdict that should stand."""
    layer: int | None = None


def case(kind: str, seed: int, stages: int | None = None) -> Case:
    """Return the case of a kind and seed: two or three stages, unequal times, random load."""
    random = np.random.default_rng([seed, KINDS.index(kind)])
    count = stages or int(random.choice([2, 2, 3]))
    base = tuple(float(b) for b in random.uniform(4.0, 7.0) * random.uniform(0.95, 1.25, count))
    burst_from = float(random.uniform(0, 6))
    scenario = Scenario(
        seed=seed,
        seconds=14.0,
        base_ms=base,
        in_flight=count,
        requests_per_s=float(random.uniform(5, 14)),
        noise=float(random.uniform(0.03, 0.12)),
        tail=float(random.uniform(0.0, 0.08)),
        param_bytes=tuple(int(1e6 * b) for b in base),
    )
    contended = replace(scenario, bursts=((burst_from, burst_from + 6.0, float(random.uniform(0.6, 1.5))),))
    stage = int(random.integers(count))
    at = float(random.uniform(3.0, 6.0))
    typical = base[stage] + 1.5
    if kind == "none":
        return Case(scenario, ())
    if kind == "none-contended":
        return Case(contended, ())
    if kind.startswith("slow"):
        ms = float(kind[5:-1]) * typical
        fault = Fault("slow", at, stage, ms=ms, on_cpu=bool(random.integers(2)))
        return Case(replace(scenario, faults=(fault,)), ((VerdictKind.STAGE_LIMITS, stage),))
    if kind == "gc":
        fault = Fault("gc", at, stage, ms=float(random.uniform(150, 500)), every_s=float(random.uniform(0.8, 3.0)))
        return Case(replace(scenario, faults=(fault,)), ((VerdictKind.GC_PAUSE, stage),))
    if kind == "hang":
        fault = Fault("hang", at, stage, ms=float(random.uniform(5000, 7000)))
        return Case(replace(scenario, faults=(fault,)), ((VerdictKind.STUCK, stage),))
    if kind == "nan":
        layer = int(random.integers(LAYERS))
        fault = Fault("nan", at, stage, layer=layer)
        named = ((VerdictKind.FIRST_NONFINITE, stage),)
        return Case(replace(scenario, faults=(fault,)), named, stage * LAYERS + layer)
    if kind == "two-faults":
        first = Fault("slow", 3.0, stage, until_s=8.0, ms=2 * typical)
        other = (stage + 1) % count
        second = Fault("slow", 8.0, other, ms=2 * (base[other] + 1.5))
        expected = ((VerdictKind.STAGE_LIMITS, stage), (VerdictKind.STAGE_LIMITS, other))
        return Case(replace(scenario, faults=(first, second)), expected)
    assert kind == "no-warmup", f"unknown kind {kind}"
    fault = Fault("slow", 0.0, stage, ms=4 * typical)
    return Case(replace(scenario, warmup_steps=0, faults=(fault,)), ((VerdictKind.STAGE_LIMITS, stage),))


def judge(scenario: Scenario) -> list[Verdict]:
    """Return every revision the judgement of a simulated run writes."""
    judgement = Judgement()
    told: list[Verdict] = []
    for part in seconds(simulate(scenario)):
        told += judgement.look(part)
    return told + judgement.look({}, final=True)


def outcome(asked: Case, told: list[Verdict]) -> str:
    """Return right, missed or wrong."""
    stands = [verdict for verdict in standing(told) if verdict.kind not in QUIET]
    named = {(verdict.kind, verdict.on_rank) for verdict in stands}
    withdrawn = any(verdict.state == "revised" for verdict in told)
    wrong_layer = any(verdict.layer not in (None, asked.layer) for verdict in stands)
    if withdrawn or wrong_layer or named - set(asked.expected) or len(stands) > len(asked.expected):
        return "wrong"
    return "right" if named == set(asked.expected) else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    asked = parser.parse_args()
    any_wrong = False
    print(f"{'kind':<16} {'right':>6} {'missed':>7} {'wrong':>6} {'s a case':>9}")
    for kind in asked.kinds:
        counted: Counter[str] = Counter()
        began = time.perf_counter()
        for seed in range(asked.first, asked.first + asked.seeds):
            tried = case(kind, seed)
            found = outcome(tried, told := judge(tried.scenario))
            counted[found] += 1
            if found != "right":
                stands = ", ".join(f"{v.kind} on rank {v.on_rank}" for v in standing(told))
                print(f"  {kind} seed {seed}: {found}: expected {tried.expected}, told {stands}", file=sys.stderr)
        took = (time.perf_counter() - began) / max(1, asked.seeds)
        print(f"{kind:<16} {counted['right']:>6} {counted['missed']:>7} {counted['wrong']:>6} {took:>9.2f}", flush=True)
        any_wrong |= counted["wrong"] > 0
    return 1 if any_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
