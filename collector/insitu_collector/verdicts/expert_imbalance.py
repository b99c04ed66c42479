"""Verdict `expert_imbalance`: a router that sends far too much to one expert. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence, SiteFacts
from insitu_collector.rows.tape import Columns
from insitu_collector.verdicts.finding import Finding

WINDOW_NS: Final = 20_000_000_000
MIN_STEPS: Final = 20
"""Sampled steps of a router, fewer say nothing: one step may be about one thing."""
MIN_CHOICES: Final = 50
"""Choices an expert would have had if all were alike: below it chance alone makes hot experts."""
MOST_TIMES: Final = 4.0
"""An expert chosen this many times as often as the mean is hot. Trained routers are uneven by 2 to 3."""
MOST_SHARE: Final = 0.6
"""... or one this far on the way from its even share to being chosen by every token: with few experts the largest
possible ratio, num_experts / top_k, is smaller than `MOST_TIMES`."""
CHANCE: Final = 5.0
"""The excess must also be this many standard deviations of a Poisson count."""


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """What one router chose over a window."""

    rank: int
    site: int
    num_steps: int
    num_rows: int
    load: NDArray[np.int64]
    """int64[num_experts]: how many rows chose each expert."""
    halves: tuple[NDArray[np.int64], NDArray[np.int64]]
    """The same, of the first and the second half of its steps."""

    @property
    def top_k(self) -> float:
        """Experts a row chooses."""
        return float(self.load.sum()) / max(1, self.num_rows)

    @property
    def limit(self) -> float:
        """Times the mean from which on an expert is hot."""
        most = len(self.load) / max(self.top_k, 1e-9)
        return min(MOST_TIMES, 1 + MOST_SHARE * (most - 1))

    @property
    def is_enough(self) -> bool:
        return self.num_steps >= MIN_STEPS and float(self.load.mean()) >= MIN_CHOICES

    @property
    def is_uneven(self) -> bool:
        """Tell whether one and the same expert is hot in both halves."""
        hottest = int(self.load.argmax())
        return all(_is_hot(half, hottest, self.limit) for half in self.halves)


def times_mean(load: NDArray[np.int64]) -> float:
    """Return how often the hottest expert is chosen, in means; 0 for nothing."""
    mean = float(load.mean()) if len(load) else 0.0
    return float(load.max()) / mean if mean > 0 else 0.0


def _is_hot(load: NDArray[np.int64], expert: int, limit: float) -> bool:
    mean = float(load.mean())
    return mean > 0 and load[expert] >= limit * mean and load[expert] - mean >= CHANCE * np.sqrt(mean)


def router_loads(rows: Columns) -> list[RouterLoad]:
    """Return each router's load over some rows of `Evidence.expert_loads`, by rank and site.

    A router that changed its number of experts meanwhile is another model: only the newest number counts.
    """
    found = []
    for rank, site in sorted(set(zip(rows["rank"].tolist(), rows["site"].tolist(), strict=True))):
        mine = np.flatnonzero((rows["rank"] == rank) & (rows["site"] == site))
        mine = mine[np.argsort(rows["step"][mine], kind="stable")]
        loads = rows["load"][mine]
        kept = np.array([len(load) == len(loads[-1]) > 0 for load in loads], bool)
        if kept.any():
            each = np.stack(list(loads[kept]))
            middle = len(each) // 2
            halves = each[:middle].sum(0), each[middle:].sum(0)
            num_rows = int(rows["num_rows"][mine][kept].sum())
            found.append(RouterLoad(rank, site, len(each), num_rows, each.sum(0), halves))
    return found


def look(evidence: Evidence) -> list[Finding]:
    """Return the ranks on which a router sends far too much to one expert, the worst layer named."""
    rows = evidence.expert_loads.between(max(evidence.now_ns - WINDOW_NS, evidence.warmup_end_ns or 0))
    routers = [router for router in router_loads(rows) if router.is_enough]
    uneven = [router for router in routers if router.is_uneven]
    return [
        _finding(
            evidence,
            [router for router in uneven if router.rank == rank],
            sum(router.rank == rank for router in routers),
            rows,
        )
        for rank in sorted({router.rank for router in uneven})
        if rank in evidence.stages
    ]


def _finding(evidence: Evidence, uneven: list[RouterLoad], num_routers: int, rows: Columns) -> Finding:
    worst = max(uneven, key=lambda router: times_mean(router.load))
    site = evidence.sites.get(worst.rank, {}).get(worst.site) or SiteFacts(worst.site, f"site {worst.site}", None, "")
    stage, expert = evidence.stages[worst.rank], int(worst.load.argmax())
    mine = rows["rank"] == worst.rank
    t0, t1 = int(rows["t"][mine].min()), int(rows["t"][mine].max())
    return Finding(
        kind=VerdictKind.EXPERT_IMBALANCE,
        on_stage=stage,
        on_rank=worst.rank,
        layer=site.layer,
        site=site.name,
        text=f"experts are unevenly loaded: in {len(uneven)} of {num_routers} routers of rank {worst.rank} "
        f"(stage {stage}) one expert is chosen far too often; {_worst_text(worst, site.name)}",
        remedy=f"Give expert {expert} of {site.name} a copy where experts are spread over devices, and check the "
        "router's weights and the scale of its input: a trained router is seldom that uneven.",
        t0_ns=t0,
        t1_ns=t1,
        requests=evidence.requests_between(t0, t1 + 1),
        size=times_mean(worst.load),
    )


def _worst_text(worst: RouterLoad, name: str) -> str:
    expert, num_experts = int(worst.load.argmax()), len(worst.load)
    share, even = worst.load[expert] / max(1, worst.num_rows), worst.top_k / num_experts
    num_silent = int((worst.load == 0).sum())
    never = f"; {num_silent} of {num_experts} experts were never chosen" if num_silent else ""
    return (
        f"at {name} expert {expert} is chosen by {100 * share:.0f} % of tokens (an even share is {100 * even:.0f} %)"
        f"{never}. Over {worst.num_steps} sampled steps with {worst.num_rows} tokens; a device that holds this expert "
        f"alone would work {times_mean(worst.load):.1f} times the mean."
    )
