"""The cases of `verdict_recall.py`: for each kind of fault, a run with it and the same run without."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pyarrow as pa
from recall_truth import delay_share, known_share, memory_share, prompt_share, routed_tokens, throughput_gain

from insitu.vocabulary import VerdictKind
from insitu_collector.simulate import LAYERS, Fault, Scenario
from insitu_collector.verdicts.finding import Verdict

Random = np.random.Generator
Tables = dict[str, pa.Table]
Range = tuple[float, float]

LARGEST_BATCH_MS: Final = 2.5
"""What the largest decode batch takes beyond a stage's base."""
BASE_S: Final = 13.0
"""Of traffic a case; faults begin in its first half."""
ROUTED_S: Final = 27.0
"""... where routers are judged: over 20 s, and in both halves of them."""
KNOWN: Final = 1 / 3
"""Share of the steps of a slower rank that had an equal before: a quarter is asked for, of a part of them."""
DEVIATIONS: Final = 3.0
"""Standard deviations by which the share of the tokens that were sampled may be below the share of all."""
CHANGING_S: Final = 60.0
"""... where a rank changes for good: 20 s before it, 6 s on its way, 15 s to stay, 12 s to see who changed with it."""


@dataclass(frozen=True)
class Case:
    """A run, the same without its fault, and what should stand at the end of the first."""

    scenario: Scenario
    healthy: Scenario
    expected: tuple[VerdictKind, ...]
    """Any of these is right ..."""
    rank: int | None
    """... on this rank; None: it names no rank."""
    size: float
    layer: int | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how cases are drawn, over which sizes, and from which size on it must be found."""

    verdict: VerdictKind
    unit: str
    sizes: Range
    """Smallest and largest, in the table and the plot; drawn evenly in their logarithm."""
    make: Callable[[Random, Scenario, float], Case]
    limit: Callable[[Case, Sequence[Verdict], Tables], float | None]
    """Of a case, what was told of its healthy twin, and the run: the size from which on it must be found, as the
    verdict or docs/verdicts.md states it; None: nothing was promised."""
    drawn: Range | None = None
    """What is drawn instead, where ..."""
    measure: Callable[[Scenario, Tables, Tables], float] | None = None
    """... only the run (and its twin) says how large the fault became."""


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


def _with(
    scenario: Scenario,
    fault: Fault,
    expected: VerdictKind,
    rank: int | None,
    size: float,
    *,
    or_else: tuple[VerdictKind, ...] = (),
    layer: int | None = None,
) -> Case:
    return Case(replace(scenario, faults=(fault,)), scenario, (expected, *or_else), rank, size, layer)


def _slow(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("slow", float(random.uniform(3, 5)), stage, ms=ms, on_cpu=bool(random.integers(2)))
    return _with(run, fault, VerdictKind.STAGE_LIMITS, stage, ms)


def _straggler(random: Random, run: Scenario, ms: float) -> Case:
    run = replace(
        run, base_ms=run.base_ms[:2], in_flight=2, tensor_parallel=int(random.choice([2, 4])), param_bytes=None
    )
    stage, tp = int(random.integers(2)), int(random.integers(run.tensor_parallel))
    fault = Fault("slow", float(random.uniform(3, 5)), stage, ms=ms, tp=tp, on_cpu=bool(random.integers(2)))
    return _with(run, fault, VerdictKind.STRAGGLER_RANK, run.rank(0, stage, tp), ms)


def _failing(random: Random, run: Scenario, factor: float) -> Case:
    """All ranks of the host, or (one in three) one stage: what of that `stage_limits` can tell it tells first."""
    run = replace(run, seconds=CHANGING_S)
    at_s, ramp_s = float(random.uniform(21, 25)), float(random.choice([0.0, random.uniform(1, 6)]))
    stage, alone = int(random.integers(run.stages)), int(random.integers(3)) == 0
    if alone:
        fault = Fault("fail_slow", at_s, stage, factor=factor, ramp_s=ramp_s)
        return _with(run, fault, VerdictKind.FAIL_SLOW, stage, factor, or_else=(VerdictKind.STAGE_LIMITS,))
    fault = Fault("fail_slow", at_s, host=0, factor=factor, ramp_s=ramp_s)
    return _with(run, fault, VerdictKind.FAIL_SLOW, None, factor)


def _gc(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("gc", float(random.uniform(3, 5)), stage, ms=ms, every_s=float(random.uniform(1.0, 3.0)))
    return _with(run, fault, VerdictKind.GC_PAUSE, stage, ms)


def _hang(random: Random, run: Scenario, ms: float) -> Case:
    stage = int(random.integers(run.stages))
    fault = Fault("hang", float(random.uniform(3, 5)), stage, ms=ms)
    return _with(run, fault, VerdictKind.STUCK, stage, ms)


def _nan(random: Random, run: Scenario, size: float) -> Case:
    stage, layer = int(random.integers(run.stages)), int(random.integers(LAYERS))
    fault = Fault("nan", float(random.uniform(1, 9)), stage, layer=layer)
    return _with(run, fault, VerdictKind.FIRST_NONFINITE, stage, size, layer=stage * LAYERS + layer)


def _dropped(random: Random, run: Scenario, share: float) -> Case:
    fault = Fault("drop", 2.0, int(random.integers(run.stages)), share=share)
    return _with(run, fault, VerdictKind.RECORDS_DROPPED, None, share)


def _silent(random: Random, run: Scenario, size: float) -> Case:
    stage = int(random.integers(run.stages))
    return _with(run, Fault("silent_site", stage=stage), VerdictKind.SITE_NEVER_FIRED, stage, size)


def _memory(random: Random, run: Scenario, tokens: float) -> Case:
    run = replace(run, requests_per_s=float(random.uniform(12, 20)))
    return _with(run, Fault("kv_small", size=int(tokens)), VerdictKind.KV_STARVED, None, tokens)


def _prompts(random: Random, run: Scenario, tokens: float) -> Case:
    fault = Fault("long_prompts", 3.0, size=int(tokens), share=float(random.uniform(0.3, 1.0)))
    return _with(run, fault, VerdictKind.PREFILL_DELAYS_DECODE, None, tokens)


def _foreign(random: Random, run: Scenario, cores: float) -> Case:
    run = replace(run, requests_per_s=float(random.uniform(8, 20)))
    fault = Fault("foreign", float(random.uniform(2, 5)), host=0, size=cores)
    return _with(run, fault, VerdictKind.HOST_CONTENDED, None, cores)


def _underfilled(random: Random, run: Scenario, per_s: float) -> Case:
    """As it was set up, so from the start; how much is waiting decides what more in flight would gain."""
    run = replace(run, seconds=BASE_S + 2.0, requests_per_s=per_s)
    fault = Fault("underfilled", size=int(random.integers(1, run.stages)))
    return _with(run, fault, VerdictKind.PIPELINE_UNDERFILLED, None, per_s)


def _clock_jump(random: Random, run: Scenario, ms: float) -> Case:
    run = replace(run, hosts=2)
    fault = Fault("clock_jump", float(random.uniform(2, 6)), host=1, ms=ms)
    return _with(run, fault, VerdictKind.CLOCK_UNCERTAIN, None, ms)


def _clock_unknown(_: Random, run: Scenario, size: float) -> Case:
    run = replace(run, hosts=2)
    return _with(run, Fault("clock_unknown", host=1), VerdictKind.CLOCK_UNCERTAIN, None, size)


def _experts(random: Random, run: Scenario, share: float) -> Case:
    run = replace(run, seconds=ROUTED_S, experts=int(random.choice([8, 16])))
    stage, layer = int(random.integers(run.stages)), int(random.integers(LAYERS))
    fault = Fault("experts", float(random.uniform(1, 4)), stage, layer=layer, share=share)
    return _with(run, fault, VerdictKind.EXPERT_IMBALANCE, stage, share, layer=stage * LAYERS + layer)


def _stated(case: Case, told: Sequence[Verdict], _: Tables) -> float | None:
    """Return the detection limit, in ms, that `healthy` stated of the stage: of computing if it computes longer."""
    said = [v for v in told if v.kind is VerdictKind.HEALTHY]
    if not said:
        return None
    any_kind = re.search(rf"stage {case.rank} by (\d+\.\d) ms", said[-1].text)
    computing = re.search(r"or by (.*?) of computing", said[-1].text)
    assert any_kind is not None and computing is not None, said[-1].text
    limits = re.findall(r"\d+\.\d", computing[1])
    return float(limits[case.rank or 0] if case.scenario.faults[0].on_cpu else any_kind[1])


def _late(case: Case, _: Sequence[Verdict], __: Tables) -> float:
    """Return 1 ms or 20 % of a step (2 ms or 30 % if it computes longer), whichever is more (docs/verdicts.md)."""
    step_ms = max(case.scenario.base_ms) + LARGEST_BATCH_MS
    computing = case.scenario.faults[0].on_cpu
    return max(2.0, 0.3 * step_ms) if computing else max(1.0, 0.2 * step_ms)


def _lasting(case: Case, _: Sequence[Verdict], tables: Tables) -> float | None:
    """Return 1.25; None where the steps since then are of shapes that were not there before."""
    return 1.25 if known_share(case.scenario, tables) >= KNOWN else None


def _hot(case: Case, _: Sequence[Verdict], tables: Tables) -> float | None:
    """Return the share of tokens at which an expert is chosen 4 times the mean, or 0.6 of the way to the most, and what
    a sample as small as that which was routed may miss of it; None if too few tokens were routed to tell."""
    even = case.scenario.experts_per_token / case.scenario.experts
    hot = even * min(4.0, 1 + 0.6 * (1 / even - 1))
    tokens = routed_tokens(case.scenario, tables, case.rank or 0, case.layer or 0)
    return hot + DEVIATIONS * np.sqrt(hot * (1 - hot) / tokens) if tokens else None


def _of(size: float) -> Callable[[Case, Sequence[Verdict], Tables], float]:
    return lambda _, __, ___: size


K = VerdictKind
ONE: Final = (1.0, 1.0)
"""Of faults that have no size: all count."""
JUMP_MS: Final = 1.7
"""In the 5 s between two exchanges clocks may drift apart by 0.5 ms; each of the two is off by up to 0.3 ms, and the
clock's error of 0.3 ms counts twice."""
KINDS: Final = {
    "stage_limits": Kind(K.STAGE_LIMITS, "ms a step", (0.5, 30.0), _slow, _stated),
    "straggler_rank": Kind(K.STRAGGLER_RANK, "ms a step", (0.5, 20.0), _straggler, _late),
    "fail_slow": Kind(K.FAIL_SLOW, "times as long", (1.1, 2.0), _failing, _lasting),
    "gc_pause": Kind(K.GC_PAUSE, "ms a pause", (30.0, 600.0), _gc, _of(100.0)),
    "stuck": Kind(K.STUCK, "ms", (1_000.0, 7_000.0), _hang, _of(3_200.0)),
    "first_nonfinite": Kind(K.FIRST_NONFINITE, "rows", ONE, _nan, _of(0.0)),
    "records_dropped": Kind(K.RECORDS_DROPPED, "share of rows", (0.002, 0.2), _dropped, _of(0.0)),
    "site_never_fired": Kind(K.SITE_NEVER_FIRED, "sites", ONE, _silent, _of(0.0)),
    "kv_starved": Kind(
        K.KV_STARVED,
        "share of requests' time",
        (0.01, 1.0),
        _memory,
        _of(0.2),
        drawn=(100.0, 1_000.0),
        measure=memory_share,
    ),
    "prefill_delays_decode": Kind(
        K.PREFILL_DELAYS_DECODE,
        "share of decoding time",
        (0.01, 1.0),
        _prompts,
        _of(0.1),
        drawn=(40.0, 600.0),
        measure=prompt_share,
    ),
    "host_contended": Kind(
        K.HOST_CONTENDED,
        "share of time without a core",
        (0.02, 0.5),
        _foreign,
        _of(0.15),
        drawn=(0.2, 2.0),
        measure=delay_share,
    ),
    "pipeline_underfilled": Kind(
        K.PIPELINE_UNDERFILLED,
        "throughput it costs",
        (0.01, 1.0),
        _underfilled,
        _of(0.10),
        drawn=(3.0, 40.0),
        measure=throughput_gain,
    ),
    "clock_uncertain": Kind(K.CLOCK_UNCERTAIN, "ms a jump", (0.1, 500.0), _clock_jump, _of(JUMP_MS)),
    "clock_never_compared": Kind(K.CLOCK_UNCERTAIN, "hosts", ONE, _clock_unknown, _of(0.0)),
    "expert_imbalance": Kind(K.EXPERT_IMBALANCE, "share of tokens", (0.2, 1.0), _experts, _hot),
}


def draw(name: str, seed: int) -> Case:
    """Return the case of a kind and seed."""
    kind = KINDS[name]
    random = np.random.default_rng([seed, *name.encode()])
    low, high = np.log(kind.drawn or kind.sizes)
    return kind.make(random, pipeline(random, seed), float(np.exp(random.uniform(low, high))))
