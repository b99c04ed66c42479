"""A row of `health`: the heartbeat of a process, with what its step thread is in the middle of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from insitu.drain import health
from insitu.session.intervals import Interval


def heartbeat(
    step_thread: int | None,
    top: Interval | None,
    produced: Mapping[str, int],
    dropped: Mapping[str, Mapping[str, int]],
    *,
    num_steps: int | None,
    hook_ns: int,
    drain_cpu_ns: int,
    closing: bool,
) -> dict[str, Any]:
    """Return the row, which counts itself. step_thread: its native id, or SEVERAL. top: the interval that is open."""
    row: dict[str, Any] = dict(health.reading(step_thread))
    if top is not None:
        row |= {
            "open_cls": top.cls,
            "open_since_ns": top.t0_ns,
            "open_step_id": top.step_id,
            "open_mb": top.mb,
            "open_peer": top.peer,
        }
    counted = {**produced, "health": produced.get("health", 0) + 1}
    return row | {
        "num_steps": num_steps,
        "hook_ns": hook_ns,
        "drain_cpu_ns": drain_cpu_ns,
        "produced": [{"table": table, "rows": rows} for table, rows in counted.items()],
        "dropped": [
            {"table": table, "reason": reason, "rows": rows}
            for table, reasons in dropped.items()
            for reason, rows in reasons.items()
        ],
        "closing": closing,
    }
