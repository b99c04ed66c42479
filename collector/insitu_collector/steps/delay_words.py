"""The delay matrix of a store's run, as JSON and for people."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from insitu.vocabulary import NO_RANK
from insitu_collector.clocks.timeline import numbers, timeline_of
from insitu_collector.ledger.window import rank_stages
from insitu_collector.steps.delay_matrix import DelayMatrix, FaultClass, Float64, Pattern, delay_matrix, patterns


def matrix_of(intervals: pa.Table, sources: pa.Table, t0_ns: int, t1_ns: int) -> DelayMatrix:
    """Return the matrix of the intervals of one run and replica that ended in [t0_ns, t1_ns) of their timeline."""
    clock = timeline_of(sources)
    columns = {"t0": clock.moved(intervals, "t0_ns"), "t": clock.moved(intervals, "t1_ns")}
    missing = {"rank": NO_RANK, "peer": NO_RANK, "cls": -1, "step_id": -1, "bytes": 0}
    columns |= {name: numbers(intervals, name, null) for name, null in missing.items()}
    columns["step"] = columns.pop("step_id")
    inside = (columns["t"] >= t0_ns) & (columns["t"] < t1_ns)
    return delay_matrix({name: column[inside] for name, column in columns.items()}, rank_stages(sources))


def to_json(matrix: DelayMatrix) -> dict[str, Any]:
    """Return the matrix for the document `insitu.stalls/1`; null where there is nothing to compare."""
    return {
        "ranks": list(matrix.ranks),
        "transfer_excess_ms": _milliseconds(matrix.transfer_ns),
        "messages": matrix.num_messages.tolist(),
        "waiting_ms_per_step": _milliseconds(matrix.waiting_ns),
        "patterns": [
            {
                "class": str(FaultClass.COMMUNICATION_SLOW),
                "kind": pattern.kind,
                "rank": pattern.rank,
                "peer": pattern.peer,
                "delay_ms": round(pattern.delay_ns / 1e6, 3),
                "text": said(pattern),
            }
            for pattern in patterns(matrix)
        ],
    }


def _milliseconds(ns: Float64) -> list[list[float | None]]:
    return [[None if math.isnan(cell) else round(cell / 1e6, 3) for cell in row] for row in ns.tolist()]


def said(pattern: Pattern) -> str:
    """Return a pattern in words."""
    which = {
        "link": f"the link from rank {pattern.rank} to rank {pattern.peer} is slow",
        "sender": f"all that rank {pattern.rank} sends is slow",
        "receiver": f"all that rank {pattern.rank} receives is slow",
        "rank": f"all links of rank {pattern.rank} are slow, both ways",
    }[pattern.kind]
    return f"{FaultClass.COMMUNICATION_SLOW}: {which}, by up to {pattern.delay_ns / 1e6:.1f} ms a message"


def to_lines(matrix: DelayMatrix) -> list[str]:
    """Return both halves of the matrix as tables, and what stands out in them."""
    lines = [
        "Transfers beyond the typical of all pairs, ms a message (row sends, column receives; -: nothing to compare):"
    ]
    lines += _table(matrix, matrix.transfer_ns)
    lines += ["", "Waiting, ms a step (row is waited for, column waits):", *_table(matrix, matrix.waiting_ns), ""]
    found = patterns(matrix)
    return lines + ([said(pattern) for pattern in found] or ["No link stands out."])


def _table(matrix: DelayMatrix, ns: Float64) -> list[str]:
    head = "  " + " " * 6 + "".join(f"{rank:>9}" for rank in matrix.ranks)
    cells = [["-" if math.isnan(cell) else f"{cell / 1e6:.2f}" for cell in row] for row in ns.tolist()]
    rows = zip(matrix.ranks, cells, strict=True)
    return [head, *(f"  {rank:>6}" + "".join(f"{cell:>9}" for cell in row) for rank, row in rows)]
