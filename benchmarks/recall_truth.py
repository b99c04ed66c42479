"""How large a fault became in a simulated run, where what was asked for does not say: out of what the run recorded.

In the terms in which a rule states its threshold, and by none of the rule's code. Rules look now and then, so what
counts is the largest value that held on for as long as the next look may take.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.vocabulary import Phase, RequestEvent
from insitu_collector.simulate import SECOND, Scenario
from insitu_collector.simulate.work import FormulaService, StepShape

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Tables = dict[str, pa.Table]

GRID_NS: Final = SECOND // 4
"""Windows end this far apart."""
REQUESTS_NS: Final = 10 * SECOND
LEAST_NS: Final = 3 * SECOND
"""Requests are looked at over the last stretch of the first length, once there is the second ..."""
REQUESTS_LOOK_NS: Final = 4 * SECOND
"""... every 3 s, and rows come by the second."""
FEWEST_WAITING: Final = 3
FEWEST_STEPS: Final = 10
LEAST_RATIO: Final = 1.5
CAP: Final = 3.0
HOST_NS: Final = 4 * SECOND
HOST_LOOK_NS: Final = 2 * SECOND
"""A host is looked at each second, and beats of its processes are up to one apart."""
LEAST_FOREIGN: Final = 0.25
GAIN_NS: Final = 10 * SECOND
ROUTED_NS: Final = 20 * SECOND
ROUTED_LOOK_NS: Final = 2 * SECOND
"""Routers are looked at each second, and their rows come by the second."""
KEPT_STEPS: Final = 8
FEWEST_EQUAL: Final = 3
"""Of each second so many steps are kept, and so many of one shape before and after a change are compared."""
FEWEST_SAMPLED: Final = 20
FEWEST_CHOICES: Final = 50.0
"""Sampled steps, and choices an expert on average, below which nothing is said of a router."""


def traffic_ns(tables: Tables) -> int:
    """Return when warm-up ended."""
    events = tables["events"]
    return int(pc.min(events.filter(pc.equal(events["kind"], "warmup_end"))["t_ns"]).as_py())


def _ends(tables: Tables, least_ns: int) -> Int64:
    """Return when windows end: from `least_ns` of traffic on, to the end of the run."""
    last = int(pc.max(tables["intervals"]["t1_ns"]).as_py())
    return np.arange(traffic_ns(tables) + least_ns, last, GRID_NS)


def held(values: Float64, for_ns: int) -> float:
    """Return the largest value that `values`, one each `GRID_NS`, do not fall below for so long; 0 if too few."""
    width = for_ns // GRID_NS + 1
    if len(values) < width:
        return 0.0
    return float(np.lib.stride_tricks.sliding_window_view(values, width).min(axis=1).max())


class _Lives:
    """When each request of traffic arrived, waited for memory, had its first token and ended; `last` for never."""

    def __init__(self, tables: Tables, last: int) -> None:
        rows = tables["requests"]
        names = rows["request"].combine_chunks().dictionary_encode()
        at, event, t = np.asarray(names.indices), np.asarray(rows["event"]), np.asarray(rows["t_ns"])
        self._count = len(names.dictionary)

        def first(*events: RequestEvent) -> Int64:
            found = np.full(self._count, last, np.int64)
            wanted = np.isin(event, events)
            np.minimum.at(found, at[wanted], t[wanted])
            return found

        self.arrived, self.scheduled = first(RequestEvent.ARRIVED), first(RequestEvent.SCHEDULED)
        self.waits, self.first_token = first(RequestEvent.KV_WAIT), first(RequestEvent.FIRST_TOKEN)
        self.ended = first(RequestEvent.FINISHED, RequestEvent.FAILED)


def _inside(begin: Int64, end: Int64, t0: int, t1: int) -> Int64:
    """Return how much of each [begin, end) lies in [t0, t1)."""
    return np.asarray(np.clip(np.minimum(end, t1) - np.maximum(begin, t0), 0, None), np.int64)


def memory_share(_: Scenario, tables: Tables, __: Tables) -> float:
    """Return the share of all requests' time for which they waited for memory, in windows in which 3 did."""
    ends = _ends(tables, LEAST_NS)
    begin, lives = traffic_ns(tables), _Lives(tables, int(ends[-1]) + SECOND)
    shares = []
    for t1 in ends.tolist():
        t0 = max(begin, t1 - REQUESTS_NS)
        waited = _inside(lives.waits, lives.scheduled, t0, t1)
        alive = _inside(lives.arrived, lives.ended, t0, t1).sum()
        shares.append(waited.sum() / max(1, alive) if (waited > 0).sum() >= FEWEST_WAITING else 0.0)
    return held(np.array(shares), REQUESTS_LOOK_NS)


