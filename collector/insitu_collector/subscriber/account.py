"""What became of what a store had for one receiver: counts and a state, kept beside its cursor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

TAKING: Final = "taking"


@dataclass
class Account:
    """Items are spans, data points and log records, by signal; rows are those of the store's tables."""

    sent: Counter[str] = field(default_factory=Counter)
    """Items that were taken."""
    num_bytes: int = 0
    num_requests: int = 0
    rejected_items: Counter[str] = field(default_factory=Counter)
    """Refused out of requests that were taken (`partial_success`)."""
    rejected_text: str = ""
    dead: Counter[str] = field(default_factory=Counter)
    """Items that went to the dead letters."""
    dead_by_reason: Counter[str] = field(default_factory=Counter)
    dead_dropped: int = 0
    """Items of dead letters that had to go, oldest first."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Items of signals that the receiver is not sent."""
    num_unlinked: int = 0
    """Rows of intervals that were sent before it was known whom their steps served."""
    num_retried: int = 0
    num_split: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    """Rows that will never be sent, by reason: `expired_unsent`, `no_source`, `unmappable`, `unreadable`."""
    is_now: str = TAKING
    """"taking", "again" or "held"."""
    since_unix_ns: int = 0
    text: str = ""

    def took(self, signal: str, num_items: int, num_bytes: int) -> None:
        self.sent[signal] += num_items
        self.num_bytes += num_bytes
        self.num_requests += 1

    def rejected(self, signal: str, num_items: int, text: str) -> None:
        self.rejected_items[signal] += num_items
        self.rejected_text = text

    def buried(self, signal: str, num_items: int, reason: str, num_dropped: int) -> bool:
        """Count a dead letter; return whether it is the first for its reason."""
        is_first = not self.dead_by_reason[reason]
        self.dead[signal] += num_items
        self.dead_by_reason[reason] += num_items
        self.dead_dropped += num_dropped
        return is_first

    def state(self, is_now: str, text: str) -> None:
        self.is_now, self.text, self.since_unix_ns = is_now, text, time.time_ns()

    def to_json(self) -> dict[str, Any]:
        """Return what is kept."""
        return {
            "sent": dict(self.sent),
            "bytes": self.num_bytes,
            "requests": self.num_requests,
            "rejected": dict(self.rejected_items),
            "rejected_text": self.rejected_text,
            "dead": dict(self.dead),
            "dead_by_reason": dict(self.dead_by_reason),
            "dead_dropped": self.dead_dropped,
            "left_out": dict(self.left_out),
            "unlinked": self.num_unlinked,
            "retried": self.num_retried,
            "split": self.num_split,
            "rows": dict(self.rows),
            "state": self.is_now,
            "since_unix_ns": self.since_unix_ns,
            "text": self.text,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Account:
        """Return what was kept; what is not there is nothing. A state of an earlier process is over."""
        return cls(
            sent=Counter(found.get("sent", {})),
            num_bytes=int(found.get("bytes", 0)),
            num_requests=int(found.get("requests", 0)),
            rejected_items=Counter(found.get("rejected", {})),
            rejected_text=str(found.get("rejected_text", "")),
            dead=Counter(found.get("dead", {})),
            dead_by_reason=Counter(found.get("dead_by_reason", {})),
            dead_dropped=int(found.get("dead_dropped", 0)),
            left_out=Counter(found.get("left_out", {})),
            num_unlinked=int(found.get("unlinked", 0)),
            num_retried=int(found.get("retried", 0)),
            num_split=int(found.get("split", 0)),
            rows=Counter(found.get("rows", {})),
        )
