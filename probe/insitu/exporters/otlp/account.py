"""Rows on their way to an OTLP receiver: delivered, refused, or neither yet. Pure; the caller holds the lock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from insitu.vocabulary import DropReason

Key = tuple[int, int]
"""Stream and seq of a batch."""


@dataclass(slots=True)
class _Batch:
    num_rows: int
    num_open: int
    refused: Counter[DropReason] = field(default_factory=Counter)


class Account:
    """By batch, since that is what the outbox counts in; a batch refused in part is durable but for so many rows."""

    def __init__(self) -> None:
        self._open: defaultdict[int, dict[int, _Batch]] = defaultdict(dict)
        """By stream and seq."""
        self._last: dict[int, int] = {}
        self._refused: list[tuple[int, int, DropReason]] = []
        self._partly: list[tuple[int, int, DropReason]] = []

    @property
    def num_open(self) -> int:
        """Batches that are neither delivered nor refused."""
        return sum(map(len, self._open.values())) - len(self._refused)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is on its way and every refusal was reported."""
        return not any(self._open.values())

    def begin(self, key: Key, num_rows: int) -> None:
        """Take a batch in. Streams come in order of seq."""
        stream, seq = key
        self._open[stream][seq] = _Batch(num_rows, num_rows)
        self._last[stream] = seq

    def deliver(self, num_rows: Mapping[Key, int]) -> None:
        """So many rows of each batch were taken by the receiver, or left out by sampling."""
        for key, number in num_rows.items():
            self._close(key, number)

    def refuse(self, num_rows: Mapping[Key, int], reason: DropReason) -> None:
        """So many rows of each batch will never be taken."""
        for (stream, seq), number in num_rows.items():
            batch = self._open[stream].get(seq)
            if batch is not None and number:
                batch.refused[reason] += number
                self._close((stream, seq), number)

    def _close(self, key: Key, num_rows: int) -> None:
        stream, seq = key
        batch = self._open[stream].get(seq)
        if batch is None:  # given up meanwhile
            return
        batch.num_open -= num_rows
        assert batch.num_open >= 0, "a row is delivered or refused once"
        if batch.num_open:
            return
        if batch.refused.total() == batch.num_rows and len(batch.refused) == 1:
            self._refused.append((stream, seq, next(iter(batch.refused))))
            return  # held open until it is reported: it is not durable
        self._partly += [(stream, number, reason) for reason, number in batch.refused.items()]
        del self._open[stream][seq]

    def give_up(self, reason: DropReason) -> None:
        """Refuse whatever is still on its way: nobody will send it."""
        told = {(stream, seq) for stream, seq, _ in self._refused}
        for stream, batches in self._open.items():
            self._refused += [(stream, seq, reason) for seq in batches if (stream, seq) not in told]

    def durable(self, stream: int) -> int:
        """Return the highest seq up to which all batches were delivered, or -1. Refused ones count once reported."""
        batches = self._open[stream]
        return min(batches) - 1 if batches else self._last.get(stream, -1)

    def take_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, (stream, seq, reason) of the batches that were refused whole."""
        refused, self._refused = self._refused, []
        for stream, seq, _ in refused:
            self._open[stream].pop(seq, None)
        return refused

    def take_partly_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, (stream, rows, reason) of rows refused out of batches that are durable otherwise."""
        partly, self._partly = self._partly, []
        return partly
