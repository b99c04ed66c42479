"""What may happen to a collector on a simulated disk, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final

from crash_kit import World

from insitu.segments.expiry import SWEEP_S

CALLS: Final = (
    *("create", "write", "fdatasync", "fsync folder", "chmod", "mkdir", "rename", "unlink"),
    *("allocate", "truncate"),
)
"""What a collector does to a disk, as `SimulatedDisk` names it."""
_ALWAYS: Final = {"send": 40, "commit": 20, "wait": 10, "away": 2, "poll": 8, "crash": 2, "end": 1}
LIVES: Final[Mapping[str, Mapping[str, int]]] = {
    "kill": _ALWAYS | {"kill": 12},
    "full": _ALWAYS | {"kill": 2, "fill": 6, "room": 6},
    "error": _ALWAYS | {"kill": 2, "fail": 12},
}
"""What may happen in a life, and how likely."""
MOMENTS: Final = ("before", "after")


def random_step(world: World, chance: random.Random, lives: Mapping[str, int], kill_at: Sequence[str]) -> None:
    """Let something happen, as likely as `lives` says; a kill is at one of these calls."""
    kind = chance.choices(list(lives), list(lives.values()))[0]
    if kind == "send":
        world.send(chance.randrange(4), chance.randint(1, 4))
    elif kind == "commit":
        world.commit()
    elif kind == "wait":
        world.wait(chance.choice([0.5, 2.0, 11.0, SWEEP_S]))
    elif kind == "away":
        world.be_away(SWEEP_S)
    elif kind == "end":
        world.end()
    elif kind == "poll":
        world.poll()
    elif kind == "fail":
        call = chance.choice(CALLS)
        world.fail_at(f"before {call}", chance.randint(1, 9 if call == "write" else 3))
    elif kind == "kill":
        label = chance.choice(kill_at)
        world.kill_at(label, chance.randint(1, 30 if "write" in label else 3))
    elif kind == "crash":
        world.crash(power=chance.random() < 0.5 if world.power is None else world.power)
    elif kind == "fill":
        world.fill(chance.randrange(200_000))
    else:
        world.make_room()
