"""Rows of `gaps`: what a store has lost, or has no longer. Pure."""

from __future__ import annotations

from typing import Any

from insitu.segments.reader import Damage
from insitu.vocabulary import DropReason


def gap_row(damage: Damage, unix_ns: int) -> dict[str, Any]:
    """Return the row of a stretch of a segment that could not be read."""
    return {
        "source_epoch": damage.epoch,
        "table": damage.segment.table,
        "seq_from": damage.seq,
        "seq_to": damage.seq,
        "num_rows": damage.num_rows,
        "num_bytes": damage.num_bytes,
        "reason": str(DropReason.TORN_TAIL) if damage.torn else "corrupt",
        "file": damage.segment.file,
        "unix_ns": unix_ns,
    }


def refused_row(epoch: int, table: str, seq: int, reason: str, unix_ns: int, num_rows: int | None) -> dict[str, Any]:
    """Return the row of a batch that was kept for a collector, and that the collector will not have."""
    return {
        "source_epoch": epoch,
        "table": table,
        "seq_from": seq,
        "seq_to": seq,
        "num_rows": num_rows,
        "reason": reason,
        "unix_ns": unix_ns,
    }
