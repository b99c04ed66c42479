"""Rows written by hand, as tables of the real schemas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK


def table(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table; what they do not say of who wrote them: rank 0, a stage and an epoch for each rank."""
    full = []
    for number, row in enumerate(rows):
        rank = row.get("rank", 0)
        full.append({"epoch": rank + 1, "rank": rank, "stage": rank, "row_seq": number, **row})
    return pa.Table.from_pylist(full, schema=schema_of(name))


def requests(events: Iterable[tuple[str, int, int]], **more: Any) -> pa.Table:
    """Return (request, event, t_ns) as the driver writes them."""
    of = {"epoch": 1, "rank": NO_RANK, "stage": NO_RANK, **more}
    return table("requests", ({**of, "request": name, "event": int(event), "t_ns": t} for name, event, t in events))


def interval(cls: int, t0: int, t1: int, *, rank: int = 0, peer: int = -1, cpu: int | None = None) -> dict[str, Any]:
    """Return a row of `intervals`, of a rank that is its own stage."""
    cpu_ns = t1 - t0 if cpu is None else cpu
    return {"rank": rank, "cls": int(cls), "t0_ns": t0, "t1_ns": t1, "peer": peer, "cpu_ns": cpu_ns}


def beat(t: int, run_delay: int = 0, *, rank: int = 0, **more: Any) -> dict[str, Any]:
    """Return a row of `health`."""
    return {"rank": rank, "t_ns": t, "run_delay_ns": run_delay, "closing": False, **more}