def prompt_share(scenario: Scenario, tables: Tables, _: Tables) -> float:
    """Return the share of the time past requests' first token that prompts of others should have added.

    By what steps take in the simulation without noise, on ranks as slow as they were then. 0 in windows in which fewer
    than 10 steps carry both, or half of them take less than 1.5 times their like without prompts.
    """
    ends = _ends(tables, LEAST_NS)
    begin, lives = traffic_ns(tables), _Lives(tables, int(ends[-1]) + SECOND)
    t, decoding, added, plain = _mixed_steps(scenario, tables, begin)
    shares = []
    for t1 in ends.tolist():
        t0 = max(begin, t1 - REQUESTS_NS)
        here = (t >= t0) & (t < t1)
        if here.sum() < FEWEST_STEPS or np.median(added[here] / plain[here]) < LEAST_RATIO - 1:
            shares.append(0.0)
            continue
        counted = np.minimum(added[here], CAP * np.median(added[here])) * decoding[here]
        shares.append(float(counted.sum()) / max(1, _inside(lives.first_token, lives.ended, t0, t1).sum()))
    return held(np.array(shares), REQUESTS_LOOK_NS)


def _mixed_steps(scenario: Scenario, tables: Tables, begin: int) -> tuple[Int64, Int64, Float64, Float64]:
    """Return the steps of traffic that decode beside prompts: when, decoding rows, ns that the prompts should add on
    all stages, and ns without them."""
    steps = tables["steps"]
    steps = steps.filter(pc.and_(pc.equal(steps["rank"], 0), pc.greater_equal(steps["t0_ns"], begin)))
    maps = steps["rows"].combine_chunks()
    of = np.repeat(np.arange(len(maps)), np.asarray(pc.list_value_length(maps)))
    entries = maps.flatten()
    count, position = (np.asarray(entries.field(name)).astype(np.float64) for name in ("count", "position"))
    decodes = np.asarray(entries.field("phase")) == Phase.DECODE
    context = count * position + count * (count + 1) / 2

    def shape(wanted: NDArray[np.bool_]) -> StepShape:
        rows, seen, num = (np.bincount(of, v * wanted, len(maps)) for v in (count, context, np.ones(len(of))))
        return StepShape(rows, np.bincount(of, count * wanted * ~decodes, len(maps)), seen, num)  # type: ignore[arg-type]

    t = np.asarray(steps["t0_ns"])
    slowed = _slowed(scenario, (t - begin) / SECOND)
    wholly = np.ones(len(of), bool)
    with_prompts, without = (_expected_ns(scenario, shape(wanted), slowed) for wanted in (wholly, decodes))
    decoding = np.bincount(of, decodes, len(maps)).astype(np.int64)
    mixed = (decoding > 0) & (np.bincount(of, ~decodes, len(maps)) > 0)
    return t[mixed], decoding[mixed], (with_prompts - without)[mixed], without[mixed]


def _expected_ns(scenario: Scenario, shape: StepShape, slowed: Float64) -> Float64:
    service = FormulaService(scenario)
    stages = range(scenario.stages)
    ms = sum(slowed[n] * (service.expected_ms(n, shape) + service.sampling_ms(n, shape)) for n in stages)
    return np.asarray(ms) * 1e6


def _slowed(scenario: Scenario, at_s: Float64) -> Float64:
    """Return how many times as long a step that begins then takes on each stage: float64[num_stages, num_steps]."""
    found = np.ones((scenario.stages, len(at_s)))
    for fault in (fault for fault in scenario.faults if fault.kind == "fail_slow"):
        reached = np.clip((at_s - fault.at_s) / max(fault.ramp_s, 1e-9), 0.0, 1.0) * (at_s < fault.until_s)
        hosts = [scenario.place(scenario.rank(0, stage, 0)).host for stage in range(scenario.stages)]
        there = np.array(
            [fault.stage == n if fault.host is None else fault.host == host for n, host in enumerate(hosts)]
        )
        found[there] *= 1 + (fault.factor - 1) * reached
    return found


def delay_share(scenario: Scenario, tables: Tables, _: Tables) -> float:
    """Return the share of the time for which a step thread waited for a core while others used a quarter of them."""
    (fault,) = scenario.faults
    beats, t1 = tables["health"], _ends(tables, HOST_NS)
    foreign = np.clip((t1 - traffic_ns(tables)) / SECOND - fault.at_s, 0, HOST_NS / SECOND) / (HOST_NS / SECOND)
    worst = np.zeros(len(t1))
    for rank in range(scenario.num_ranks):
        mine = beats.filter(pc.equal(beats["rank"], rank))
        t, delay = (np.asarray(mine[name]).astype(np.float64) for name in ("t_ns", "run_delay_ns"))
        worst = np.maximum(worst, (np.interp(t1, t, delay) - np.interp(t1 - HOST_NS, t, delay)) / HOST_NS)
        foreign_enough = foreign * fault.size / int(mine["host_cores"][0].as_py()) >= LEAST_FOREIGN
    return held(np.where(foreign_enough, worst, 0.0), HOST_LOOK_NS)


