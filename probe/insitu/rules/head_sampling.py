"""Whose rows are taken: decided by what a request carries, so that every rank and every step decides alike. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from insitu.session.row_map import Rows

OPT_IN: Final = "opt-in"
ALL: Final = "all"
_TRACE_ID: Final = re.compile(r"[0-9a-f]{32}")
_BITS: Final = 53
"""Of a lot: what a float holds exactly, so that none is 1 and a share of 1 takes everybody."""


def is_taken(entry: Rows, requests: str | float) -> bool:
    """Return whether a rule with these `requests` takes the rows of a request.

    In this order: who asked by name (`capture`) is taken; a rule for "opt-in" takes nobody else, one for "all"
    everybody; of a share, the caller's decision stands where the request came with a trace (its flag `sampled`), else
    its trace id decides, or its name where it has none.
    """
    if entry.capture:
        return True
    if isinstance(requests, str):
        return requests == ALL
    if entry.trace is not None and entry.trace.sampled is not None:
        return entry.trace.sampled
    return lot_of(_id_of(entry)) < requests


def _id_of(entry: Rows) -> str:
    trace_id = None if entry.trace is None else entry.trace.trace_id
    return entry.request if trace_id is None else trace_id


@lru_cache(maxsize=4096)
def lot_of(name: str) -> float:
    """Return the lot in [0, 1) of a trace id (32 hex digits), or of any other name: a share s takes the lots below s.

    A trace id's is that of its low 64 bits, as OpenTelemetry's sampler by ratio has it: both choose the same traces.
    """
    if _TRACE_ID.fullmatch(name):
        bits = int(name[16:], 16)
    else:
        bits = int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
    return (bits >> (64 - _BITS)) / (1 << _BITS)
