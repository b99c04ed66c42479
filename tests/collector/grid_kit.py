"""Records, made by hand, of a pipeline whose stages have several tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
from judged_kit import every_revision
from record_kit import table

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.verdicts.finding import Verdict, standing

MS: Final = 1_000_000
S: Final = 1_000_000_000
BEGIN: Final = 1_000 * S
WARMUP: Final = 60
"""Steps of it."""

Extra = Callable[[int, float], tuple[float, float]]
"""(rank, seconds of traffic) -> ms asleep and ms computing that a step takes longer."""


def seeds(count: int) -> list[Any]:
    """Return the seeds 0 to `count` - 1 as parameters: the first always, the others with the failure matrix."""
    return [0, *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(1, count))]


def nothing(_rank: int, _at_s: float) -> tuple[float, float]:
    return 0.0, 0.0


@dataclass
class Grid:
    """num_stages x num_peers ranks, one micro-batch at a time, two collectives a step in each stage."""

    num_stages: int = 1
    num_peers: int = 2
    seconds: float = 12.0
    base_ms: float = 6.0
    extra: Extra = nothing
    noise: float = 0.08
    seed: int = 0
    slow_input: dict[int, float] = field(default_factory=dict)
    """Rank -> ms that its input takes longer to come."""
    queued: dict[int, float] = field(default_factory=dict)
    """Rank -> ms a step in which it waits for a core, ..."""
    queued_from_s: float = 0.0
    host_busy: float = 0.0
    """Cores that others use."""
    num_requests: Callable[[float], tuple[int, int]] = lambda _at_s: (1, 8)
    """Seconds of traffic -> the fewest and the most requests of a step."""
    size_ms: Callable[[int], float] = lambda size: 0.4 * size
    """Requests of a step -> what it takes for them."""
    gap_ms: Callable[[float], float] = lambda _at_s: 0.0
    """Seconds of traffic -> time without work after each step."""
    warmup: int = WARMUP


def grid_tables(grid: Grid) -> dict[str, pa.Table]:
    random = np.random.default_rng(grid.seed)
    ranks = range(grid.num_stages * grid.num_peers)
    rows: dict[str, list[dict[str, Any]]] = {"intervals": [], "steps": [], "health": [], "events": []}
    counters = {rank: [0.0, 0.0] for rank in ranks}
    free = dict.fromkeys(ranks, BEGIN)
    now, step, traffic, next_beat = BEGIN, 0, 0, BEGIN
    while not traffic or now < traffic + grid.seconds * S:
        if step == grid.warmup:
            now += 100 * MS
            traffic = now
            rows["events"].append({"rank": -1, "stage": -1, "epoch": 99, "t_ns": now, "kind": "warmup_end"})
        at_s = (now - traffic) / S if traffic else -1.0
        low, high = grid.num_requests(at_s) if traffic else (1, 8)
        size = int(random.integers(low, high + 1))
        name = "req" if traffic else "warmup"
        entries = [
            {"request": f"{name}-{n}", "row": n, "count": 1, "position": 10, "phase": 1, "sample_row": n}
            for n in range(size)
        ]
        for stage in range(grid.num_stages):
            group = [rank for rank in ranks if rank // grid.num_peers == stage]
            mine = range(len(group))
            arrived = now
            t = []
            for rank in group:
                came = arrived + int(grid.slow_input.get(rank, 0.0) * MS * bool(traffic))
                peer = rank - grid.num_peers if stage else (grid.num_stages - 1) * grid.num_peers + rank
                put(rows, rank, stage, free[rank], came, IntervalClass.RECV_WAIT, step, peer)
                t.append(came)
                rows["steps"].append(
                    {
                        "rank": rank, "stage": stage, "step_id": step, "mb": 0, "phase": 1, "t0_ns": came,
                        "num_rows": size, "rows": entries if stage == 0 else None,
                    }
                )  # fmt: skip
            for half in (0, 1):
                for at in mine:
                    asleep, computing = grid.extra(group[at], at_s) if traffic and not half else (0.0, 0.0)
                    queued = (
                        grid.queued.get(group[at], 0.0) if traffic and not half and at_s >= grid.queued_from_s else 0.0
                    )
                    work = (grid.base_ms + grid.size_ms(size)) / 2 * random.lognormal(0, grid.noise)
                    end = t[at] + int((work + asleep + computing + queued) * MS)
                    put(
                        rows,
                        group[at],
                        stage,
                        t[at],
                        end,
                        IntervalClass.COMPUTE,
                        step,
                        -1,
                        int((work + computing) * MS),
                    )
                    counters[group[at]][0] += (work + computing) * MS
                    counters[group[at]][1] += queued * MS
                    t[at] = end
                leave = max(t) + MS // 5
                for at in mine:
                    put(rows, group[at], stage, t[at], leave, IntervalClass.COLLECTIVE_WAIT, step, -1)
                    t[at] = leave
            for rank in group:
                free[rank] = t[0]
            now = t[0] + MS // 10
        now += int(grid.gap_ms(at_s) * MS)
        step += 1
        while now >= next_beat:
            for rank in ranks:
                cpu, delay = counters[rank]
                busy = sum(c for c, _ in counters.values()) + grid.host_busy * (next_beat - BEGIN)
                rows["health"].append(
                    {
                        "rank": rank, "stage": rank // grid.num_peers, "t_ns": next_beat, "closing": False,
                        "cpu_ns": int(cpu), "run_delay_ns": int(delay), "host_busy_ns": int(busy), "host_cores": 4,
                    }
                )  # fmt: skip
            next_beat += S
    found = {name: table(name, made) for name, made in rows.items()}
    found["sources"] = table(
        "sources",
        [
            {
                "rank": rank, "stage": rank // grid.num_peers, "tp_rank": rank % grid.num_peers, "role": "rank",
                "run": "5eed5eed5eed5eed", "boot_id": "b", "unix_anchor_ns": 0, "mono_anchor_ns": 0, "replica": 0,
            }
            for rank in ranks
        ],
    )  # fmt: skip
    return found


def put(
    rows: dict[str, list[dict[str, Any]]], rank: int, stage: int, t0: int, t1: int, cls: int, step: int, peer: int,
    cpu: int = 0,
) -> None:  # fmt: skip
    if t1 > t0:
        rows["intervals"].append(
            {
                "rank": rank, "stage": stage, "t0_ns": t0, "t1_ns": t1, "cls": int(cls), "step_id": step, "mb": 0,
                "peer": peer, "cpu_ns": cpu, "bytes": 0,
            }
        )  # fmt: skip


def judged(grid: Grid) -> list[Verdict]:
    """Return every revision of a run that is judged a second at a time.

    Not that one micro-batch at a time leaves stages without work, as all these runs do.
    """
    told = every_revision(grid_tables(grid))
    return [verdict for verdict in told if verdict.kind is not VerdictKind.PIPELINE_UNDERFILLED]


def stands(grid: Grid) -> list[Verdict]:
    """Return what stands in the end."""
    return standing(judged(grid))


def named(grid: Grid) -> list[tuple[str, int | None]]:
    return [(str(verdict.kind), verdict.on_rank) for verdict in stands(grid)]
