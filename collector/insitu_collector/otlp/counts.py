"""What came by OTLP, by what became of it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import grpc

from insitu_collector.otlp.limits import REMEDIES, Reject
from insitu_collector.otlp.signals import Signal


class OtlpCounts:
    """Counters since the collector began. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._rejected: Counter[tuple[str, Reject]] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._told: Counter[tuple[str, Reject]] = Counter()

    def stored(self, signal: Signal, num_records: int) -> None:
        """So many records are durable."""
        with self._lock:
            self._stored[signal.table] += num_records

    def refused(self, signal: Signal, code: grpc.StatusCode) -> None:
        """A whole request was not taken."""
        with self._lock:
            self._refused[signal.name, code.name.lower()] += 1

    def rejected(self, signal: Signal, records: Counter[Reject]) -> list[str]:
        """Some records of a request were rejected; return what is to be told: at the first of a reason, and whenever
        their number has doubled."""
        news = []
        with self._lock:
            for reason, num in records.items():
                key = signal.table, reason
                self._rejected[key] += num
                if self._rejected[key] >= 2 * self._told[key]:
                    self._told[key] = self._rejected[key]
                    news.append(f"{self._told[key]} of {signal.table} rejected ({reason}): {REMEDIES[reason]}")
        return news

    def to_json(self) -> dict[str, Any]:
        """Return records stored by table, records rejected by table and reason, requests refused by signal and code."""
        with self._lock:
            return {
                "stored": dict(sorted(self._stored.items())),
                "rejected": _nested(self._rejected),
                "refused_requests": _nested(self._refused),
            }


def _nested(counts: Counter[Any]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (outer, inner), num in sorted(counts.items()):
        found.setdefault(outer, {})[str(inner)] = num
    return found
