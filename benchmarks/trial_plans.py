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


@dataclass(frozen=True, slots=True)
class World:
    """What a trial is drawn from."""

    num_stages: int
    num_layers: int
    stage_ms: tuple[float, ...]
    """Healthy time of each stage for one micro-batch."""


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
    return Plan(serve="--kv-mib 1", load=f"--concurrency {rng.randint(12, 24)}")


def _prefill(kind: str, seed: int, world: World) -> Plan:
    rng = random.Random(f"{kind}-{seed}-setting")
    budget = rng.choice((384, 512, 768))
    return Plan(serve=f"--token-budget {budget}", load=f"--rate {rng.uniform(9.0, 11.0):.2f}", long_prompts=True)


Planner = Callable[[str, int, World], Plan]
PLANS: Final[dict[str, Planner]] = {
    **dict.fromkeys(FAULTS, _fault),
    "none": _none,
    "kv": _kv,
    "prefill": _prefill,
}
"""Kind of trial -> how it is drawn."""
