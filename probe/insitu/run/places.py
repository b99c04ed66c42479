"""Where a process stands that was told nothing by code: its rank, stage and replica."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Final

from insitu.config import STAGE_VARIABLE, ConfigError
from insitu.setting_values import as_count
from insitu.vocabulary import HIGHEST_RANK

EACH_RANK: Final = "rank"
_RANKS: Final = ("RANK", "LOCAL_RANK")
"""What torchrun and its kin tell a process; the former counts over all hosts."""
MAX_REPLICAS: Final = 1024
"""Models of one run and stage on one host that are told apart."""

_claims: list[int] = []
"""Descriptors that hold this process's replica numbers."""


@dataclass(frozen=True, slots=True)
class Place:
    """A model's place in the grid of a run."""

    rank: int
    stage: int
    replica: int
    is_alone: bool
    """True where no other rank is known of."""


def place_of(nth: int, run: str, environment: Mapping[str, str] | None = None) -> Place:
    """Return the place of this process's nth model, from 0.

    Ranks that were started together run the same models in the same order: the nth of each is one replica. Processes
    that know of no other are replicas of each other, numbered on this host as they come. Raises as `global_rank`.
    """
    environment = os.environ if environment is None else environment
    wanted, rank = environment.get(STAGE_VARIABLE, ""), global_rank(environment)
    stage = (rank or 0) if wanted == EACH_RANK else int(wanted or 0)
    if rank is not None:
        return Place(rank, stage, nth, False)
    return Place(stage, stage, claim_replica(run, stage), True)


def global_rank(environment: Mapping[str, str]) -> int | None:
    """Return the rank among all processes as torch.distributed or the launcher says it; None where there is none.

    Raises ConfigError, one line, where a variable of the launcher holds what it cannot: ranks would be taken for one.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    if not environment.get("WORLD_SIZE"):
        return None
    try:
        num_ranks = as_count(environment["WORLD_SIZE"])
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE: {error}, as your launcher does, or unset it") from None
    told = ((name, environment[name]) for name in _RANKS if environment.get(name))
    return next((_rank(name, text, num_ranks) for name, text in told), None)


def _rank(name: str, text: str, num_ranks: int) -> int:
    most = min(num_ranks - 1, HIGHEST_RANK)
    try:
        rank = int(text)
    except ValueError:
        rank = -1
    if not 0 <= rank <= most:
        raise ConfigError(
            f"{name}: {text!r:.80} is no rank where WORLD_SIZE is {num_ranks}; "
            f"write a whole number from 0 to {most}, as your launcher does, or unset it"
        )
    return rank


def claim_replica(run: str, stage: int) -> int:
    """Return the lowest replica number that no living process of this host has for this run and stage, and keep it.

    An abstract socket address holds it: it is taken atomically and goes with the process, however that ends. So a
    worker that is started again takes the place of the one that died.
    """
    for number in count():
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0insitu-{run}-{stage}-{number}")
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE or number + 1 == MAX_REPLICAS:
                raise
            continue
        _claims.append(claim.detach())
        return number
    raise AssertionError("count() never ends")


def _let_go_in_child() -> None:
    """A forked child must not hold its parent's numbers when the parent is gone."""
    for descriptor in _claims:
        os.close(descriptor)
    _claims.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
