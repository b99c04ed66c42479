"""What a trial does to the engine, drawn from its seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

FAULTS: Final = ("slow-stage", "gc", "hang", "nan")
"""What the injector does inside a rank. The other kinds are made by how the engine is set up, what it is asked, and
what runs beside it."""
FACTORS: Final = (0.5, 1.0, 3.0)
"""How much longer a slow stage takes, in healthy stage times."""
SECONDS: Final = 20.0
FIRST: Final = (5.0, 11.0)
SECOND: Final = (13.0, 19.0)
"""When the first fault acts, and the second where a run has one: seconds of traffic, without overlap."""
HANG_S: Final = 5.5
SETTING_S: Final = 13.0
"""What a setting makes is there from the first second; the longest window that is judged is 10 s."""
CONTENDED_S: Final = 16.0
BURN_START_S: Final = (4.0, 6.0)
BURN_LASTS_S: Final = (7.0, 9.0)
"""Longer than the 4 s over which contention is judged."""
FAIL_SLOW_S: Final = 44.0
SLOW_START_S: Final = (22.0, 23.5)
"""20 s must be known of before, 15 s of after, and the judge comes some seconds later."""
SLOWING: Final = (0.75, 1.5)
"""By how much all stages become slower, in healthy stage times. The rule tells 0.25, or three deviations of a second:
on two virtual cores that nobody else used, whose own speed wanders for seconds, that was up to 0.65."""


@dataclass(frozen=True, slots=True)
class World:
    """What a trial is drawn from."""

    num_stages: int
    num_layers: int
    stage_ms: tuple[float, ...]
    """Healthy time of each stage for one micro-batch."""


@dataclass(frozen=True, slots=True)
class Burners:
    """Processes beside the engine that use a core each, as far as they get one; times are seconds of traffic."""

    number: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What one trial does."""

    specs: tuple[str, ...] = ()
    """For the injector."""
    serve: str = ""
    """Options of the engine, ..."""
    load: str = ""
    """... and of the load."""
    long_prompts: bool = False
    """Whether some of the prompts are of several hundred tokens."""
    seconds: float = SECONDS
    """Of traffic."""
    burners: Burners | None = None


AS_IT_COMES: Final = Plan()


def plan_of(kind: str, seed: int, world: World) -> Plan:
    """Return what the trial of this kind and seed does."""
    return PLANS[kind](kind, seed, world)


def _fault(kind: str, seed: int, world: World) -> Plan:
    """Every other seed changes the fault midway, sometimes into another kind."""
    rng = random.Random(f"{kind}-{seed}")
    place = rng.randrange(world.num_stages)
    if seed % 2:
        return Plan((_spec(kind, place, FIRST[0], None, seed, rng, world),))
    other_kind = rng.choice(FAULTS) if seed % 4 == 0 else kind
    other_place = (place + 1) % world.num_stages
    first = _spec(kind, place, *FIRST, seed, rng, world)
    return Plan((first, _spec(other_kind, other_place, *SECOND, seed + 1, rng, world)))


def _spec(
    kind: str, place: int, start_s: float, end_s: float | None, seed: int, rng: random.Random, world: World
) -> str:
    window = f"@{start_s:g}" if end_s is None else f"@{start_s:g}-{end_s:g}"
    if kind == "slow-stage":
        factor = FACTORS[(seed // 2) % len(FACTORS)]
        return f"slow-stage={place}:{factor * world.stage_ms[place]:.1f}{window}"
    if kind == "gc":
        return f"gc={place}{window}"
    step = rng.randint(1, 100)  # whichever is later: this step, or the window's begin
    if kind == "hang":
        return f"hang={place}:{step}:{HANG_S}{window}"
    share = world.num_layers // world.num_stages
    return f"nan={place * share + rng.randrange(share)}:{step}{window}"


def _none(kind: str, seed: int, world: World) -> Plan:
    return AS_IT_COMES


def _kv(kind: str, seed: int, world: World) -> Plan:
    rng = random.Random(f"{kind}-{seed}-setting")
    return Plan(serve="--kv-mib 1", load=f"--concurrency {rng.randint(12, 24)}", seconds=SETTING_S)


def _prefill(kind: str, seed: int, world: World) -> Plan:
    rng = random.Random(f"{kind}-{seed}-setting")
    budget = rng.choice((384, 512, 768))
    load = f"--rate {rng.uniform(9.0, 11.0):.2f}"
    return Plan(serve=f"--token-budget {budget}", load=load, long_prompts=True, seconds=SETTING_S)


def _underfilled(kind: str, seed: int, world: World) -> Plan:
    """Requests wait for a place in the only micro-batch, so that a second one would not make the first smaller."""
    rng = random.Random(f"{kind}-{seed}-setting")
    max_batch = rng.randint(2, 4)
    users = max_batch * rng.randint(3, 5)
    return Plan(serve=f"--in-flight 1 --max-batch {max_batch}", load=f"--concurrency {users}", seconds=SETTING_S)


def _contended(kind: str, seed: int, world: World) -> Plan:
    rng = random.Random(f"{kind}-{seed}-setting")
    start_s = rng.uniform(*BURN_START_S)
    burners = Burners(rng.randint(2, 4), round(start_s, 1), round(start_s + rng.uniform(*BURN_LASTS_S), 1))
    return Plan(burners=burners, seconds=CONTENDED_S)


def _fail_slow(kind: str, seed: int, world: World) -> Plan:
    """All stages become slower at one time, by one share of what each takes: no stage has an excess of its own."""
    rng = random.Random(f"{kind}-{seed}")
    share, start_s = rng.uniform(*SLOWING), rng.uniform(*SLOW_START_S)
    specs = (f"slow-stage={stage}:{share * ms:.2f}@{start_s:.1f}" for stage, ms in enumerate(world.stage_ms))
    return Plan(tuple(specs), seconds=FAIL_SLOW_S)


Planner = Callable[[str, int, World], Plan]
PLANS: Final[dict[str, Planner]] = {
    **dict.fromkeys(FAULTS, _fault),
    "none": _none,
    "kv": _kv,
    "prefill": _prefill,
    "underfilled": _underfilled,
    "contended": _contended,
    "fail-slow": _fail_slow,
}
"""Kind of trial -> how it is drawn."""
