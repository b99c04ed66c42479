"""What people call the items of a signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_ITEMS: Final[Mapping[str, str]] = {"traces": "spans", "metrics": "data points", "logs": "log records"}
"""By signal; rows are counted by reason, which is its own name."""


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts by signal, or by reason, for people."""
    return " + ".join(f"{number} {_ITEMS.get(name, name)}" for name, number in counts.items()) or "nothing"
