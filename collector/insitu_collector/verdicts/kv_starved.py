"""Verdict `kv_starved`: requests wait for key/value memory, or lose what they had. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from insitu.vocabulary import RequestClass, RequestEvent, VerdictKind
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.requests.ledger import RequestLedger
from insitu_collector.verdicts.finding import Finding

SHARE: Final = 0.2
"""Share of the window's request time that memory was waited for. Where memory fits the batches there is none at all: a
request that finds a place in a batch finds its blocks too."""
MIN_REQUESTS: Final = 3
"""... by at least so many requests: fewer may be one long prompt that waits for another."""
STILL_FACTOR: Final = 0.5
"""Once told it stands until the share is below this part of the threshold."""
TILE_NS: Final = 1_000_000_000
_STARVED: Final = (RequestClass.KV_WAIT, RequestClass.PREEMPTED)
_EVENTS: Final = (RequestEvent.KV_WAIT, RequestEvent.PREEMPTED)


def is_possible(evidence: Evidence) -> bool:
    """Tell whether any request of the last minute waited for memory: else there is nothing to look at."""
    return bool(np.isin(evidence.requests.between(0)["event"], _EVENTS).any())


def look(evidence: Evidence, ledger: RequestLedger, window: tuple[int, int], *, already: bool = False) -> list[Finding]:
    """Return that requests wait for key/value memory. ledger: of the window, warm-up left out."""
    ns = ledger.sums()
    starved = ns[:, [list(RequestClass).index(cls) for cls in _STARVED]].sum(axis=1)
    share = float(starved.sum() / max(1, ns.sum()))
    num_starved = int((starved > 0).sum())
    if num_starved < MIN_REQUESTS or share < SHARE * (STILL_FACTOR if already else 1.0):
        return []
    verb = "waited for key/value memory"
    if ledger.is_of(RequestClass.PREEMPTED).any():
        verb += " or were preempted for it"
    demand = _demand(evidence, ledger)
    return [
        Finding(
            kind=VerdictKind.KV_STARVED,
            confidence=_support(ledger, window),
            text=f"requests {verb}: {num_starved} of {len(ledger)} did, for {100 * share:.0f} % of all requests' time "
            f"in {(window[1] - window[0]) / 1e9:.0f} s ({starved.sum() / 1e9:.1f} s together){_demand_text(demand)}.",
            remedy=_remedy(demand),
            t0_ns=window[0],
            t1_ns=window[1],
            requests=tuple(sorted(name for name, waited in zip(ledger.names, starved, strict=True) if waited > 0)),
            size=share,
        )
    ]


def _support(ledger: RequestLedger, window: tuple[int, int]) -> float:
    """Return the share of the window's tiles with requests in which at least half the threshold was waited."""
    edges = np.arange(window[0], window[1] + TILE_NS, TILE_NS)

    def by_tile(begin: Int64, end: Int64) -> Int64:
        done: Int64 = np.clip(edges[:, None], begin, end).sum(axis=1)
        return np.diff(done)

    waited = ledger.is_of(*_STARVED)
    starved = by_tile(ledger.spans["begin"][waited], ledger.spans["end"][waited])
    alive = by_tile(ledger.begin_ns, ledger.end_ns)
    return float(np.mean((starved >= SHARE / 2 * alive)[alive > 0]))


def _demand(evidence: Evidence, ledger: RequestLedger) -> tuple[int, int, int] | None:
    """Return how many waited at once at most, the blocks they needed, and those there are; None if it is not known."""
    if evidence.kv_pool is None:
        return None
    num_blocks, size = evidence.kv_pool
    asked = evidence.requests.between(0)
    known = (asked["event"] == RequestEvent.KV_WAIT) & (asked["tokens"] > 0)
    need = dict(zip(asked["request"][known].tolist(), (-(-asked["tokens"][known] // size)).tolist(), strict=True))
    waited = ledger.is_of(RequestClass.KV_WAIT)
    blocks = np.array([need.get(name, 0) for name in ledger.names], np.int64)[ledger.spans["at"][waited]]
    if not len(blocks) or not blocks.all():
        return None
    times = np.concatenate([ledger.spans["begin"][waited], ledger.spans["end"][waited]])
    order = np.lexsort((np.repeat([1, 0], len(blocks)), times))
    at_once = np.cumsum(np.concatenate([blocks, -blocks])[order])
    num_at_once = np.cumsum(np.repeat([1, -1], len(blocks))[order])
    most = int(np.argmax(at_once))
    return int(num_at_once[most]), int(at_once[most]), num_blocks


def _demand_text(demand: tuple[int, int, int] | None) -> str:
    if demand is None:
        return ""
    waiting, needed, there = demand
    return f"; at most {waiting} at once, which needed {needed} blocks beside the {there} that there are"


def _remedy(demand: tuple[int, int, int] | None) -> str:
    if demand is None:
        return "Give the cache more memory (`--kv-mib`), or allow shorter requests (a smaller `--max-len`)."
    _, needed, there = demand
    return (
        f"Give the cache more memory: {(there + needed) / there:.1f} times the `--kv-mib` would have held them all; or "
        "allow shorter requests (a smaller `--max-len`), which reserve less."
    )
