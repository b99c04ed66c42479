"""Rows of `gaps`: what a store has lost, or has no longer. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from insitu.segments.reader import Damage
from insitu.vocabulary import CORRUPT, DAMAGED, SENT_AGAIN, DropReason


def gap_row(damage: Damage, unix_ns: int) -> dict[str, Any]:
    """Return the row of a stretch of a segment that could not be read."""
    return {
        "source_epoch": damage.epoch,
        "table": damage.segment.table,
        "seq_from": damage.seq,
        "seq_to": damage.seq,
        "num_rows": damage.num_rows,
        "num_bytes": damage.num_bytes,
        "reason": str(DropReason.TORN_TAIL) if damage.torn else CORRUPT,
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


def sent_again_row(lost: Mapping[str, Any], unix_ns: int) -> dict[str, Any]:
    """Return the row that takes back another, which tells of a batch that is stored after all."""
    names = ("source_epoch", "table", "seq_from", "seq_to", "num_rows", "num_bytes", "file")
    return {**{name: lost[name] for name in names}, "reason": SENT_AGAIN, "unix_ns": unix_ns}


def standing(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return rows of `gaps` without those that were taken back, and without those that say so, in order."""
    every = list(rows)
    taken_back = Counter(_what(row) for row in every if row["reason"] == SENT_AGAIN)
    found = []
    for row in every:
        if row["reason"] in DAMAGED and taken_back[_what(row)] > 0:
            taken_back[_what(row)] -= 1
        elif row["reason"] != SENT_AGAIN:
            found.append(row)
    return found


def _what(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["source_epoch"], row["table"], row["seq_from"]
