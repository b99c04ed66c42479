"""Unlinking what a shard keeps no longer. Torch-free; `insitu.segments.retention` has the rules."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from insitu.segments import disk
from insitu.segments.claims import Claims
from insitu.segments.layout import OPEN, SEALED, SegmentName, is_full, list_segments, remove, sync_folder
from insitu.segments.reader import TailReader, batch_heads
from insitu.segments.retention import Busy, Epochs, Held, Keep, expired
from insitu.segments.told import told
from insitu.vocabulary import EXPIRED

SWEEP_S: Final = 60.0
"""How often a shard looks at itself."""

_log = logging.getLogger("insitu")

Tell = Callable[[Sequence[dict[str, Any]]], None]
"""Takes rows of `gaps`; raises OSError when it cannot now."""


class Expiry:
    """Keeps one shard within bounds. Called by the shard's writer, never by a step thread; raises nothing.

    What is to go is told first, one row of `gaps` a segment and epoch, and unlinked at the next look, a minute later:
    a crash in between leaves a file that is told to have gone, which a reader sees, and never the other way round. What
    an earlier life had told goes with the first look: one that never lives a minute expires what it has to, too.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        shard: str,
        keep: Keep,
        tell: Tell,
        *,
        own_epoch: int,
        reason: str = EXPIRED,
        clock: Callable[[], float] = time.monotonic,
        unix_clock_ns: Callable[[], int] = time.time_ns,
        claims: Claims | None = None,
        first_look_s: float | None = None,
    ) -> None:
        """claims: what others in this process are at work on, where anybody is. first_look_s: how soon the first look
        comes; None: as late as any other."""
        self._claims = claims or Claims()
        self._store = Path(store)
        self._shard = shard
        self._keep = keep
        self._tell = tell
        self._own_epoch = own_epoch
        self._reason = reason
        self._clock = clock
        self._unix_clock_ns = unix_clock_ns
        self._next_look = clock() + (SWEEP_S if first_look_s is None else first_look_s)
        self._is_first_look = True
        """Of those that found something to remove."""
        self._held: dict[SegmentName, Held] = {}
        self._epochs: dict[SegmentName, Epochs] = {}
        self._told: list[SegmentName] = []
        """To be unlinked at the next look."""
        self._owed: list[dict[str, Any]] = []
        """Rows that could not be told yet."""
        self._is_failing = False

    def look(self, busy: Callable[[], Busy]) -> None:
        """Look once a minute; at other times return at once."""
        if not self._keep.is_bounded or self._clock() < self._next_look:
            return
        self._next_look = self._clock() + SWEEP_S
        try:
            self._unlink_told()
            self._condemn(busy())
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                _log.warning("insitu: old segments of %s cannot be removed (%s)", self._store, error)
            self._is_failing = True

    def _unlink_told(self) -> None:
        while self._told:
            _remove_for_good(self._store, self._told[0])
            self._claims.give([self._told.pop(0)])

    def _condemn(self, busy: Busy) -> None:
        held = self._look_at_files()
        now = self._unix_clock_ns()
        gone = expired(held, self._keep, now, replace(busy, epochs={*busy.epochs, self._own_epoch}), self._epochs_of)
        for segment in self._without_told_before(gone):
            if self._claims.take([segment.name]):
                self._owed += gap_rows(self._store, segment.name, now, self._reason)
                self._told.append(segment.name)
        try:
            owed, self._owed = self._owed, []
            if owed:
                self._tell(owed)
        except OSError as error:
            if not is_full(error):
                self._claims.give(self._told)
                self._told.clear()  # condemned again at the next look
                raise
            # No room to tell; unlinking makes some. What cannot be told now is told later.
            self._owed = owed
            self._unlink_told()

    def _without_told_before(self, gone: list[Held]) -> list[Held]:
        """Unlink what an earlier life had told and did not come to; return the rest."""
        if not self._is_first_look or not gone:
            return gone
        files = {row["file"] for row in told(self._store, {self._reason})}
        self._is_first_look = False
        before = [segment for segment in gone if segment.name.file in files]
        self._told += [segment.name for segment in before if self._claims.take([segment.name])]
        self._unlink_told()
        return [segment for segment in gone if segment not in before]

    def _look_at_files(self) -> list[Held]:
        names = [name for name in list_segments(self._store, SEALED) if name.shard == self._shard]
        self._held = {name: self._held.get(name) or self._stat(name) for name in names}
        self._epochs = {name: found for name, found in self._epochs.items() if name in self._held}
        return list(self._held.values())

    def _stat(self, name: SegmentName) -> Held:
        found = disk.stat(name.path(self._store, SEALED))
        return Held(name, found.st_size, found.st_mtime_ns)

    def _epochs_of(self, name: SegmentName) -> Epochs:
        if name not in self._epochs:
            self._epochs[name] = read_epochs(self._store, name)
        return self._epochs[name]


def _remove_for_good(store: Path, name: SegmentName) -> None:
    """Unlink a segment so that no power loss brings it back, not even under the name it had while it was open."""
    remove(name.path(store, SEALED))
    for state in (SEALED, OPEN):
        with contextlib.suppress(FileNotFoundError):
            sync_folder(name.path(store, state).parent)


def read_epochs(store: Path, name: SegmentName) -> Epochs:
    """Return whose rows a sealed segment holds, and whose it speaks of."""
    of_rows: Collection[int] = {key.epoch for key, _ in batch_heads(name.path(store, SEALED))}
    if name.table != "gaps":
        return Epochs(of_rows, of_rows)
    reader = TailReader(store, name, SEALED)
    try:
        batches = reader.read(final=True)
    finally:
        reader.close()
    about = {epoch for batch in batches for epoch in batch.data.column("source_epoch").to_pylist()}
    return Epochs(of_rows, {epoch for epoch in about if epoch is not None} or of_rows)


def gap_rows(store: Path, name: SegmentName, unix_ns: int, reason: str) -> list[dict[str, Any]]:
    """Return the `gaps` rows of a segment that goes: one an epoch."""
    rows: dict[int, dict[str, Any]] = {}
    for key, head in batch_heads(name.path(store, SEALED)):
        row = rows.setdefault(
            key.epoch,
            {
                "source_epoch": key.epoch,
                "table": name.table,
                "seq_from": key.seq,
                "seq_to": key.seq,
                "num_rows": 0,
                "num_bytes": 0,
                "reason": reason,
                "file": name.file,
                "unix_ns": unix_ns,
            },
        )
        row["seq_from"], row["seq_to"] = min(row["seq_from"], key.seq), max(row["seq_to"], key.seq)
        row["num_rows"] += head.num_rows
        row["num_bytes"] += head.num_bytes
    return list(rows.values())