def throughput_gain(_: Scenario, tables: Tables, filled: Tables) -> float:
    """Return how many more tokens a second the same run made with as many micro-batches in flight as stages."""

    def tokens(of: Tables) -> int:
        rows, end = of["requests"], int(pc.max(of["intervals"]["t1_ns"]).as_py())
        wanted = pc.is_in(rows["event"], pa.array([RequestEvent.FIRST_TOKEN, RequestEvent.TOKEN], rows["event"].type))
        return int(pc.sum(pc.and_(wanted, pc.greater_equal(rows["t_ns"], end - GAIN_NS))).as_py())

    return tokens(filled) / max(1, tokens(tables)) - 1


def known_share(scenario: Scenario, tables: Tables) -> float:
    """Return the share of the steps since ranks were slower that have equals from before in what is kept of a run.

    Equal: rows, prefill rows, sampled rows and requests, and the octave of the context.
    """
    (fault,) = scenario.faults
    begin = traffic_ns(tables)
    t, shape = _kept_steps(tables, begin)
    before, after = (t - begin) / SECOND < fault.at_s, (t - begin) / SECOND >= fault.at_s + fault.ramp_s
    _, of = np.unique(shape, axis=0, return_inverse=True)
    num_before, num_after = (np.bincount(of.reshape(-1)[which], minlength=len(t)) for which in (before, after))
    known = (num_before >= FEWEST_EQUAL) & (num_after >= FEWEST_EQUAL)
    return float(num_after[known].sum() / max(1, after.sum()))


def _kept_steps(tables: Tables, begin: int) -> tuple[Int64, Int64]:
    """Return when the kept steps of traffic began, and int64[num_steps, 5] of their shapes."""
    steps = tables["steps"].filter(pc.equal(tables["steps"]["rank"], 0)).sort_by("t0_ns")
    steps = steps.filter(pc.greater_equal(steps["t0_ns"], begin))
    second = np.asarray(steps["t0_ns"]) // SECOND
    mine = [np.flatnonzero(second == number) for number in np.unique(second)]
    kept = [one[np.linspace(0, len(one) - 1, KEPT_STEPS).round().astype(np.int64)] for one in mine]
    steps = steps.take(np.concatenate(kept))
    maps = steps["rows"].combine_chunks()
    of = np.repeat(np.arange(len(maps)), np.asarray(pc.list_value_length(maps)))
    entries = maps.flatten()
    names = ("count", "position", "phase", "sample_row")
    count, position, phase, sample = (np.asarray(entries.field(name)).astype(np.float64) for name in names)
    context = np.bincount(of, count * position + count * (count + 1) / 2, len(maps))
    sums = [np.bincount(of, each, len(maps)) for each in (count, count * (phase != Phase.DECODE), sample >= 0)]
    octave = np.floor(np.log2(np.maximum(context, 1.0)))
    shape = np.stack([*sums, np.bincount(of, minlength=len(maps)), octave], axis=1).astype(np.int64)
    return np.asarray(steps["t0_ns"]), shape


def routed_tokens(scenario: Scenario, tables: Tables, rank: int, layer: int) -> float:
    """Return how many tokens the smaller half of the steps holds in which a router was sampled while its fault lasted.

    In 20 s, for as long as the next look may take; 0 where these hold fewer than 20 such steps or, on average, 50
    choices an expert.
    """
    (fault,) = scenario.faults
    t, num_rows, choices = _routed(tables, rank, layer)
    since = traffic_ns(tables) + int(fault.at_s * SECOND)
    tokens = []
    for t1 in _ends(tables, since - traffic_ns(tables) + ROUTED_NS).tolist():
        here = np.flatnonzero((t >= t1 - ROUTED_NS) & (t < t1))
        enough = len(here) >= FEWEST_SAMPLED and choices[here].sum() >= FEWEST_CHOICES * scenario.experts
        first, second = np.split(num_rows[here], [len(here) // 2])
        tokens.append(min(first.sum(), second.sum()) if enough else 0)
    return held(np.array(tokens, np.float64), ROUTED_LOOK_NS)


def _routed(tables: Tables, rank: int, layer: int) -> tuple[Int64, Int64, Int64]:
    """Return the sampled steps of a router in order: when they began, their tokens, and the choices of all of these."""

    def of_rank(name: str) -> pa.Table:
        return tables[name].filter(pc.equal(tables[name]["rank"], rank))

    sites, steps, loads = of_rank("sites"), of_rank("steps"), of_rank("expert_loads")
    (site,) = sites.filter(pc.and_(pc.equal(sites["layer"], layer), pc.ends_with(sites["name"], "router_logits")))[
        "site"
    ]
    loads = loads.filter(pc.equal(loads["site"], site)).sort_by("step_id")
    began = dict(zip(steps["step_id"].to_pylist(), steps["t0_ns"].to_pylist(), strict=True))
    t = np.array([began[step] for step in loads["step_id"].to_pylist()], np.int64)
    choices = np.array([sum(load) for load in loads["load"].to_pylist()], np.int64)
    return t, np.asarray(loads["num_rows"]).astype(np.int64), choices
